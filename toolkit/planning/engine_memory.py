"""Compute the memory of each engine on one rank, by kind and place: on the device, on the host, in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolkit.config.schema import OptimName
from toolkit.optim.gradient_buckets import BUCKET_BYTES
from toolkit.optim.master_adamw import GPU_PIECE, LARGEST_PIECE
from toolkit.optim.moments import SMALLEST, moment_bytes
from toolkit.optim.update_kernels import table_bytes
from toolkit.planning.engine_spec import EngineSpec
from toolkit.planning.prefix_memory import PrefixMemory
from toolkit.planning.tensor_sizes import TensorSizes


@dataclass(frozen=True)
class EngineMemory:
    """Bytes that an engine holds on one rank besides a micro batch's, on the device unless stated otherwise."""

    prefix_weights: int
    suffix_weights: int
    masters: int = 0
    moments: int = 0
    accumulated: int = 0
    """Accumulated gradients, or the buffer for them, during forward and backward of a micro batch."""
    share: float = 0.0
    """Fraction of a backward pass's gradients that stays on this rank."""
    update_gradients: int = 0
    """Peak bytes of gradients between backward and the end of the update."""
    buffers: int = 0
    """Communication buckets and gathered parameters."""
    scratch: int = 0
    """Workspace of the update; held permanently."""
    handed: int = 0
    """Bytes that a change of phase holds on a device that is the host, beside masters and moments of the engine."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes held permanently in host memory, by kind."""
    files: int = 0
    """Bytes in files."""


@dataclass(frozen=True)
class OtherPhases:
    """Elements that a phase keeps for the others of its run, in the host memory of rank 0."""

    resting: int = 0
    """Elements that trained in an earlier phase and are frozen now: their float32 masters stay."""
    handed: int = 0
    """Most elements that train on one side of a change of phase: masters and moments are copied, 12 bytes each."""


ONE_PHASE = OtherPhases()


def engine_memory(
    spec: EngineSpec, tensors: TensorSizes, frozen: PrefixMemory, others: OtherPhases = ONE_PHASE
) -> EngineMemory:
    """Return the memory of engine ``spec`` for the ``tensors`` of a suffix and the ``frozen`` weights of its prefix.

    ``others`` is what the other phases of the run add on rank 0.

    Follows toolkit.optim.flat_buffers, and of DeepSpeed 0.19 zero/stage_1_and_2.py, zero/stage3.py,
    bf16_optimizer.py and fp16/unfused_optimizer.py, and for files swap_tensor/optimizer_utils.py.
    """
    by_stage = {None: _local_engine, 0: _stage_0, 1: _stage_1_or_2, 2: _stage_1_or_2, 3: _stage_3}
    weights = EngineMemory(frozen.device, (tensors.total + sum(tensors.frozen)) * tensors.width + tensors.quantised)
    held = by_stage[spec.stage](spec, tensors, weights)
    if others.handed:
        host = Counter(held.host) + Counter({"masters": 4 * others.resting})
        if spec.host_is_device:
            held = replace(held, host=host, handed=12 * others.handed)
        else:
            held = replace(held, host=host + Counter({"workspace": 12 * others.handed}))
    return _count_host_as_device(held) if spec.host_is_device else held


def _count_host_as_device(held: EngineMemory) -> EngineMemory:
    """Return ``held`` with host memory added to device memory, for a run that computes on a CPU."""
    host = Counter(held.host)
    return replace(
        held,
        suffix_weights=held.suffix_weights + host["suffix weights"],
        masters=held.masters + host["masters"],
        moments=held.moments + host["moments"],
        accumulated=held.accumulated + host["gradients"],
        update_gradients=held.update_gradients + host["gradients"],
        scratch=held.scratch + host["workspace"],
        host={},
    )


def unpartitioned_moments(name: OptimName, tensors: TensorSizes) -> int:
    """Return the bytes of the moments of all trained tensors without partitioning."""
    tables, size = Counter(tensors.tables), 0
    for elements in tensors.trained:
        size += moment_bytes(name, elements, is_embedding=tables[elements] > 0)
        tables[elements] -= 1
    return size


def _partitioned_moments(name: OptimName, tensors: TensorSizes, part: Callable[[Sequence[int]], int]) -> int:
    """Return the bytes of a rank's partition of the moments; ``part`` gives the partition's size for some tensors."""
    if name == "adamw":
        return moment_bytes(name, part(tensors.trained))
    others = list((Counter(tensors.trained) - Counter(tensors.tables)).elements())
    kinds = ([size for size in others if (size < SMALLEST) is small] for small in (True, False))
    return moment_bytes(name, part(tensors.tables), is_embedding=True) + sum(moment_bytes(name, part(k)) for k in kinds)


def _local_engine(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    """Return the memory of the local engine: gradients as backward leaves them, as sums over passes, or over ranks."""
    width, total, largest = tensors.width, tensors.total, max(tensors.trained)
    low = width < 4  # float32 parameters are their own masters where nothing partitions them
    held, buffers = 4 * total if spec.accumulates else 0, 0
    share, update = 1.0, width * total + held
    if spec.ranks > 1:  # the gradients of a bucket are freed when they are in its sums
        summed = spec.reduce_width or width
        share, update = 0.0 if spec.accumulates else summed / width, summed * total
        buffers = width * min(total, max(largest, BUCKET_BYTES // summed))
    elif spec.accumulates and not low:  # autograd accumulates in p.grad
        held, share, update = 4 * (total + largest), 0.0, 4 * total
    return replace(
        weights, masters=4 * total if low else 0,
        moments=unpartitioned_moments(spec.optimizer, tensors), accumulated=held, share=share, update_gradients=update,
        buffers=buffers, scratch=_local_scratch(spec, tensors),
    )  # fmt: skip


def _local_scratch(spec: EngineSpec, tensors: TensorSizes) -> int:
    """Return the workspace of ``MasterAdamW``: float32 gradients of a piece, unless kernels read them in place."""
    gradients = 4 * min(tensors.total, LARGEST_PIECE if spec.host_is_device else GPU_PIECE)
    if not spec.has_kernels:
        return gradients
    return table_bytes(tensors.trained) + (0 if spec.optimizer == "adamw" else gradients)


def _stage_0(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    width, total, low = tensors.width, tensors.total, tensors.width < 4
    return replace(
        weights, masters=4 * total if low else 0, moments=8 * total, share=1.0,
        update_gradients=(width + 4 if low else width) * total,
        buffers=(width + spec.copy_width(width)) * min(total, int(5e8)) if spec.ranks > 1 else 0,
    )  # fmt: skip


def _stage_1_or_2(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    width, low = tensors.width, tensors.width < 4

    def parts(sizes: Sequence[int]) -> int:
        return 2 * math.ceil(sum(sizes) / (2 * spec.ranks))

    part, bucket = parts(tensors.trained), min(spec.bucket, tensors.total)
    moments = _partitioned_moments(spec.optimizer, tensors, parts)
    if spec.optimizer_at != "device":
        # the host holds fp32 gradients, another fp32 accumulation buffer, and weights on their way back
        largest = max(tensors.trained)
        accumulated = 4 * part if spec.accumulates else 0
        return replace(
            weights, accumulated=accumulated if low else 0, update_gradients=accumulated if low else 0,
            buffers=(spec.buckets * bucket + largest) * width + bucket * spec.copy_width(width),
            host={"masters": 4 * part, "moments": moments, "gradients": 4 * part + (0 if low else accumulated),
                  "workspace": (part + largest) * width},
        )  # fmt: skip
    in_bucket = 4 if spec.accumulates and spec.stage == 1 else width
    if spec.accumulates and low:  # float32 accumulated: of everything under stage 1, of this rank's part under stage 2
        held = 4 * (part * spec.ranks if spec.stage == 1 else part)
        share, update = 0.0, held
    else:
        held = 0
        share = 1.0 if spec.stage == 1 else 1 / spec.ranks
        # this rank's gradients, flattened, then in float32: the three are there together
        update = int(share * width * tensors.total) + width * part + (4 * part if low else 0)
    return replace(
        weights, masters=4 * part, moments=moments, accumulated=held, share=share, update_gradients=update,
        buffers=bucket * (spec.buckets * in_bucket + spec.copy_width(in_bucket)),
    )  # fmt: skip


def _stage_3(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    """Return the memory of ZeRO-3, which partitions every tensor of the suffix, and copies a shared table."""
    width, low = tensors.width, tensors.width < 4

    def parts(sizes: Sequence[int]) -> int:
        return sum(math.ceil(size / spec.ranks) for size in sizes)

    everything = (*tensors.trained, *tensors.frozen)
    part, divided = parts(tensors.trained), parts(everything) * width
    whole = sum(size for size in everything if size <= spec.persistent)
    bucket, gathered = min(spec.bucket, tensors.total), min(sum(everything) - whole, spec.live)
    summed = 4 if spec.accumulates or not low else width
    held = replace(
        weights, prefix_weights=weights.prefix_weights + tensors.shared * width,
        suffix_weights=divided + whole * width + tensors.quantised, masters=4 * part if low else 0,
        moments=_partitioned_moments(spec.optimizer, tensors, parts), accumulated=summed * part,
        update_gradients=(summed + 4) * part, buffers=bucket * (spec.reduce_width or width) + gathered * width,
    )  # fmt: skip
    if spec.optimizer_at != "device":
        held = _offload_state(held, spec, 4 * part, math.ceil(max(tensors.trained) / spec.ranks))
    if spec.weights_at == "device":
        return held
    held = replace(held, suffix_weights=held.suffix_weights - divided)
    if spec.weights_at == "cpu":
        return replace(held, host={**held.host, "suffix weights": divided})
    buffers = held.host.get("workspace", 0) + spec.weight_buffers * width
    return replace(held, files=held.files + divided, host={**held.host, "workspace": buffers})


def _offload_state(held: EngineMemory, spec: EngineSpec, masters: int, largest: int) -> EngineMemory:
    """Return ``held`` with masters, moments and gradients of ZeRO-3 moved to the host or to files."""
    off = replace(held, masters=0, moments=0, accumulated=0, update_gradients=0)
    if spec.optimizer_at == "cpu":
        return replace(off, host={"masters": masters, "moments": held.moments,
                                  "gradients": held.update_gradients})  # fmt: skip
    group = min(masters // 4, max(spec.swapped, largest))
    host = {"gradients": held.accumulated, "workspace": spec.swap_buffers * 4 * group}
    return replace(off, host=host, files=2 * masters + held.moments)  # float32 gradients are in files, too

"""Compute the memory of each engine on one rank, by kind and place: on the device, on the host, in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from toolkit.config.schema import OptimName
from toolkit.engine.deepspeed.config import zero_config
from toolkit.optim.master_adamw import LARGEST_PIECE
from toolkit.optim.moments import SMALLEST, moment_bytes
from toolkit.planning.prefix_memory import PrefixMemory

Place = Literal["device", "cpu", "nvme"]


@dataclass(frozen=True)
class EngineSpec:
    """The settings that determine an engine's memory."""

    stage: int | None
    """ZeRO stage; None for the engine without DeepSpeed."""
    ranks: int
    accumulates: bool
    """True if a step has more than one micro batch."""
    bucket: int = 0
    """Elements of one reduction bucket, of which DeepSpeed allocates one, or two where communication overlaps."""
    persistent: int = 0
    """ZeRO-3 keeps parameters of up to so many elements whole on every rank."""
    live: int = 0
    """Elements that ZeRO-3 may keep gathered at once."""
    optimizer: OptimName = "adamw"
    """The recipe's optim.name."""
    optimizer_at: Place = "device"
    """Place of masters, moments and gradients."""
    weights_at: Place = "device"
    """Place of a rank's partition of the suffix's weights under ZeRO-3."""
    swapped: int = 0
    """Elements of a sub-group, in which ZeRO-3 swaps optimizer state from NVMe."""
    swap_buffers: int = 0
    """Number of swap buffers of that size in host memory."""
    weight_buffers: int = 0
    """Elements of the host buffers through which ZeRO-3 swaps the suffix's weights from NVMe."""
    host_is_device: bool = False
    """True if the run computes on a CPU, so that offloading to the host saves nothing."""

    @property
    def name(self) -> str:
        """Return the engine's name in the training log."""
        return "local" if self.stage is None else f"zero-{self.stage}"


def engine_spec(
    ds_config: dict[str, Any] | None,
    ranks: int,
    accumulation: int,
    optimizer: OptimName = "adamw",
    host_is_device: bool = False,
) -> EngineSpec:
    """Return the engine of a resolved DeepSpeed configuration; ``ds_config`` is None for the engine without DeepSpeed.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    if ds_config is None:
        return EngineSpec(None, ranks, accumulation > 1, optimizer=optimizer)
    zero = zero_config(ds_config)
    state, weights = zero.offload_optimizer, zero.offload_param
    buckets = 2 if zero.overlap_comm and zero.stage != 3 else 1
    return EngineSpec(
        zero.stage,
        ranks,
        accumulation > 1,
        bucket=buckets * zero.reduce_bucket_size if zero.stage and zero.contiguous_gradients else 0,
        persistent=zero.param_persistence_threshold,
        live=zero.max_live_parameters,
        optimizer=optimizer,
        optimizer_at=_offload_place(state) if zero.stage else "device",
        weights_at=_offload_place(weights) if zero.stage == 3 else "device",
        swapped=zero.sub_group_size,
        swap_buffers=state.buffer_count if state else 0,
        weight_buffers=weights.buffer_count * weights.buffer_size if weights else 0,
        host_is_device=host_is_device,
    )


def _offload_place(section: Any) -> Place:
    """Return the place that one of DeepSpeed's offload sections names; None offloads nothing."""
    return "device" if section is None or section.device == "none" else section.device


def zero_spec(
    stage: int, ranks: int, accumulates: bool, hidden_size: int, optimizer: OptimName, offload: bool = False
) -> EngineSpec:
    """Return the engine that ``ds_configs/zeroN.json`` of this repository asks for, or ``zeroN_offload.json``."""
    spec = EngineSpec(stage, ranks, accumulates, hidden_size**2, 10 * hidden_size, int(1e9), optimizer)
    return replace(spec, optimizer_at="cpu", weights_at="cpu" if stage == 3 else "device") if offload else spec


@dataclass(frozen=True)
class TensorSizes:
    """Sizes of the tensors of a split model, in elements."""

    shared: int
    """Elements that prefix and suffix share: a frozen tied embedding."""
    trained: tuple[int, ...]
    """Size of each trained tensor."""
    frozen: tuple[int, ...]
    """Size of each frozen tensor of the suffix, including shared ones."""
    width: int
    """Bytes of an element in the model's precision."""
    tables: tuple[int, ...] = ()
    """Those of ``trained`` that are embedding tables."""
    quantised: int = 0
    """Bytes of the suffix's layers in 8 or 4 bits, which no engine partitions or offloads."""

    @property
    def total(self) -> int:
        """Return the trained elements."""
        return sum(self.trained)


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
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes held permanently in host memory, by kind."""
    files: int = 0
    """Bytes in files."""


def engine_memory(spec: EngineSpec, tensors: TensorSizes, frozen: PrefixMemory) -> EngineMemory:
    """Return the memory of engine ``spec`` for the ``tensors`` of a suffix and the ``frozen`` weights of its prefix.

    Follows toolkit.optim.flat_buffers, and of DeepSpeed 0.19 zero/stage_1_and_2.py, zero/stage3.py,
    bf16_optimizer.py and fp16/unfused_optimizer.py, and for files swap_tensor/optimizer_utils.py.
    """
    by_stage = {None: _local_engine, 0: _stage_0, 1: _stage_1_or_2, 2: _stage_1_or_2, 3: _stage_3}
    weights = EngineMemory(frozen.device, (tensors.total + sum(tensors.frozen)) * tensors.width + tensors.quantised)
    held = by_stage[spec.stage](spec, tensors, weights)
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
    if name in ("adamw", "adamw_bf16"):
        return moment_bytes(name, part(tensors.trained))
    others = list((Counter(tensors.trained) - Counter(tensors.tables)).elements())
    kinds = ([size for size in others if (size < SMALLEST) is small] for small in (True, False))
    return moment_bytes(name, part(tensors.tables), is_embedding=True) + sum(moment_bytes(name, part(k)) for k in kinds)


def _local_engine(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    """Return the memory of the local engine: gradients as backward leaves them, or also an fp32 accumulation buffer."""
    width, total = tensors.width, tensors.total
    low = width < 4  # float32 parameters are their own masters where nothing partitions them
    if spec.accumulates and not low and spec.ranks == 1:  # autograd accumulates in p.grad
        held, share, update = 4 * (total + max(tensors.trained)), 0.0, 4 * total
    else:
        accumulated = 4 * total if spec.ranks > 1 or spec.accumulates else 0
        held, share, update = accumulated if spec.accumulates else 0, 1.0, width * total + accumulated
    split_masters = spec.optimizer == "adamw_bf16"
    scratch = 4 + (4 + 8 + 8 if split_masters else 0)  # gradient; then weights, moments, and random numbers for both
    return replace(
        weights, masters=(2 if split_masters else 4) * total if low else 0,
        moments=unpartitioned_moments(spec.optimizer, tensors), accumulated=held, share=share, update_gradients=update,
        scratch=scratch * min(total, LARGEST_PIECE),
    )  # fmt: skip


def _partitioned_scratch(spec: EngineSpec, part: int) -> int:
    """Return the workspace for updating bfloat16 moments: their float32 copies, and random numbers for rounding."""
    return (8 + 8) * min(part, LARGEST_PIECE) if spec.optimizer == "adamw_bf16" else 0


def _stage_0(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    width, total, low = tensors.width, tensors.total, tensors.width < 4
    return replace(
        weights, masters=4 * total if low else 0, moments=8 * total, share=1.0,
        update_gradients=(width + 4 if low else width) * total,
        buffers=width * min(total, int(5e8)) if spec.ranks > 1 else 0,
    )  # fmt: skip


def _stage_1_or_2(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    width, low = tensors.width, tensors.width < 4

    def parts(sizes: Sequence[int]) -> int:
        return 2 * math.ceil(sum(sizes) / (2 * spec.ranks))

    part = parts(tensors.trained)
    moments, scratch = _partitioned_moments(spec.optimizer, tensors, parts), _partitioned_scratch(spec, part)
    if spec.optimizer_at != "device":
        # the host holds fp32 gradients, another fp32 accumulation buffer, and weights on their way back
        largest = max(tensors.trained)
        accumulated = 4 * part if spec.accumulates else 0
        return replace(
            weights, accumulated=accumulated if low else 0, update_gradients=accumulated if low else 0,
            buffers=(spec.bucket + largest) * width,
            host={"masters": 4 * part, "moments": moments, "gradients": 4 * part + (0 if low else accumulated),
                  "workspace": (part + largest) * width + scratch},
        )  # fmt: skip
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
        buffers=spec.bucket * width, scratch=scratch,
    )  # fmt: skip


def _stage_3(spec: EngineSpec, tensors: TensorSizes, weights: EngineMemory) -> EngineMemory:
    """Return the memory of ZeRO-3, which partitions every tensor of the suffix, and copies a shared table."""
    width, low = tensors.width, tensors.width < 4

    def parts(sizes: Sequence[int]) -> int:
        return sum(math.ceil(size / spec.ranks) for size in sizes)

    everything = (*tensors.trained, *tensors.frozen)
    part, divided = parts(tensors.trained), parts(everything) * width
    whole = sum(size for size in everything if size <= spec.persistent)
    gathered = min(sum(everything) - whole, spec.live)
    summed = 4 if spec.accumulates or not low else width
    held = replace(
        weights, prefix_weights=weights.prefix_weights + tensors.shared * width,
        suffix_weights=divided + whole * width + tensors.quantised, masters=4 * part if low else 0,
        moments=_partitioned_moments(spec.optimizer, tensors, parts), accumulated=summed * part,
        update_gradients=(summed + 4) * part, buffers=(spec.bucket + gathered) * width,
        scratch=_partitioned_scratch(spec, part),
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
    off = replace(held, masters=0, moments=0, accumulated=0, update_gradients=0, scratch=0)
    if spec.optimizer_at == "cpu":
        return replace(off, host={"masters": masters, "moments": held.moments,
                                  "gradients": held.update_gradients, "workspace": held.scratch})  # fmt: skip
    group = min(masters // 4, max(spec.swapped, largest))
    host = {"gradients": held.accumulated, "workspace": spec.swap_buffers * 4 * group}
    return replace(off, host=host, files=2 * masters + held.moments)  # float32 gradients are in files, too

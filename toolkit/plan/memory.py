"""Bytes by kind on one rank: what each engine holds beside the micro batch that is rehearsed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.config.schema import OptimName
from toolkit.engine.ds_config import zero_stage
from toolkit.engine.master_adamw import LARGEST_PIECE
from toolkit.engine.moments import SMALLEST, moment_bytes
from toolkit.plan.frozen import Frozen
from toolkit.plan.rehearse import Rehearsal

KINDS = (
    "prefix weights", "suffix weights", "masters", "moments", "gradients", "activations", "logits", "workspace",
)  # fmt: skip
"""What memory is spent on, from what stays to what comes and goes."""


@dataclass(frozen=True)
class EngineSpec:
    """What decides how an engine stores its state."""

    stage: int | None
    """ZeRO stage; none is the engine without DeepSpeed."""
    ranks: int
    accumulates: bool
    """More than one micro batch a step."""
    bucket: int = 0
    """Elements of one reduction bucket, of which DeepSpeed allocates one, or two where communication overlaps."""
    persistent: int = 0
    """ZeRO-3 keeps parameters of up to so many elements whole on every rank."""
    live: int = 0
    """Elements that ZeRO-3 may keep gathered at once."""
    optimizer: OptimName = "adamw"
    """The recipe's optim.name."""

    @property
    def name(self) -> str:
        """As the training log names it."""
        return "local" if self.stage is None else f"zero-{self.stage}"


def engine_spec(ds: dict[str, Any] | None, ranks: int, accumulation: int, optimizer: OptimName = "adamw") -> EngineSpec:
    """The engine that a resolved DeepSpeed configuration asks for; none asks for torch alone."""
    if ds is None:
        return EngineSpec(None, ranks, accumulation > 1, optimizer=optimizer)
    zero = ds.get("zero_optimization", {})
    stage = zero_stage(ds)
    buckets = 2 if zero.get("overlap_comm") and stage != 3 else 1
    contiguous = zero.get("contiguous_gradients", True)
    return EngineSpec(
        stage,
        ranks,
        accumulation > 1,
        bucket=buckets * int(zero.get("reduce_bucket_size", 5e8)) if stage and contiguous else 0,
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        optimizer=optimizer,
    )


def zero_spec(stage: int, ranks: int, accumulates: bool, hidden_size: int, optimizer: OptimName) -> EngineSpec:
    """The engine that ``ds_configs/zeroN.json`` of this repository asks for."""
    return EngineSpec(stage, ranks, accumulates, hidden_size**2, 10 * hidden_size, int(1e9), optimizer)


@dataclass(frozen=True)
class Tensors:
    """Sizes of the tensors of a split model, in elements."""

    shared: int
    """Storages that both halves hold: a frozen table that is embedding and head."""
    trained: tuple[int, ...]
    """Each trained tensor."""
    frozen: tuple[int, ...]
    """Each frozen tensor of the suffix, the shared ones included."""
    width: int
    """Bytes an element of the model's precision takes."""
    tables: tuple[int, ...] = ()
    """Of ``trained``, the embedding tables."""


@dataclass(frozen=True)
class Standing:
    """Bytes that an engine holds on one rank, whatever the micro batch."""

    prefix_weights: int
    suffix_weights: int
    masters: int
    moments: int
    accumulated: int
    """Gradients of earlier micro batches, or a buffer for them, while another one is computed."""
    share: float
    """Of the gradients that a backward pass leaves, the part that stays on this rank."""
    update_gradients: int
    """The most bytes of gradients at once between backward and the end of the update."""
    buffers: int
    """Communication buckets and gathered parameters."""
    scratch: int = 0
    """What the update works in; held throughout."""


def standing(spec: EngineSpec, tensors: Tensors, frozen: Frozen) -> Standing:
    """What ``spec`` holds for ``tensors``, beside the prefix's ``frozen`` ones.

    Follows toolkit.engine.flat, and of DeepSpeed 0.19 zero/stage_1_and_2.py, zero/stage3.py,
    bf16_optimizer.py and fp16/unfused_optimizer.py.
    """
    width, total = tensors.width, sum(tensors.trained)
    low = width < 4  # float32 parameters are their own masters where nothing partitions them
    suffix = (total + sum(tensors.frozen)) * width
    if spec.stage is None:
        return _local(spec, tensors, frozen, suffix)
    if spec.stage == 0:
        return Standing(
            prefix_weights=frozen.device, suffix_weights=suffix, masters=4 * total if low else 0,
            moments=8 * total, accumulated=0, share=1.0,
            update_gradients=(width + 4) * total if low else width * total,
            buffers=width * min(total, int(5e8)) if spec.ranks > 1 else 0,
        )  # fmt: skip
    if spec.stage == 3:
        return _stage_3(spec, tensors, frozen)
    return _stage_1_or_2(spec, tensors, frozen, suffix)


def _moments(name: OptimName, tensors: Tensors) -> int:
    """Bytes of the moments of whole tensors."""
    tables, size = Counter(tensors.tables), 0
    for elements in tensors.trained:
        size += moment_bytes(name, elements, is_table=tables[elements] > 0)
        tables[elements] -= 1
    return size


def _divided_moments(name: OptimName, tensors: Tensors, part: Callable[[Sequence[int]], int]) -> int:
    """Bytes of the moments of a rank's ``part`` of tensors: partitions of tables, of vectors and of matrices."""
    if name in ("adamw", "adamw_bf16"):
        return moment_bytes(name, part(tensors.trained))
    others = list((Counter(tensors.trained) - Counter(tensors.tables)).elements())
    kinds = ([size for size in others if (size < SMALLEST) is small] for small in (True, False))
    return moment_bytes(name, part(tensors.tables), is_table=True) + sum(moment_bytes(name, part(k)) for k in kinds)


def _local(spec: EngineSpec, tensors: Tensors, frozen: Frozen, suffix: int) -> Standing:
    """Gradients stay as backward leaves them, unless they are added up in float32 over micro batches or ranks."""
    width, total = tensors.width, sum(tensors.trained)
    low = width < 4
    if spec.accumulates and not low and spec.ranks == 1:  # autograd adds each tensor's gradient as it comes
        held, share, update = 4 * (total + max(tensors.trained)), 0.0, 4 * total
    else:
        sums = 4 * total if spec.ranks > 1 or spec.accumulates else 0
        held, share, update = sums if spec.accumulates else 0, 1.0, width * total + sums
    in_halves = spec.optimizer == "adamw_bf16"
    scratch = 4 + (4 + 8 + 8 if in_halves else 0)  # gradient; then weights, moments, and random numbers for both
    return Standing(
        prefix_weights=frozen.device, suffix_weights=suffix,
        masters=(2 if in_halves else 4) * total if low else 0,
        moments=_moments(spec.optimizer, tensors), accumulated=held, share=share, update_gradients=update, buffers=0,
        scratch=scratch * min(total, LARGEST_PIECE),
    )  # fmt: skip


def _divided_scratch(spec: EngineSpec, part: int) -> int:
    """What bfloat16 moments are updated in, and random numbers for them."""
    return (8 + 8) * min(part, LARGEST_PIECE) if spec.optimizer == "adamw_bf16" else 0


def _stage_1_or_2(spec: EngineSpec, tensors: Tensors, frozen: Frozen, suffix: int) -> Standing:
    width, total = tensors.width, sum(tensors.trained)

    def parts(sizes: Sequence[int]) -> int:
        return 2 * math.ceil(sum(sizes) / (2 * spec.ranks))

    part = parts(tensors.trained)
    low = width < 4
    if spec.accumulates and low:  # float32 sums: of everything under stage 1, of this rank's part under stage 2
        held = 4 * (part * spec.ranks if spec.stage == 1 else part)
        share, update = 0.0, held
    else:
        held = 0
        share = 1.0 if spec.stage == 1 else 1 / spec.ranks
        # this rank's gradients, flattened, then in float32: the three are there together
        update = int(share * width * total) + width * part + (4 * part if low else 0)
    return Standing(
        prefix_weights=frozen.device, suffix_weights=suffix, masters=4 * part,
        moments=_divided_moments(spec.optimizer, tensors, parts),
        accumulated=held, share=share, update_gradients=update, buffers=spec.bucket * width,
        scratch=_divided_scratch(spec, part),
    )  # fmt: skip


def _stage_3(spec: EngineSpec, tensors: Tensors, frozen: Frozen) -> Standing:
    """Every tensor of the suffix is cut in equal parts; the prefix keeps its own copy of a shared table."""
    width, low = tensors.width, tensors.width < 4

    def parts(sizes: Sequence[int]) -> int:
        return sum(math.ceil(size / spec.ranks) for size in sizes)

    everything = (*tensors.trained, *tensors.frozen)
    part = parts(tensors.trained)
    whole = sum(size for size in everything if size <= spec.persistent)
    gathered = min(sum(everything) - whole, spec.live)
    summed = 4 if spec.accumulates or not low else width
    return Standing(
        prefix_weights=frozen.device + tensors.shared * width,
        suffix_weights=(parts(everything) + whole) * width,
        masters=4 * part if low else 0, moments=_divided_moments(spec.optimizer, tensors, parts),
        accumulated=summed * part, share=0.0,
        update_gradients=(summed + 4) * part, buffers=(spec.bucket + gathered) * width,
        scratch=_divided_scratch(spec, part),
    )  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    most: dict[str, int]
    """Of each kind, the most that is held at once."""
    at_peak: dict[str, int]
    """Of each kind, what is held at the moment when most is held in all."""
    moment: str
    """When that is."""
    beside_weights: int
    """The most that training adds to the weights that are there when it begins."""

    @property
    def peak(self) -> int:
        """The most bytes of tensors at once."""
        return sum(self.at_peak.values())


def memory(held: Standing, rehearsal: Rehearsal, lent: int, fill: float | None) -> Memory:
    """What the engine holds and what a micro batch adds: in the prefix, in forward and backward, and in the update.

    Args:
        held: whatever the micro batch.
        rehearsal: of the micro batch.
        lent: bytes of weights that blocks of the prefix have only while they compute.
        fill: tokens of a batch of the first pass, as a multiple of the micro batch's, where the prefix is cached: it
            runs before there is an engine, and is gone when there is one. None where it stays.
    """
    weights = {"prefix weights": held.prefix_weights, "suffix weights": held.suffix_weights}
    here = weights if fill is None else weights | {"prefix weights": 0}
    fixed = here | {"masters": held.masters, "moments": held.moments}
    top = rehearsal.peak({"gradients": held.share})
    training = {
        "forward and backward": fixed | {
            "gradients": held.accumulated + top["gradients"], "activations": top["activations"],
            "logits": top["logits"], "workspace": top["workspace"] + held.buffers + held.scratch,
        },
        "update": fixed | _only("gradients", held.update_gradients) | {"workspace": held.scratch},
    }  # fmt: skip
    if fill is None:
        workspace = rehearsal.most_in_prefix + lent + held.buffers + held.scratch
        moments = training = training | {
            "prefix": fixed | _only("gradients", held.accumulated) | {"workspace": workspace}
        }
    else:
        workspace = int(fill * rehearsal.most_in_prefix) + lent
        moments = training | {"first pass": weights | _only("workspace", workspace) | {"masters": 0, "moments": 0}}
    most = weights | {
        "masters": held.masters, "moments": held.moments,
        "gradients": max(
            held.accumulated + int(held.share * rehearsal.most("gradients")), held.update_gradients
        ),
        "activations": rehearsal.kept("activations"),
        "logits": rehearsal.most("logits"),
        "workspace": max(rehearsal.most("workspace") + held.buffers + held.scratch, workspace),
    }  # fmt: skip
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    beside = max(sum(kinds.values()) for kinds in training.values()) - sum(here.values())
    return Memory(most, moments[moment], moment, beside)


def _only(kind: str, size: int) -> dict[str, int]:
    """What comes and goes, where only one kind is there."""
    return dict.fromkeys(("gradients", "activations", "logits", "workspace"), 0) | {kind: size}


def checkpoint_bytes(spec: EngineSpec, tensors: Tensors) -> int:
    """Size of a checkpoint's shards over all ranks: a float32 master and two moments of each trained element.

    Moments that are kept in fewer bits are there twice: as they are stored, and in float32 for any other layout.
    """
    stored = 0 if spec.optimizer == "adamw" else _moments(spec.optimizer, tensors)
    return 12 * sum(tensors.trained) + stored

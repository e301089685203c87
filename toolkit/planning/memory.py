"""Add up bytes by kind on one rank: what an engine holds, and what a micro batch adds at its worst moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.planning.engine_memory import EngineMemory, unpartitioned_moments
from toolkit.planning.engine_spec import EngineSpec
from toolkit.planning.tensor_sizes import TensorSizes
from toolkit.planning.trace import Trace

KINDS = (
    "prefix weights", "suffix weights", "masters", "moments", "gradients", "activations", "logits", "workspace",
)  # fmt: skip
"""Kinds of memory, from permanent to temporary."""
_FIXED_MOMENTS = ("update", "change of phase")
"""Moments in which no micro batch is computed."""


@dataclass(frozen=True)
class Memory:
    """Planned memory of one rank in bytes, on the device unless stated otherwise."""

    most: dict[str, int]
    """Peak of each kind alone."""
    at_peak: dict[str, int]
    """Bytes of each kind at the moment of the overall peak."""
    moment: str
    """Moment of the overall peak, such as ``update``."""
    beside_weights: int
    """Peak of training, changes of phase included, minus the weights that are loaded when it begins."""
    host: Mapping[str, int]
    """Bytes of each kind that the engine keeps in host memory."""
    files: int
    """Bytes that the engine keeps in files."""

    @property
    def peak(self) -> int:
        """Return the peak bytes of tensors on the device."""
        return sum(self.at_peak.values())

    @property
    def fixed_moment(self) -> str | None:
        """Return the moment of the overall peak if no smaller micro batch would lower it, else None."""
        return self.moment if self.moment in _FIXED_MOMENTS else None


def memory_by_kind(engine: EngineMemory, trace: Trace, streamed: int, fill_ratio: float | None) -> Memory:
    """Add the engine's memory to that of a micro batch in the prefix, in forward and backward, and in the update.

    Args:
        engine: memory that the engine holds.
        trace: trace of the micro batch.
        streamed: bytes of prefix weights that are on the device only while their block computes.
        fill_ratio: if the prefix is cached and freed before the engine is built, the tokens of a batch of the pass
            that fills the cache, as a multiple of the micro batch's tokens; None if the prefix stays.
    """
    empty = dict.fromkeys(KINDS, 0)
    weights = {"prefix weights": engine.prefix_weights, "suffix weights": engine.suffix_weights}
    loaded = weights if fill_ratio is None else weights | {"prefix weights": 0}
    fixed = empty | loaded | {"masters": engine.masters, "moments": engine.moments}
    at_peak = trace.peak({"gradients": engine.share})
    always = engine.buffers + engine.scratch
    training = {
        "forward and backward": {
            **fixed, **at_peak, "gradients": engine.accumulated + at_peak["gradients"],
            "workspace": at_peak["workspace"] + always,
        },
        "update": fixed | {"gradients": engine.update_gradients, "workspace": engine.scratch},
    }  # fmt: skip
    if engine.handed:
        training["change of phase"] = fixed | {"workspace": engine.handed}
    if fill_ratio is None:
        workspace = trace.most_in_prefix + streamed + always
        moments = training = training | {"prefix": fixed | {"gradients": engine.accumulated, "workspace": workspace}}
    else:
        workspace = int(fill_ratio * trace.most_in_prefix) + streamed
        moments = training | {"first pass": empty | weights | {"workspace": workspace}}
    most = weights | {
        "masters": engine.masters, "moments": engine.moments,
        "gradients": max(
            engine.accumulated + int(engine.share * trace.most("gradients")), engine.update_gradients
        ),
        "activations": trace.kept("activations"),
        "logits": trace.most("logits"),
        "workspace": max(trace.most("workspace") + always, workspace, engine.handed),
    }  # fmt: skip
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    beside = max(sum(kinds.values()) for kinds in training.values()) - sum(loaded.values())
    return Memory(most, moments[moment], moment, beside, engine.host, engine.files)


def checkpoint_bytes(spec: EngineSpec, tensors: TensorSizes) -> int:
    """Return the bytes of a checkpoint over all ranks: fp32 master and moments of each trained element.

    Low-bit moments are saved twice: in their own format, and in float32 for engines of another layout.
    """
    stored = 0 if spec.optimizer == "adamw" else unpartitioned_moments(spec.optimizer, tensors)
    return 12 * tensors.total + stored

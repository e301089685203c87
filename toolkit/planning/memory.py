"""Add up bytes by kind on one rank: what an engine holds, and what a micro batch adds at its worst moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.planning.engine_memory import EngineMemory, EngineSpec, TensorSizes, unpartitioned_moments
from toolkit.planning.trace import Trace

KINDS = (
    "prefix weights", "suffix weights", "masters", "moments", "gradients", "activations", "logits", "workspace",
)  # fmt: skip
"""Uses of memory, from what stays to what comes and goes."""


@dataclass(frozen=True)
class Memory:
    """Hold the bytes on one rank, of the device where no place is said."""

    most: dict[str, int]
    """Of each kind, the most that is held at once."""
    at_peak: dict[str, int]
    """Of each kind, what is held at the moment when most is held in all."""
    moment: str
    """When that is."""
    beside_weights: int
    """The most that training adds to the weights that are there when it begins."""
    host: Mapping[str, int]
    """By kind, what the engine keeps in the host's memory."""
    files: int
    """What the engine keeps in files."""

    @property
    def peak(self) -> int:
        """Return the most bytes of tensors at once."""
        return sum(self.at_peak.values())


def memory(engine: EngineMemory, trace: Trace, streamed: int, fill: float | None) -> Memory:
    """Add what the engine holds to what a micro batch allocates in the prefix, in forward and backward, in the update.

    Args:
        engine: held whatever the micro batch.
        trace: of the micro batch.
        streamed: bytes of weights that blocks of the prefix have on the device only while they compute.
        fill: tokens of a batch of the first pass, as a multiple of the micro batch's, where the prefix is cached: it
            runs before there is an engine, and is gone when there is one. None where it stays.
    """
    weights = {"prefix weights": engine.prefix_weights, "suffix weights": engine.suffix_weights}
    here = weights if fill is None else weights | {"prefix weights": 0}
    fixed = here | {"masters": engine.masters, "moments": engine.moments}
    top = trace.peak({"gradients": engine.share})
    training = {
        "forward and backward": fixed | {
            "gradients": engine.accumulated + top["gradients"], "activations": top["activations"],
            "logits": top["logits"], "workspace": top["workspace"] + engine.buffers + engine.scratch,
        },
        "update": fixed | _only("gradients", engine.update_gradients) | {"workspace": engine.scratch},
    }  # fmt: skip
    if fill is None:
        workspace = trace.most_in_prefix + streamed + engine.buffers + engine.scratch
        moments = training = training | {
            "prefix": fixed | _only("gradients", engine.accumulated) | {"workspace": workspace}
        }
    else:
        workspace = int(fill * trace.most_in_prefix) + streamed
        moments = training | {"first pass": weights | _only("workspace", workspace) | {"masters": 0, "moments": 0}}
    most = weights | {
        "masters": engine.masters, "moments": engine.moments,
        "gradients": max(
            engine.accumulated + int(engine.share * trace.most("gradients")), engine.update_gradients
        ),
        "activations": trace.kept("activations"),
        "logits": trace.most("logits"),
        "workspace": max(trace.most("workspace") + engine.buffers + engine.scratch, workspace),
    }  # fmt: skip
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    beside = max(sum(kinds.values()) for kinds in training.values()) - sum(here.values())
    return Memory(most, moments[moment], moment, beside, engine.host, engine.files)


def _only(kind: str, size: int) -> dict[str, int]:
    """Return the bytes of what comes and goes, where only one kind is there."""
    return dict.fromkeys(("gradients", "activations", "logits", "workspace"), 0) | {kind: size}


def checkpoint_bytes(spec: EngineSpec, tensors: TensorSizes) -> int:
    """Return the bytes of a checkpoint over all ranks: a float32 master and two moments of each trained element.

    Moments that are kept in fewer bits are there twice: as they are stored, and in float32 for any other layout.
    """
    stored = 0 if spec.optimizer == "adamw" else unpartitioned_moments(spec.optimizer, tensors)
    return 12 * sum(tensors.trained) + stored

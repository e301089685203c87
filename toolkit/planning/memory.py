"""Bytes by kind on one rank: what an engine holds, and what a micro batch adds at its worst moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.planning.engine_memory import EngineSpec, Standing, Tensors, whole_moments
from toolkit.planning.trace import Trace

KINDS = (
    "prefix weights", "suffix weights", "masters", "moments", "gradients", "activations", "logits", "workspace",
)  # fmt: skip
"""What memory is spent on, from what stays to what comes and goes."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, of the device where no place is said."""

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
        """The most bytes of tensors at once."""
        return sum(self.at_peak.values())


def memory(held: Standing, rehearsal: Trace, lent: int, fill: float | None) -> Memory:
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
    return Memory(most, moments[moment], moment, beside, held.host, held.files)


def _only(kind: str, size: int) -> dict[str, int]:
    """What comes and goes, where only one kind is there."""
    return dict.fromkeys(("gradients", "activations", "logits", "workspace"), 0) | {kind: size}


def checkpoint_bytes(spec: EngineSpec, tensors: Tensors) -> int:
    """Size of a checkpoint's shards over all ranks: a float32 master and two moments of each trained element.

    Moments that are kept in fewer bits are there twice: as they are stored, and in float32 for any other layout.
    """
    stored = 0 if spec.optimizer == "adamw" else whole_moments(spec.optimizer, tensors)
    return 12 * sum(tensors.trained) + stored

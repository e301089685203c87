"""Read a checkpoint: the trained tensors for inference and export, all of its state for a run that resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from toolkit.checkpoint import rng
from toolkit.checkpoint.base_identity import TO_COMPUTE, UNKNOWN_PARTS, differences
from toolkit.checkpoint.delta import Base, Delta, mask_difference, read_mask_and_base
from toolkit.checkpoint.manifest import damaged
from toolkit.checkpoint.optimizer_shards import OptimizerShards
from toolkit.checkpoint.state import CheckpointState, fingerprint_differences, read_state
from toolkit.mask.layer_mask import LayerMask
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError

log = logging.getLogger("frostline")


class Checkpoint:
    """An opened checkpoint. The caller has verified it (``toolkit.checkpoint.manifest.verify``).

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: CheckpointState = read_state(path)
        try:
            self.mask, self.base = read_mask_and_base(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, [f"mask.json or base.json cannot be read ({type(error).__name__}: {error})"]) from None
        self.shards = OptimizerShards(path, self.state.step, self.state.ranks, self.mask)

    def delta(self) -> Delta:
        """Return the trained tensors as float32, memory-mapped copy-on-write."""
        tensors = {tensor.name: self.shards.master(tensor.name).view(tensor.shape) for tensor in self.mask.trainable}
        return Delta(tensors, self.mask, self.base)

    def require_fit(self, mask: LayerMask, base: Base, fingerprints: Mapping[str, str], order: str) -> None:
        """Refuse to resume a run with another mask, model, data, tokenizer, template or schedule.

        A changed generation config is logged: what trains does not depend on it.

        All arguments are this run's. ``mask`` holds the tensors that it trains up to the checkpoint's step; ``order``
        is the SHA-256 of its row order in the checkpoint's epoch.

        Raises:
            CheckpointError: the checkpoint does not fit; lists all differences.
        """
        faults = []
        if difference := mask_difference(self.mask, mask):
            faults.append(f"it was trained with another mask: {difference}")
        now = {**fingerprints, "base": base.sha256}
        if difference:  # the schedule's fingerprint covers the mask, and would be listed a second time
            now["schedule"] = self.state.fingerprints.get("schedule", "")
        faults += fingerprint_differences(self.state, now, order)
        own = base.identity or {}
        faults += [f"of the base model {change}" for change in differences(self.base.identity, own, TO_COMPUTE)]
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise CheckpointError(
                f"{self.path} does not fit this run:\n{listed}\n"
                "Restore what changed; or start a new run with another --output.dir, from these weights alone with "
                f"--model.delta {self.path}"
            )
        for change in differences(self.base.identity, own, ("generation_config",)):
            log.warning("of the base model %s; sample answers may differ from earlier ones", change)
        if self.base.identity is None:
            log.info("%s", f"{self.path}: {UNKNOWN_PARTS}")

    def restore_generators(self, world: World) -> None:
        """Restore this rank's random number generators; a rank that the checkpoint lacks keeps its own."""
        path = self.path / rng.rng_name(world.rank, self.state.ranks)
        if path.is_file():
            try:
                rng.restore(json.loads(path.read_text(encoding="utf-8")), world.device)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
                raise damaged(self.path, [f"{path.name} cannot be read ({type(error).__name__}: {error})"]) from None

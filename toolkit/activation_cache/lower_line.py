"""Fill the cache of a frost line from that of a lower one: the blocks between the two compute, those below do not.

``hidden[b]`` is a function of ``hidden[a]`` for a < b. Where a run's rows are cached at line a and everything else is
the same, its first pass begins there. So runs of several frost lines compute each block once a row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from toolkit.activation_cache.namespace import NAMESPACE_FILE, Namespace, bytes_of
from toolkit.activation_cache.policy import namespaces_of, open_store, prefix_fingerprints
from toolkit.activation_cache.store import ActivationStore
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import collate
from toolkit.data.rows import Rows
from toolkit.models.load import LoadedModel
from toolkit.models.quirks import has_experts
from toolkit.runtime.distributed import World
from toolkit.runtime.paths import read_regular
from toolkit.split.exactness import continues_exactly
from toolkit.split.prefix import Prefix

log = logging.getLogger("frostline")

_OWN_OF_A_LINE = ("boundary", "weights")
"""What two frost lines of one model differ by, of all that ``prefix_fingerprints`` names."""
_MOST_BYTES = 2**20

Line = tuple[int, dict[str, str]]
"""A frost line and its ``prefix_fingerprints``."""


@dataclass(frozen=True)
class LowerLine:
    """Hidden states at a lower frost line, which the rest of a prefix continues from."""

    boundary: int
    store: ActivationStore
    samples: int
    """Number of samples that it holds, of those that the run's own line lacks."""

    @property
    def saved(self) -> int:
        """Return how many runs of a block on a sample it saves."""
        return self.samples * self.boundary

    def read(self, keys: Sequence[str], device: torch.device) -> list[torch.Tensor] | None:
        """Return the hidden states [T, hidden_size] of some samples; None if one of them is not there."""
        rows = []
        for key in keys:
            if (row := self.store.peek(key)) is None:
                return None
            rows.append(row.to(device))
        return rows


def cached_lines_below(
    loaded: LoadedModel, boundary: int, settings: PrefixConfig, store: ActivationStore, world: World
) -> list[Line]:
    """Return the lower frost lines that something is cached of, by the computation of ``store`` but for the line.

    Every rank calls it, before the weights below ``boundary`` are stored otherwise.
    """
    return world.on_main(lambda: list(_lines_below(loaded, boundary, settings, store.namespace, world.device)))


@contextmanager
def best_lower_line(
    lines: Sequence[Line], settings: PrefixConfig, model: PreTrainedModel, prefix: Prefix, store: ActivationStore,
    samples: Rows, world: World,
) -> Iterator[LowerLine | None]:  # fmt: skip
    """Open that of the ``cached_lines_below`` whose states save most of filling ``store``; None if there is none.

    One row of each of two lengths is run from its tokens, and again from its states at the lower line. Both must give
    the same bits; else the log says why the first pass begins at the tokens.
    """
    lacking = samples.take(np.flatnonzero(store.lacking(samples.keys)))
    best = None
    for boundary, fingerprints in lines if len(lacking) else ():
        namespace = Namespace(fingerprints, store.namespace.width, store.namespace.dtype)
        if namespace.sha256 not in {directory.name for directory in namespaces_of(settings)}:
            continue  # nodes may have separate disks
        opened = open_store(settings, fingerprints, model, world)
        line = LowerLine(boundary, opened, int((~opened.lacking(lacking.keys)).sum()))
        best, other = (line, best) if line.saved > (best.saved if best else 0) else (best, line)
        if other is not None:
            other.store.close()
    if best is None:
        yield None
        return
    try:
        if reason := _obstacle(best, model, prefix, store, lacking, world):
            log.info("activation cache: block %d has states in it, but %s; the first pass begins at the tokens",
                     best.boundary, reason)  # fmt: skip
            yield None
        else:
            log.info(
                "activation cache: the first pass of %d of %d missing samples begins at block %d, whose states are in "
                "it", best.samples, len(lacking), best.boundary,
            )  # fmt: skip
            yield best
    finally:
        best.store.close()


def _obstacle(
    line: LowerLine, model: PreTrainedModel, prefix: Prefix, store: ActivationStore, lacking: Rows, world: World
) -> str | None:
    """Return why a first pass cannot begin at a lower line, as a phrase; None if it can."""
    if has_experts(model.config):
        return "a mixture of experts rounds by what else is in a batch"
    new = bytes_of(int(lacking.lengths.sum()), len(lacking), store.namespace.width, store.namespace.dtype)
    if store.available_bytes() < new:
        return "there is no room for it beside them"
    of_two_lengths = np.unique(lacking.lengths, return_index=True)[1][:2]  # so that one row is padded
    batch = collate([lacking[int(at)] for at in of_two_lengths], pad_id=0).to(world.device)
    if not continues_exactly(prefix, line.boundary, batch):
        return "this model gives other bits from them than from the tokens"
    return None


def _lines_below(
    loaded: LoadedModel, boundary: int, settings: PrefixConfig, namespace: Namespace, device: torch.device
) -> Iterator[Line]:
    """Yield each lower line that has a directory and is of the same computation, the weights included."""
    own = _without_line(json.loads(namespace.text))
    for directory in namespaces_of(settings):
        described: Any = None
        with suppress(OSError, ValueError, RecursionError):
            described = json.loads(read_regular(directory / NAMESPACE_FILE, _MOST_BYTES))
        if _without_line(described) != own:
            continue
        line = described["identity"].get("boundary")
        if not isinstance(line, str) or not line.isdecimal() or not 0 < int(line) < boundary:  # 0: embeddings alone
            continue
        fingerprints = prefix_fingerprints(loaded, int(line), settings, device)
        if Namespace(fingerprints, namespace.width, namespace.dtype).sha256 == directory.name:
            yield int(line), fingerprints


def _without_line(described: Any) -> dict[str, Any] | None:
    """Return what a namespace's file describes, without what the frost line decides; None for another file."""
    identity = described.get("identity") if isinstance(described, dict) else None
    if not isinstance(identity, dict):
        return None
    return {**described, "identity": {key: value for key, value in identity.items() if key not in _OWN_OF_A_LINE}}

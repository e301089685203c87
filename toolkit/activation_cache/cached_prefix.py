"""Cache the prefix: ``hidden[b]`` of every sample is computed once and read from disk from then on.

A frozen prefix without dropout is a pure function of a sample's token ids, so the hidden states that enter the frost
line can be kept (AutoFreeze, arXiv 2102.01386; Egeria, arXiv 2201.06227). Once every sample of a run is kept, the
prefix itself is released.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from toolkit.activation_cache.lower_line import LowerLine
from toolkit.activation_cache.namespace import sample_key
from toolkit.activation_cache.read_ahead import HiddenAhead, HiddenReader
from toolkit.activation_cache.shard import SHARD_BYTES
from toolkit.activation_cache.store import ActivationStore
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.data.layout import lay_out, unpad
from toolkit.data.rows import Rows
from toolkit.runtime import signals
from toolkit.runtime.distributed import World
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.prefix import Prefix

log = logging.getLogger("frostline")

FILL_TOKENS, CPU_FILL_TOKENS = 4096, 512
"""Tokens, padding included, of a batch that fills the cache, on a GPU and on a CPU; enough for efficient products."""
STREAMED_FILL_TOKENS = {"model": 26_000, "int8": 13_000, "nf4": 6_500}
"""The same on a GPU to which the prefix's weights are streamed, by their precision.

A token takes 2 operations for each weight and a bfloat16 weight is 2 bytes, so computing and copying take the same time
at as many tokens as the operations of a second by the bytes of a second: 650e12 / 25e9."""


class CachedPrefix:
    """Returns the hidden states that ``Prefix`` does, and runs it only for samples that the store lacks.

    ``load`` loads the prefix if a sample has to be computed after all, ``load_offloaded`` for generation, with its
    weights left in their files. Hidden states go to the device of ``world``.
    """

    def __init__(
        self,
        prefix: Prefix | None,
        load: Callable[[], Prefix],
        load_offloaded: Callable[[], Prefix],
        store: ActivationStore,
        world: World,
    ) -> None:
        self.prefix = prefix
        """The prefix; None if it is not loaded or has been released."""
        self._load = load
        self._load_offloaded = load_offloaded
        self._offloaded: Prefix | None = None
        self.store = store
        self._world = world
        self._reported_counts = (0, 0)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, T, hidden_size] that enter block b, zeros at padding."""
        if isinstance(batch.hidden, HiddenAhead) and (hidden := batch.hidden.take(self.store)) is not None:
            return hidden
        stored = [self.store.read(key) for key in _keys(batch.examples)]
        missing = [example for example, row in zip(batch.examples, stored, strict=True) if row is None]
        computed = self._run_prefix(missing) if missing else []
        if missing:
            self.store.write({key: row.cpu() for key, row in zip(_keys(missing), computed, strict=True)})
        device, remaining = self._world.device, iter(computed)
        rows = [next(remaining) if row is None else row.to(device, non_blocking=True) for row in stored]
        return lay_out(rows, batch)

    def stored_or_random(self, batch: Batch) -> torch.Tensor:
        """Return stored hidden states, and normal random ones for samples without; the prefix never runs.

        For the trial of packing, which compares two layouts of the same states; a sample's are the same each time, and
        no hit or miss is counted.
        """
        width, dtype, device = self.store.namespace.width, self.store.namespace.dtype, self._world.device
        rows = []
        for example, key in zip(batch.examples, _keys(batch.examples), strict=True):
            row = self.store.peek(key)
            if row is None:
                generator = torch.Generator().manual_seed(int(key[:15], 16))
                row = torch.randn(len(example), width, generator=generator).to(dtype)
            rows.append(row.to(device))
        return lay_out(rows, batch)

    def prefetch(self, examples: Sequence[Example]) -> None:
        """Read the hidden states of these samples into memory in the background."""
        self.store.prefetch(_keys(examples))

    def fill(self, examples: Sequence[Example], tokens: int = FILL_TOKENS, lower: LowerLine | None = None) -> None:
        """Compute and store what the store lacks, in large batches, shared among the ranks; every rank calls it.

        A batch of which a ``lower`` line holds all samples begins there, the others at their tokens. On a GPU a batch
        has up to ``tokens`` tokens, padding included, on a CPU ``CPU_FILL_TOKENS``. Batches are made of all samples,
        not of the missing ones, and do not depend on the number of ranks: a run that was interrupted and started again
        stores the same bits, and so does one that begins at a lower line.

        Raises:
            StopRequested: a signal came; what was computed is stored, and the next run goes on from there.
        """
        distinct = Rows.of(examples).distinct()
        distinct = distinct.take(distinct.longest_first())
        tokens = CPU_FILL_TOKENS if self._world.device.type == "cpu" else tokens
        starts = np.fromiter(_starts_by_length(distinct.lengths, tokens), np.int64)
        batches = np.stack([starts, np.append(starts[1:], len(distinct))], axis=1)
        self._compute_missing(distinct, batches[self._world.rank :: self._world.size], lower)
        self._world.barrier()
        self._world.raise_if_stopping()
        self.store.refresh()
        if not self.store.statistics.failed:  # another node may have stored what is still missing on a disk of its own
            self._compute_missing(distinct, batches, lower)
            self._world.raise_if_stopping()

    def _compute_missing(self, samples: Rows, batches: np.ndarray, lower: LowerLine | None) -> None:
        """Run the prefix on those batches of which the store lacks a sample, and store the missing samples.

        ``batches`` are [batches, 2]: start and end of each among ``samples``.
        """
        lacking = np.zeros(len(samples), bool)
        for start, end in batches:
            lacking[start:end] = True
        lacking[lacking] = self.store.lacking(samples.take(np.flatnonzero(lacking)).keys)
        incomplete = [(start, end) for start, end in batches if lacking[start:end].any()]
        pending: dict[str, torch.Tensor] = {}
        with ProgressBar("first pass", sum(int(end - start) for start, end in incomplete), "row", brief=True) as bar:
            for start, end in incomplete:
                if signals.stop_requested():  # this rank's signal; ``fill`` then agrees on it with all ranks
                    break
                batch = list(samples[start:end])
                rows = zip(_keys(batch), lacking[start:end], self._run_prefix(batch, lower), strict=True)
                pending |= {key: row.cpu() for key, is_missing, row in rows if is_missing}
                if sum(row.nbytes for row in pending.values()) >= SHARD_BYTES:
                    self.store.write(pending)
                    pending = {}
                bar.advance(len(batch))
            if pending:
                self.store.write(pending)

    def release(self, examples: Sequence[Example]) -> bool:
        """Release the prefix if the store holds all ``examples``; return True if it is not loaded any more."""
        if self.prefix is not None and not self.store.lacking(Rows.of(examples).keys).any():
            self.prefix = None
        return self.prefix is None

    def offloaded_prefix(self) -> Prefix:
        """Return the prefix for generation; once released, one that loads a block's weights only while it computes."""
        if self.prefix is not None:
            return self.prefix
        if self._offloaded is None:
            self._offloaded = self._load_offloaded()
        return self._offloaded

    def hit_rate(self) -> float | None:
        """Return the cache hit rate of this rank since the last call; None if nothing was requested."""
        statistics = self.store.statistics
        now = statistics.hits, statistics.misses
        hits, misses = (count - before for count, before in zip(now, self._reported_counts, strict=True))
        self._reported_counts = now
        return hits / (hits + misses) if hits + misses else None

    def close(self) -> str:
        """Close the store; return what it did, as a line for the log."""
        self.store.close()
        return self.store.summary()

    def _run_prefix(self, examples: list[Example], lower: LowerLine | None = None) -> list[torch.Tensor]:
        """Run the prefix on one batch, loaded again if it was released; return each sample's [T, hidden_size].

        It begins at the ``lower`` line if that holds all of them.
        """
        if self.prefix is None:
            log.warning("the activation cache lacks samples that it held; loading the prefix again to compute them")
            self.prefix = self._load()
        batch = collate(examples, pad_id=0)
        with explain_out_of_memory("the first pass, which fills the activation cache", batch.shape_text):
            batch = batch.to(self._world.device)
            if lower is not None and (rows := lower.read(_keys(examples), self._world.device)) is not None:
                return unpad(self.prefix.forward_from(lower.boundary, lay_out(rows, batch), batch), batch)
            return unpad(self.prefix(batch), batch)


def prefetch_cached(
    current_prefix: Callable[[], HiddenStates | None], steps: Iterable[list[Batch]]
) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step unchanged, and prefetch their hidden states from the cache.

    ``current_prefix`` returns the prefix, which can change during an epoch; None without one.
    """
    for micro_batches in steps:
        prefix = current_prefix()
        if isinstance(prefix, CachedPrefix):
            prefix.prefetch([example for batch in micro_batches for example in batch.examples])
        yield micro_batches


def read_ahead(
    current_prefix: Callable[[], HiddenStates | None], steps: Iterable[list[Batch]], reader: HiddenReader
) -> Iterator[list[Batch]]:
    """Yield the micro batches of each step; on a GPU, ``reader`` brings their cached hidden states there meanwhile.

    ``current_prefix`` is that of ``prefetch_cached``.
    """
    for micro_batches in steps:
        prefix = current_prefix()
        if isinstance(prefix, CachedPrefix):
            store = prefix.store
            micro_batches = [reader.announce(batch, store) for batch in micro_batches]
        else:
            reader.clear()  # of a phase before, whose prefix was cached
        yield micro_batches


def _starts_by_length(longest_first: np.ndarray, tokens: int) -> Iterator[int]:
    """Yield where each batch of up to ``tokens`` tokens, padding included, begins among lengths in falling order."""
    start = 0
    while start < len(longest_first):
        yield start
        start += max(1, tokens // int(longest_first[start]))


def _keys(examples: Iterable[Example]) -> list[str]:
    return [sample_key(example.token_ids) for example in examples]


HiddenStates = Prefix | CachedPrefix
"""Either prefix: maps a batch to its ``hidden[b]``."""

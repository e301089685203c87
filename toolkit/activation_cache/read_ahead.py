"""Read the hidden states of coming micro batches to the GPU while it computes.

A thread fills page-locked buffers from the store's mapped files, and copies them on a stream of its own. The step then
finds its hidden states on the device. On a CPU there is nothing to copy, and the step reads the files itself.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from toolkit.activation_cache.namespace import sample_key
from toolkit.activation_cache.store import ActivationStore
from toolkit.data.batches import Batch
from toolkit.data.layout import lay_out_into
from toolkit.runtime.page_locked import Arriving, staged_copies

AHEAD = 2
"""Micro batches whose hidden states are on their way or wait on the device, beside those in use."""


@dataclass(eq=False)
class HiddenAhead:
    """Hidden states of a micro batch that a reader reads ahead; the batch carries it."""

    reader: HiddenReader
    store: ActivationStore
    batch: Batch
    """The micro batch, on the host."""
    arriving: Future[Arriving | None] | None = None
    """None until it is its turn; its result is None if the store lacks a sample."""

    def take(self, store: ActivationStore) -> torch.Tensor | None:
        """Return the hidden states [B, T, hidden_size] on the device, once; None if ``store`` has to be read instead.

        Micro batches are taken in the order of their announcement; those before this one can be taken no more.
        """
        return self.reader.take(self) if store is self.store else None


class HiddenReader:
    """Reads ahead for one consumer, ``AHEAD`` micro batches at a time; a context manager.

    On a device that is the host it does nothing, and ``announce`` returns what it is given.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = staged_copies(device)
        self._coming: deque[HiddenAhead] = deque()
        self._lock = threading.Lock()  # announced in the thread that makes batches, taken in the one that trains
        self._executor: ThreadPoolExecutor | None = None
        if self._copies is not None:  # page-locked memory belongs to the context of the thread's GPU
            self._executor = ThreadPoolExecutor(1, "frostline-hidden", lambda: torch.cuda.set_device(device))

    def __enter__(self) -> HiddenReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()
        if self._executor is not None:
            self._executor.shutdown()

    def announce(self, batch: Batch, store: ActivationStore) -> Batch:
        """Return the micro batch, whose hidden states in ``store`` are read ahead from now on."""
        if self._executor is None:
            return batch
        ahead = HiddenAhead(self, store, batch)
        with self._lock:
            self._coming.append(ahead)
            self._start()
        return replace(batch, hidden=ahead)

    def take(self, ahead: HiddenAhead) -> torch.Tensor | None:
        """Return the hidden states; see ``HiddenAhead.take``."""
        with self._lock:
            if ahead not in self._coming:
                return None
            while self._coming[0] is not ahead:  # those that a change of phase left behind
                self._coming.popleft()
            self._start()
            self._coming.popleft()
            self._start()
        assert ahead.arriving is not None  # it was first in the queue
        arriving, ahead.arriving = ahead.arriving.result(), None  # the batch is to keep nothing of it alive
        if arriving is None:
            return None
        namespace, lengths = ahead.store.namespace, ahead.batch.lengths
        ahead.store.count_reads(len(lengths), 0, sum(lengths) * namespace.width * namespace.dtype.itemsize)
        return arriving.wait()

    def clear(self) -> None:
        """Drop what was announced and is not taken."""
        with self._lock:
            for ahead in self._coming:
                if ahead.arriving is not None:
                    ahead.arriving.cancel()
            self._coming.clear()

    def _start(self) -> None:
        """Let the thread read the first ``AHEAD`` of those that come; the lock is held."""
        for ahead in islice(self._coming, AHEAD):
            if ahead.arriving is None and self._executor is not None:
                ahead.arriving = self._executor.submit(self._read, ahead)

    def _read(self, ahead: HiddenAhead) -> Arriving | None:
        """Read and copy the hidden states of a micro batch; None if the store lacks a sample of it."""
        assert self._copies is not None
        batch, namespace = ahead.batch, ahead.store.namespace
        rows = []
        for example in batch.examples:
            row = ahead.store.peek(sample_key(example.token_ids))
            if row is None:
                return None
            rows.append(row)
        shape = (*batch.input_ids.shape, namespace.width)
        return self._copies.new(shape, namespace.dtype, partial(lay_out_into, rows=rows, batch=batch))

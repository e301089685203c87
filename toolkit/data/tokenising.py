"""Tokenise the rows of a source into the columns of a token store, in worker processes where that pays."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from toolkit.config.schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.data.examples import Encoder, Example
from toolkit.data.retrieval import passages_for
from toolkit.data.row_notes import RowNote, RowNoter
from toolkit.data.sources import Row
from toolkit.data.token_file import EncodedRows
from toolkit.runtime import signals
from toolkit.runtime.errors import FrostlineError
from toolkit.tasks.choose import columns_of, find_task
from toolkit.tasks.sample import RowFaultError
from toolkit.tasks.task import Task

CHUNK_ROWS = 256
"""Rows that are encoded at a time, and sent to a worker."""
SERIAL_ROWS = 8192
"""Rows that are encoded in this process before workers are started, each of which imports transformers for over 2 s."""
_MOST_WORKERS = 32
_CHUNKS_AHEAD = 2
"""Chunks in flight for each worker."""
_WORKER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from toolkit.data.tokenising import work; work()"


@dataclass(frozen=True)
class Encoding:
    """All that the tokens of a row depend on beside the row; sent to worker processes."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...] = ()
    """End-of-text tokens that the model's config files name."""
    rendering: Rendering = Rendering()
    columns: tuple[str, ...] = ()
    """Columns of the source's first rows, by which ``data.task: auto`` takes a task."""
    origin: str = "the rows"
    """Where the rows come from, for messages."""
    task_key: str = "data.task"
    """What names the task, for messages."""

    def task(self) -> Task:
        """Return the task; raises as ``choose_task``."""
        return find_task(self.config, self.columns, origin=self.origin, key=self.task_key)

    def encoder(self) -> Encoder:
        """Build the encoder; raises as ``Encoder``."""
        return Encoder(self.tokenizer, self.config.max_length, self.ends, self.rendering)


class RowEncoder:
    """Encodes rows in this process; raises as ``Encoding.task`` and ``Encoding.encoder``."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoder, self._task, self._noter = encoding.encoder(), encoding.task(), RowNoter(encoding.config)
        self._with_passages = passages_for(encoding.config, self._task)

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode rows, and list those that cannot be used with their faults.

        Raises:
            DataError: a row lacks the column that rows are drawn by.
        """
        examples: list[Example] = []
        bad: list[tuple[str, str]] = []
        notes: list[RowNote] = []
        for row in rows:
            origin = self._noter.origin(row.origin)
            try:
                if row.fault:
                    raise RowFaultError(row.fault)
                values, identifiers = self._noter.masked(row.values)
                parts = self._encoder.encode_all(self._task.read(self._with_passages(values)))
            except RowFaultError as fault:
                bad.append((origin, self._noter.fault(str(fault))))
                continue
            examples += [replace(part, origin=origin) for part in parts]
            note = self._noter.note(row.values, identifiers)
            notes += [note, *[replace(note, identifiers={}, continues=True)] * (len(parts) - 1)]
        return EncodedRows.of(examples, bad, notes)


def source_columns(rows: Iterator[Row]) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Return the columns of the first rows, and all rows again."""
    first = list(islice(rows, CHUNK_ROWS))
    return tuple(columns_of(row.values for row in first)), chain(first, rows)


def encode_all(rows: Iterable[Row], encoding: Encoding) -> Iterator[EncodedRows]:
    """Yield all rows in order, encoded; those after the first ``SERIAL_ROWS`` by worker processes.

    Raises:
        DataError: no task fits the rows, or the chat template cannot be used.
        StopRequested: a signal came; no worker is left.
        FrostlineError: a worker failed.
    """
    chunks = _chunks(rows)
    encoder = RowEncoder(encoding)
    for chunk in islice(chunks, SERIAL_ROWS // CHUNK_ROWS):
        _raise_if_stopping()
        yield encoder.encode(chunk)
    rest = next(chunks, None)
    if rest is None:
        return
    with _workers(encoding) as encode:
        pending: deque[Future[EncodedRows]] = deque()
        for chunk in chain([rest], chunks):
            _raise_if_stopping()
            pending.append(encode(chunk))
            if len(pending) > _CHUNKS_AHEAD * worker_count():
                yield pending.popleft().result()
        while pending:
            _raise_if_stopping()
            yield pending.popleft().result()


def worker_count() -> int:
    """Return the number of worker processes: one for each CPU that this process may use."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def work() -> None:
    """Encode chunks of rows that come on the standard input until it ends; the body of a worker process.

    The process ends with its parent, however that ends: its input ends then.
    """
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    try:
        encoding: Encoding = pickle.load(source)
        encoder = RowEncoder(encoding)
        while True:
            rows = pickle.load(source)
            try:
                answer: Any = encoder.encode(rows)
            except FrostlineError as error:
                answer = error
            pickle.dump(answer, target, pickle.HIGHEST_PROTOCOL)
            target.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


class _Worker:
    """A process that encodes chunks of rows; not multiprocessing's, which imports the user's script again."""

    def __init__(self, encoding: bytes) -> None:
        environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", _WORKER, json.dumps(sys.path)]
        # A signal to the whole process group is the parent's to answer: it then ends the workers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*signals.SIGNALS, signal.SIGINT})
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._encoding: bytes | None = encoding

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a chunk of rows, and wait for the result."""
        try:
            if self._encoding is not None:
                self._input.write(self._encoding)
                self._encoding = None
            pickle.dump(rows, self._input, pickle.HIGHEST_PROTOCOL)
            self._input.flush()
            answer = pickle.load(self._output)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise FrostlineError(
                f"a process that tokenises rows ended with code {code}, as for want of memory; its own message is "
                "above. Start the same command again"
            ) from None
        if isinstance(answer, FrostlineError):
            raise answer
        return cast(EncodedRows, answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._output.close()
        with suppress(BrokenPipeError):
            self._input.close()


@contextmanager
def _workers(encoding: Encoding) -> Iterator[Any]:
    """Start the workers, and give the body a function that encodes a chunk in the first that is free.

    They have ended when the body has, for whatever reason.
    """
    count, content = worker_count(), pickle.dumps(encoding, pickle.HIGHEST_PROTOCOL)
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def encode(chunk: Sequence[Row]) -> EncodedRows:
        worker = free.get()
        try:
            return worker.encode(chunk)
        finally:
            free.put(worker)

    with ExitStack() as stack:
        executor = ThreadPoolExecutor(count, thread_name_prefix="frostline-tokenise")
        stack.callback(executor.shutdown, cancel_futures=True)  # after the workers, which lets its threads end
        for _ in range(count):
            worker = _Worker(content)
            stack.callback(worker.close)
            free.put(worker)
        yield lambda chunk: executor.submit(encode, chunk)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield lists of ``CHUNK_ROWS`` rows, the last of which may be shorter."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        yield chunk


def _raise_if_stopping() -> None:
    """Raise StopRequested if this rank was asked to stop; ``load_rows`` then agrees on it with all ranks."""
    if signals.stop_requested():
        raise signals.StopRequested

"""Send a run's curves to wandb and mlflow, from rank 0 and beside the training, which goes on where they fail."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Literal, Protocol

from toolkit.checkpoint.metrics_log import METRICS_FILE
from toolkit.runtime.redact import redact
from toolkit.runtime.signals import StopRequested

log = logging.getLogger("frostline")

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended; a stopped one can be resumed."""

_CLOSE_SECONDS = 40
"""How long the end of a run waits for what a tracker has not taken yet."""


@dataclass(frozen=True)
class Point:
    """Values of some curves after a step."""

    step: int
    values: Mapping[str, float]
    time_ms: int
    """When they were logged, in milliseconds since 1970."""


class Tracker(Protocol):
    """One run at one tracker; any method may raise what the tracker's library raises."""

    run_id: str
    """Its id, by which it is continued."""
    place: str
    """Where to look at it, for the log."""

    def send(self, points: Sequence[Point]) -> None:
        """Send points in the order of their steps."""

    def finish(self, outcome: Outcome) -> None:
        """Send what is left, and set the state of the run."""


class Trackers:
    """The trackers of a run; a context manager that sets the state of the run at each of them when it ends.

    Without any, as on other ranks than 0, it does nothing.
    """

    def __init__(self) -> None:
        self._senders: list[_Sender] = []
        self.stopped = False
        """Set to True if a signal stopped the run."""

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        is_stopped = self.stopped or (kind is not None and issubclass(kind, StopRequested | KeyboardInterrupt))
        self.close("stopped" if is_stopped else "failed" if kind is not None else "finished")

    def add(self, name: str, tracker: Tracker, sent: Collection[tuple[str, int]]) -> None:
        """Send to another tracker, which has the points of some groups of curves and steps already."""
        log.info("%s: %s", name, redact(tracker.place))
        self._senders.append(_Sender(name, tracker, sent))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the finite ones of some values, all of one group (``train/…`` or ``eval/…``); waits for nothing."""
        point = Point(step, {name: v for name, v in values.items() if math.isfinite(v)}, time.time_ns() // 10**6)
        for sender in self._senders:
            sender.put(point)

    def close(self, outcome: Outcome) -> None:
        """Wait a while for what is left to be sent, and say what was not."""
        for sender in self._senders:
            sender.close(outcome)
        self._senders.clear()


class _Sender:
    """Send to one tracker from a thread of its own, until it fails; then warn once and send no more."""

    def __init__(self, name: str, tracker: Tracker, sent: Collection[tuple[str, int]]) -> None:
        self._name, self._tracker, self._sent = name, tracker, sent
        self._queue: SimpleQueue[Point | None] = SimpleQueue()
        self._outcome: Outcome = "failed"
        self._last_step: int | None = None
        self._fault: str | None = None
        self._thread = Thread(target=self._work, daemon=True, name=f"frostline-{name}")
        self._thread.start()

    def put(self, point: Point) -> None:
        if point.values and self._fault is None and (group(point.values), point.step) not in self._sent:
            self._queue.put(point)

    def close(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._queue.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() and self._fault is None:
            self._fault = f"it has not answered for {_CLOSE_SECONDS} s"
        if self._fault is not None:
            after = (
                "has nothing of this start"
                if self._last_step is None
                else f"lacks what followed step {self._last_step}"
            )
            log.warning("%s %s (%s); %s has every number", self._name, after, self._fault, METRICS_FILE)

    def _work(self) -> None:
        """Send what is put until the end, then finish the run."""
        at_end = False
        while not at_end:
            points = [self._queue.get()]
            while not self._queue.empty():
                points.append(self._queue.get())
            at_end = points[-1] is None
            self._send([point for point in points if point is not None])
        try:
            self._tracker.finish(self._outcome)
        except Exception as error:  # whatever the tracker's library raises
            self._warn_once(error)

    def _send(self, points: Sequence[Point]) -> None:
        """Send points, unless earlier ones failed."""
        if not points or self._fault is not None:
            return
        try:
            self._tracker.send(points)
        except Exception as error:  # whatever the tracker's library raises
            self._warn_once(error)
        else:
            self._last_step = points[-1].step

    def _warn_once(self, error: Exception) -> None:
        if self._fault is None:
            self._fault = describe(error)
            log.warning("%s can no longer be written (%s); training goes on without it", self._name, self._fault)


def group(names: Iterable[str]) -> str:
    """Return the group of curves, ``train`` or ``eval``, of a row of ``metrics.jsonl`` or of one point's curves."""
    return "eval" if any(name.startswith("eval") for name in names) else "train"


def describe(error: Exception) -> str:
    """Return an error of a tracker's library in one line of at most 300 characters, without secrets."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"

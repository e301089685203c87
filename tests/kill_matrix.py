"""SIGKILL at every write of a checkpoint and of the activation cache, and at random moments; then the run goes on.

    python tests/kill_matrix.py               # all of it, with the count at the end
    python tests/kill_matrix.py --every 9     # each ninth point, and a ninth of the random moments

Each trial trains on two ranks until one or both of them kill themselves, starts the same command again, and compares
every loss, every float32 master and the files that are left with those of a run that nobody disturbed. Ranks are
forked from a process that has imported everything, so that a trial takes a second or two. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DS_LOG_LEVEL="error", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers import free_port, invocation, make_tiny_model, masters_of, metrics, tiny_flags  # noqa: E402

from toolkit.activation_cache.cached_prefix import CachedPrefix  # noqa: E402
from toolkit.checkpoint.saver import Saver  # noqa: E402
from toolkit.checkpoint.validation_score import ValidationScore  # noqa: E402
from toolkit.runtime import distributed  # noqa: E402
from toolkit.training import context  # noqa: E402
from toolkit.training.run import train_in_group  # noqa: E402

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "utime")
"""What changes a disk. A write is left half done."""
RANKS = 2
VICTIM = 4
"""The step whose checkpoint is written under fire; the one before it is removed afterwards."""
MISSED = "there was no such call"
"""A checkpoint is written in the background while steps go on: how many of their calls fall into that time varies."""
MOST_MISSED = 0.1
LIMIT = 120
"""Seconds after which a run counts as hanging."""
RUN = ("--mask.train", "norm", "head", "--train.max_steps", 6, "--output.save_every_steps", 2, "--output.keep", 1)
KINDS: dict[str, tuple[object, ...]] = {
    "checkpoint": ("--prefix.cache", "off"),
    "checkpoint in the background": ("--prefix.cache", "off", "--output.async_save", "true"),
    "validation": ("--prefix.cache", "off", "--data.validation", "0.25", "--output.evaluate_every_steps", 2),
    "cache": ("--prefix.cache", "on"),
    "random, torch": ("--prefix.cache", "on"),
    "random, zero-2": ("--prefix.cache", "off", "--ds", ROOT / "ds_configs" / "zero2.json"),
}


@dataclass(frozen=True)
class Trial:
    """One kill."""

    kind: str
    victims: tuple[int, ...]
    """Ranks that die."""
    when: float
    """The number of the call before which they die, or seconds after the start of a random one."""

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.victims))
        return f"{self.kind}, rank {ranks}, {'moment' if self.is_random else 'call'} {self.when:g}"

    @property
    def is_random(self) -> bool:
        return self.kind.startswith("random")


@contextlib.contextmanager
def under_fire(point: float, made: list[str]) -> Iterator[None]:
    """Count this process's calls that touch the disk, and die before the one numbered ``point``."""
    originals = {name: getattr(os, name) for name in CALLS}

    def patched(name: str) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            if len(made) >= point:
                if name == "write":
                    originals[name](args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, patched(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def aim(kind: str, point: float, made: list[str]) -> None:
    """Let the calls of the part that ``kind`` names be counted, and the process die at ``point``."""
    if kind == "cache":
        fill = CachedPrefix.fill

        def filled(self: CachedPrefix, *args: Any) -> None:
            with under_fire(point, made):
                fill(self, *args)

        CachedPrefix.fill = filled  # type: ignore[method-assign]
        return
    save, publish, record, fire = Saver.save, Saver._publish, Saver.record_score, contextlib.ExitStack()

    def saved(self: Saver, content: Any, validation_follows: bool = False) -> None:
        if content.state.step == VICTIM:
            fire.enter_context(under_fire(point, made))
        save(self, content, validation_follows)
        if self._executor is None and kind != "validation":
            fire.close()

    def recorded(self: Saver, step: int, score: ValidationScore) -> None:
        record(self, step, score)
        fire.close()  # the score is written and older checkpoints have gone

    def published(self: Saver) -> None:
        late = self._executor is not None and self._pending is not None and self._pending.step == VICTIM
        publish(self)
        if late:  # until here, so that the thread's calls are counted however fast it is
            fire.close()

    Saver.save, Saver._publish, Saver.record_score = saved, published, recorded  # type: ignore[method-assign]


class Range:
    """Where trials are fought: a model, and a reference for each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = make_tiny_model(folder / "model")
        self._references: dict[str, Path] = {}
        self.calls: dict[str, list[int]] = {}
        """By kind and rank, the number of calls of an undisturbed run."""
        self.seconds: dict[str, float] = {}

    def flags(self, kind: str, run: Path) -> list[str]:
        """Of the run in ``run``, whose cache is its own too."""
        cache = run.with_name(f"{run.name}-cache")
        return tiny_flags(self._model, run, *RUN, *KINDS[kind], "--prefix.cache_dir", cache)

    def start(self, kind: str, run: Path, point: float = float("inf"), victims: tuple[int, ...] = ()) -> list[int]:
        """Fork the ranks of a run; their process numbers."""
        port = free_port()
        children = []
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                self._be(rank, port, kind, run, point if rank in victims else float("inf"))
            children.append(child)
        return children

    def _be(self, rank: int, port: int, kind: str, run: Path, point: float) -> None:
        code = 1
        try:
            with (run.parent / f"{run.name}-rank{rank}.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(port)
            made: list[str] = []
            if not kind.startswith("random"):
                aim(kind, point, made)
            context.planners_of = lambda *_: ()  # the plan writes nothing here, and takes most of a short run's time
            given = invocation(*self.flags(kind, run))
            code = train_in_group(given, distributed.join_process_group(engine_needs_group=given.deepspeed is not None))
            (run.parent / f"{run.name}-calls{rank}.json").write_text(json.dumps(made))
            distributed.leave_process_group()
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(code)

    def reference(self, kind: str) -> Path:
        """The undisturbed run of a kind."""
        if kind not in self._references:
            run = self._folder / f"reference {kind}"
            began = time.monotonic()
            codes = finish(self.start(kind, run))
            self.seconds[kind] = time.monotonic() - began
            if codes != [0] * RANKS:
                raise SystemExit(f"the undisturbed run ended with {codes}: {logs(run)}")
            self.calls[kind] = [calls_of(run, rank) for rank in range(RANKS)]
            self._references[kind] = run
        return self._references[kind]

    def fight(self, trial: Trial) -> str | None:
        """One trial; what was wrong, or none."""
        reference = self.reference(trial.kind)
        try:
            return self._fought(trial, reference, self._folder / "trial")
        finally:  # also after a failure: the next trial must not find a run that is finished
            for path in self._folder.glob("trial*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _fought(self, trial: Trial, reference: Path, run: Path) -> str | None:
        if trial.is_random:
            children = self.start(trial.kind, run)
            time.sleep(trial.when)
            for victim in trial.victims:
                os.kill(children[victim], signal.SIGKILL)
            codes = finish(children)
        else:
            codes = finish(self.start(trial.kind, run, trial.when, trial.victims))
            if not any(codes[victim] == -signal.SIGKILL for victim in trial.victims):
                if codes == [0] * RANKS and all(calls_of(run, victim) <= trial.when for victim in trial.victims):
                    return MISSED
                return f"nobody was killed: {codes}, {logs(run)}"
        codes = finish(self.start(trial.kind, run))
        return f"the second start ended with {codes}: {logs(run)}" if codes != [0] * RANKS else differ(run, reference)


def finish(children: list[int]) -> list[int]:
    """Wait for all ranks; once one has failed the others are killed, as a launcher does. Their exit codes."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)
    return [codes[child] for child in children]


def calls_of(run: Path, rank: int) -> int:
    """The number of calls that a rank counted which ended by itself."""
    return len(json.loads((run.parent / f"{run.name}-calls{rank}.json").read_text()))


def logs(run: Path) -> str:
    """The end of what the ranks said."""
    return " | ".join(path.read_text()[-600:] for path in sorted(run.parent.glob(f"{run.name}-rank*.log")))


def differ(run: Path, reference: Path) -> str | None:
    """How a run that went on differs from one that was never disturbed."""
    for key in ("loss", "step", "eval_loss"):
        if metrics(run, key) != metrics(reference, key):
            return f"{key} {metrics(run, key)}, expected {metrics(reference, key)}"
    left, expected = (
        sorted((path.name, path.read_text() if path.is_file() else "") for path in (one / "checkpoints").iterdir())
        for one in (run, reference)
    )
    if left != expected:
        return f"left {left}, expected {expected}"
    found, right = (masters_of(one / "checkpoints" / expected[-1][0]) for one in (run, reference))
    return None if all(torch.equal(found[name], right[name]) for name in right) else "other masters"


def trials(ground: Range, every: int, moments: int) -> Iterator[Trial]:
    """All of them; with ``every`` above 1 a part that is spread over all kinds."""
    number = 0
    for kind in KINDS:
        ground.reference(kind)
        if kind.startswith("random"):
            for index in range(moments // 2):
                dice = random.Random(f"{kind} {index}")
                victims = dice.choice([(0,), (1,), (0, 1)])
                found = Trial(kind, victims, round(dice.uniform(0, ground.seconds[kind]), 3))
                number += 1
                if number % every == 0:
                    yield found
            continue
        counts = ground.calls[kind]
        for victims in ((0,), (1,), (0, 1)):
            for point in range(max(counts[victim] for victim in victims)):
                number += 1
                if number % every == 0:
                    yield Trial(kind, victims, point)


def main() -> int:
    """Fight all trials, print what was wrong and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each so manieth trial; default: 1")
    parser.add_argument("--moments", type=int, default=40, help="random moments; default: 40")
    given = parser.parse_args()
    right, missed = Counter[str](), Counter[str]()
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="frostline-kills-") as folder:
        ground = Range(Path(folder))
        for trial in trials(ground, given.every, given.moments):
            wrong = ground.fight(trial)
            if wrong == MISSED:
                missed[trial.kind] += 1
                print(f"{trial}: {MISSED}", flush=True)
            elif wrong:
                failed.append(f"{trial}: {wrong}")
                print(failed[-1], flush=True)
            else:
                right[trial.kind] += 1
                print(f"{trial}: right", flush=True)
    for kind, count in right.items():
        print(f"{kind}: {count} right" + (f", {missed[kind]} not fought: {MISSED}" if missed[kind] else ""))
        if missed[kind] > max(1, MOST_MISSED * count) or (missed[kind] and kind != "checkpoint in the background"):
            failed.append(kind)
    print(f"{right.total()} of {right.total() + len(failed)} kills survived, losses bit-identical")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

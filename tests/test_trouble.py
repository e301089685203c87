"""A loss or gradient that is not finite: every engine skips the step alike, names its rows, and stops in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import plant
from helpers import ENGLISH, invocation, masters_of, metrics, run_ranks, set_up, tiny_flags, train

from toolkit.commands.cli import run_command
from toolkit.data.batches import epoch_order, step_batches
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, DiskError, FrostlineError, TrainingStoppedError
from toolkit.training.guard import SpikeDetector
from toolkit.training.step import train_step


def fail_at(monkeypatch: pytest.MonkeyPatch, *steps: int, kind: str = "loss") -> None:
    """Plant a fault in these steps of the next run, counted from 1."""
    count = iter(range(1, 10**6))

    def faulty(batches: Any, prefix: Any, engine: Any, world: World, status: Any) -> Any:
        with plant(engine, kind if next(count) in steps else None):
            return train_step(batches, prefix, engine, world, status)

    monkeypatch.setattr("toolkit.training.trainer.train_step", faulty)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def masters(run: Path) -> dict[str, torch.Tensor]:
    name = (run / "checkpoints" / "latest").read_text()
    return masters_of(run / "checkpoints" / name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_leaves_weights_moments_and_step_counts_and_moves_the_schedule(
    tiny_model: Path, tmp_path: Path, dtype: str, kind: str
) -> None:
    flags = ("--train.gradient_accumulation_steps", 2, "--model.dtype", dtype, "--prefix.cache", "off")
    trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path, *flags)), World())
    order = epoch_order(trainer.context.batch_plan.rows, 42, 0)
    rates = []
    for step, batches in enumerate(
        step_batches(trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id)
    ):
        if step == 3:
            with plant(trainer.state.engine, kind):
                before = state(trainer.state.engine)
                outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, World())
            assert outcome.skipped
            assert all(torch.equal(a, b) for a, b in zip(before, state(trainer.state.engine), strict=True))
        else:
            before = state(trainer.state.engine)
            outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, World())
            assert not outcome.skipped
            assert step == 0 or any(
                not torch.equal(a, b) for a, b in zip(before, state(trainer.state.engine), strict=True)
            )
        rates.append(outcome.learning_rate)
    assert len(set(rates)) == len(rates) == 10, "the rate of each step is its own, also after the skipped one"
    assert trainer.state.engine._optimizer.by_name[trainer.state.mask.names[0]].updates == 9  # type: ignore[attr-defined]


def state(engine: Any) -> list[torch.Tensor]:
    kept = engine._optimizer.by_name.values()
    held = [tensor for own in kept for tensor in (*own.read().values(), torch.tensor(own.updates))]
    return [tensor.clone() for tensor in (*held, *engine._suffix.parameters())]


def test_a_run_goes_on_after_bad_steps_and_names_their_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    run = tmp_path / "run"
    fail_at(monkeypatch, 3, 4, 7)
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 10)) == 0
    rows = rows_of(run)
    assert [row["step"] for row in rows if row["skipped"]] == [3, 4, 7]
    assert [(row["loss"], row["grad_norm"]) for row in rows if row["skipped"]] == [(None, None)] * 3
    assert all(row["loss"] is not None for row in rows if not row["skipped"])
    order = epoch_order(20, 42, 0)
    bad = next(line for line in said if line.startswith("step 7 is skipped"))
    assert f"rank 0: {ENGLISH} line {order[6] + 1} (loss nan)" in bad
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert all(tensor.isfinite().all() for tensor in masters(run).values())


def test_too_many_bad_steps_in_a_row_end_the_run_and_the_last_good_checkpoint_stays(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    often = ("--output.save_every_steps", 2, "--train.max_skipped_steps", 2)
    flags = tiny_flags(tiny_model, run, "--train.max_steps", 10, *often)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, 6, 7, kind="gradient")
        with pytest.raises(TrainingStoppedError) as stopped:
            train(*flags)
    message = str(stopped.value)
    assert "2 steps in a row were skipped, the last of them step 7 (loss " in message
    assert "step-00000006, is kept" in message
    assert f"rank 0: {ENGLISH} line {epoch_order(20, 42, 0)[6] + 1}" in message
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006"
    assert train(*flags) == 0
    assert metrics(run, "skipped") == [step in (3, 6) for step in range(1, 11)]


def test_weights_that_an_update_ruined_never_replace_the_last_good_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 leaves the masters finite and every later loss NaN."""
    run = tmp_path / "run"
    flags = tiny_flags(tiny_model, run, "--output.save_every_steps", 1, "--train.learning_rate", "1e30")
    with pytest.raises(TrainingStoppedError, match=r"give no finite loss .*step-00000001, is kept.*learning_rate"):
        train(*flags)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001"
    assert all(tensor.abs().max() < 100 for tensor in masters(run).values())


def test_a_loss_spike_is_reported_with_its_rows_and_changes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    losses = iter([*[2.0 + 0.1 * (i % 5) for i in range(18)], 9.0, 2.0])
    monkeypatch.setattr("toolkit.training.guard.SpikeDetector.spiked", spiked_by(losses))
    assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.epochs", 1)) == 0
    spikes = [line for line in said if "spikes above" in line]
    assert len(spikes) == 1
    assert spikes[0].startswith("step 19: loss ")
    assert f"rank 0: {ENGLISH} line {epoch_order(20, 42, 0)[18] + 1}" in spikes[0]
    assert not any(metrics(tmp_path / "run", "skipped"))


def spiked_by(losses: Iterator[float]) -> Any:
    original = SpikeDetector.spiked
    return lambda self, loss: original(self, next(losses))


@pytest.mark.parametrize(("error", "waits"), [(TrainingStoppedError, True), (DataError, True), (DiskError, False)])
def test_what_all_ranks_raise_is_printed_once_and_what_one_rank_raises_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[FrostlineError], waits: bool
) -> None:
    def fails() -> int:
        raise error("no")

    waited: list[float] = []
    monkeypatch.setattr("toolkit.commands.cli.time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(fails) == error.exit_code
    assert len(waited) == waits, "rank 1 leaves rank 0's launcher the time to end it"
    assert "error [rank 1]: no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "loss", "is_spike"),
    [
        ([2.0] * 15, 99.0, False),  # too few to tell
        ([2.0] * 16, 2.5, False),
        ([2.0] * 16, 2.7, True),
        ([1.0, 3.0] * 20, 6.0, False),  # as noisy as ever
        ([1.0, 3.0] * 20, 12.0, True),
        ([2.0] * 30 + [50.0] * 5, 60.0, True),  # earlier spikes hide nothing
        ([9.0] * 64 + [2.0] * 64, 5.0, True),  # the far past does not count
        ([2.0] * 16, 0.1, False),
    ],
)
def test_what_counts_as_a_spike(before: list[float], loss: float, is_spike: bool) -> None:
    detector = SpikeDetector()
    for value in before:
        detector.spiked(value)
    assert (detector.spiked(loss) is not None) is is_spike


@pytest.mark.distributed
def test_every_zero_stage_skips_as_one_process_does_whichever_rank_is_at_fault(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.epochs", 1, "--prefix.cache", "off")
    ran = run_ranks("tests/trouble_worker.py", output, *flags)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    alone = [(step["loss"], step["learning_rate"]) for step in one_process(tiny_model, tmp_path)]
    for name, result in json.loads(output.read_text()).items():
        steps = result["steps"]
        assert [step["loss"] is None for step in steps] == [index in (2, 3) for index in range(6)], name
        assert [step["unchanged"] for step in steps] == [index in (2, 3) for index in range(6)], name
        assert [step["learning_rate"] for step in steps] == pytest.approx([rate for _, rate in alone]), name
        if name != "zero2":  # in bfloat16
            here = [step["loss"] for step in steps if step["loss"] is not None]
            assert here == pytest.approx([loss for loss, _ in alone if loss is not None], abs=1e-5), name
        (first,), (second,) = steps[2]["rows"]
        assert f"rank 0: {first}; rank 1: {second} (loss nan)" in result["said"][0], name
        (first,), (second,) = steps[3]["rows"]
        assert result["said"][1].endswith(f"rank 0: {first}; rank 1: {second}"), name


def one_process(model: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The same rows and faults without DeepSpeed."""
    flags = ("--train.epochs", 1, "--train.gradient_accumulation_steps", 2, "--prefix.cache", "off")
    trainer = set_up(invocation(*tiny_flags(model, folder, *flags)), World())
    order = epoch_order(trainer.context.batch_plan.rows, 42, 0)
    batches_by_step = step_batches(
        trainer.context.dataset.train, order, trainer.context.batch_plan, trainer.context.pad_id
    )
    for step, batches in zip(range(6), batches_by_step, strict=False):
        with plant(trainer.state.engine, {2: "loss", 3: "gradient"}.get(step)):
            outcome = train_step(batches, trainer.state.prefix, trainer.state.engine, World())
        yield {"loss": None if outcome.skipped else outcome.loss, "learning_rate": outcome.learning_rate}

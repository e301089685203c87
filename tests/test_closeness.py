"""The bounds for bfloat16 runs let rounding pass, and no wrong gradient, however small the learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from closeness import FAULTS, assert_rounded_alike, planted
from helpers import ENGLISH, tiny_flags, train

from toolkit.runtime.distributed import World


def run(model: Path, directory: Path, rate: str, dealt: tuple[int, int] = (2, 2)) -> Path:
    """Ten steps of four rows, dealt as micro batches of so many rows, so many a step; every other answer is short."""
    micro, accumulation = dealt
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    for row in rows[::2]:
        row["LONG_ANSWER"] = row["LONG_ANSWER"][:8]
    data = directory.parent / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = tiny_flags(model, directory, "--model.dtype", "bfloat16", "--train.epochs", 2, "--mask.train", "last:2")
    flags += ["--data.path", str(data)]
    batches = ("--train.micro_batch_size", str(micro), "--train.gradient_accumulation_steps", str(accumulation))
    assert train(*flags, *batches, "--train.learning_rate", rate) == 0
    return directory


@pytest.fixture(scope="module", params=["1e-3", "1e-4"])
def right(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing wrong, in a directory with its learning rate's name."""
    return run(tiny_model, tmp_path_factory.mktemp("right") / request.param, request.param)


@pytest.mark.parametrize("faster", [False, True], ids=["bfloat16 gradients", "float32 gradients"])
@pytest.mark.parametrize("dealt", [(1, 4), (4, 1)])
def test_rounding_passes(
    right: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dealt: tuple[int, int], faster: bool
) -> None:
    monkeypatch.setattr("toolkit.training.gradient_choice.float32_is_faster", lambda: faster)
    monkeypatch.setattr("toolkit.training.gradient_choice.blocks_are_faster", lambda *_: faster)
    assert_rounded_alike(run(tiny_model, tmp_path / "run", right.name, dealt), right)


@pytest.mark.parametrize("fault", ["mean_of_means", "lost_micro_batch"])
def test_a_wrong_gradient_does_not(right: Path, tiny_model: Path, tmp_path: Path, fault: str) -> None:
    with planted(FAULTS[fault], World()):
        wrong = run(tiny_model, tmp_path / "run", right.name)
    with pytest.raises(AssertionError, match="gradient norm"):
        assert_rounded_alike(wrong, right)

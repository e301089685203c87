"""Answers need a pass a token: frozen weights are loaded once for all of them, to where they fit, and said where."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import FakeGpu
from helpers import invocation, set_up, tiny_flags, train
from transformers import GenerationMixin

from toolkit.config.schema import ModelConfig
from toolkit.frozen import residence
from toolkit.inference.generation import can_complete_together, complete_together
from toolkit.models.disk_offload import OnDisk
from toolkit.models.load import load
from toolkit.runtime.distributed import World
from toolkit.runtime.free_memory import RESERVE
from toolkit.training.answer_pace import AnswerPace
from toolkit.training.trainer import Trainer
from toolkit.training.validation import sample_answers, without_dropout

TOKENS = 5
ANSWERS = ("--data.validation", "0.25", "--output.sample_answers", "3", "--output.sample_tokens", str(TOKENS))
UPPER = ("--mask.train", "last:2", "head", "--prefix.placement", "disk")
FREED, STREAMED = ("--prefix.cache", "on"), ("--prefix.cache", "off")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of a frozen block was read from a file."""
    counts, read = Counter[str](), OnDisk.read

    def watched(self: OnDisk) -> torch.Tensor:
        if ".mlp." in self.name or ".self_attn." in self.name:
            counts[self.name] += 1
        return read(self)

    monkeypatch.setattr(OnDisk, "read", watched)
    return counts


def trainer(model: Path, *flags: str) -> Trainer:
    return set_up(invocation(*tiny_flags(model, Path("unused"), *ANSWERS, *UPPER, *flags)), World())


def answers(trainer: Trainer) -> list[str]:
    with without_dropout(trainer.state):
        return [shown.answer for shown in sample_answers(trainer.context, trainer.state)]


class Frozen:
    """The offloaded weights of a run, and their bytes."""

    def __init__(self, run: Trainer) -> None:
        prefix: Any = run.state.prefix
        self.units = prefix.frozen.units
        self.whole_bytes = sum(unit.whole_bytes for unit in self.units if unit.is_block)


def leave(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Let each look at free memory find so much of it."""
    seen = iter(free)
    monkeypatch.setattr(residence, "free_bytes", lambda _: next(seen))


@pytest.mark.parametrize("cached", [FREED, STREAMED], ids=["freed", "streamed"])
def test_all_answers_of_a_validation_read_the_frozen_files_once(
    tiny_model: Path, reads: Counter[str], said: list[str], monkeypatch: pytest.MonkeyPatch, cached: tuple[str, str]
) -> None:
    run = trainer(tiny_model, *cached)
    first = answers(run)
    reads.clear()
    assert answers(run) == first
    assert set(reads.values()) == {1}
    assert len(reads) == 4 * 7, "four frozen blocks of seven matrices"
    assert any(line.endswith(" MiB in memory") for line in said)
    reads.clear()
    leave(monkeypatch, 0)
    assert answers(run) == first
    assert min(reads.values()) >= TOKENS, "without memory each token takes a pass over the files"
    assert any("too large for the memory that is free" in line for line in said)


def test_a_run_reads_them_once_more_for_each_validation(tiny_model: Path, tmp_path: Path, reads: Counter[str]) -> None:
    counts = []
    for number in ("0", "3"):
        reads.clear()
        more = ("--train.max_steps", 4, "--output.evaluate_every_steps", 2, "--output.sample_answers", number)
        assert train(*tiny_flags(tiny_model, tmp_path / number, *ANSWERS, *UPPER, *STREAMED, *more)) == 0
        counts.append(reads["model.layers.1.mlp.up_proj.weight"])
    assert counts[1] - counts[0] == 2, "two validations, of three answers and five tokens each"


@pytest.mark.parametrize("precision", ["model", "int8"])
def test_a_gpu_with_room_computes_from_its_own_memory(
    tiny_model: Path, gpu: FakeGpu, reads: Counter[str], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    run = trainer(tiny_model, *STREAMED, "--prefix.precision", precision)
    leave(monkeypatch, 0, 0)
    streamed = answers(run)
    copies, size = gpu.counts["copies"], Frozen(run).whole_bytes
    leave(monkeypatch, size + RESERVE)
    assert answers(run) == streamed
    assert gpu.counts["copies"] == copies, "nothing is streamed"
    assert all(unit.kept is None and unit.flat is None for unit in Frozen(run).units), "it is free again"


def test_a_gpu_without_room_takes_them_from_page_locked_memory_and_answers_all_together(
    tiny_model: Path, gpu: FakeGpu, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tiny_model, *STREAMED)
    leave(monkeypatch, Frozen(run).whole_bytes + RESERVE)
    expected = answers(run)
    calls, generate = [], GenerationMixin.generate

    def watched(self: GenerationMixin, **given: Any) -> Any:
        calls.append(len(given["input_ids"]))
        return generate(self, **given)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    before, locked = gpu.counts.copy(), len(gpu.pinned)
    reads.clear()
    leave(monkeypatch, 0, 2**40)
    assert answers(run) == expected
    assert set(reads.values()) == {1}
    assert calls == [3]
    assert (gpu.counts - before)["copies"] == 4 * TOKENS, "four blocks a token, for all answers at once"
    assert (gpu.counts - before)["host waits"] == 0
    assert sum(gpu.pinned[locked:]) < 1.5 * Frozen(run).whole_bytes, "not rounded up, tensor by tensor"
    gpu.refuses = True
    leave(monkeypatch, 0, 2**40)
    assert answers(run) == expected, "refused, they are streamed from the files"


def test_prompts_that_are_answered_together_have_the_answers_that_they_have_alone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 9)]
    alone = [complete_together(model, tokenizer, [prompt], [0], 12)[0] for prompt in prompts]
    assert complete_together(model, tokenizer, prompts, [0], 12) == alone
    assert can_complete_together(model, prompts, 12)
    assert not can_complete_together(model, [*prompts, list(range(500))], 13), "512 positions leave that one 12"
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert not can_complete_together(model, prompts, 12), "a recurrent model reads the padding too"


@pytest.mark.parametrize(("epoch", "warns"), [(1000.0, 0), (100.0, 1)])
def test_answers_that_take_longer_than_an_epoch_are_announced_after_three_tokens(
    said: list[str], epoch: float, warns: int
) -> None:
    """The question takes 10 s, each token after it 2 s: of two answers of 51 tokens, 220 s."""
    ticks = iter([-9.0, -8.0, 0.0, 10.0, 12.0, 14.0, *range(100, 200)])
    pace = AnswerPace(2, 51, epoch, lambda: next(ticks))
    pace.begin()
    assert pace.token() == 1, "an answer of one token tells nothing"
    pace.begin()
    assert [pace.token() for _ in range(4)] == [1, 2, 3, 4]
    pace.begin()
    assert [pace.token() for _ in range(4)] == [1, 2, 3, 4]
    assert len(said) == warns
    if warns:
        assert said[0].startswith("sample answers may take 4 min, longer than an epoch (2 min); lower output.sample_")

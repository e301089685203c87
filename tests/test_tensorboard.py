"""What TensorBoard is given: curves that do not double, hparams, a picture, answers; and what a browser shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, invocation, metrics, run_script, set_up, tiny_flags, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServedAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from toolkit.activation_cache.cached_prefix import CachedPrefix
from toolkit.config.schema import ModelConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Encoder
from toolkit.inference.generation import complete_together
from toolkit.inference.open_model import open_model
from toolkit.mask.audit import AuditRow
from toolkit.mask.diagram import draw_mask
from toolkit.models.load import load
from toolkit.runtime.distributed import World
from toolkit.training import tensorboard_writer
from toolkit.training.monitor import Monitor, _cell
from toolkit.training.validation import sample_answers

SPEC = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "screenshot.py")
assert SPEC is not None
assert SPEC.loader is not None
screenshot = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(screenshot)


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that failed in its second epoch, four steps after its last checkpoint, and was started again."""
    folder = tmp_path_factory.mktemp("tensorboard")
    flags = tiny_flags(
        tiny_model, folder / "run", "--data.validation", "0.25", "--train.max_steps", 19,
        "--output.save_every_steps", 4, "--output.evaluate_every_steps", 6,
        "--output.sample_answers", 2, "--output.sample_tokens", 5,
        "--prefix.cache_dir", folder / "cache", "--output.keep", 9,
    )  # fmt: skip
    original = Monitor.evaluation

    def fail(self: Monitor, step: int, *values: Any) -> None:
        original(self, step, *values)
        if step == 18:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluation", fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(*flags)
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step-00000016"
    assert train(*flags) == 0
    return folder / "run"


def test_no_step_is_shown_twice_after_a_resume(run: Path) -> None:
    found = events(run)
    assert len(list((run / "tensorboard").iterdir())) == 2, "one file of each start"
    steps = {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert steps["train/loss"] == list(range(1, 20))
    assert steps["eval/loss"] == [6, 12, 15, 18, 19]
    assert steps["train/epoch_loss"] == [15, 19]
    assert all(own == sorted(set(own)) for own in steps.values())
    served = ServedAccumulator(str(run / "tensorboard"), tensor_size_guidance={"text": 0})
    served.Reload()
    texts = {tag: [event.step for event in served.Tensors(tag)] for tag in served.PluginTagToContent("text")}
    assert texts == {
        "recipe/text_summary": [0],
        "mask/text_summary": [0],
        "answers/text_summary": [6, 12, 15, 18, 19],
    }
    assert [event.step for event in found.Images("train/mask")] == [0]


def test_a_run_that_begins_anew_hides_what_came_before_its_first_checkpoint(tmp_path: Path) -> None:
    for _ in range(2):
        with Monitor(tmp_path, True, 5) as monitor:
            monitor.board.text("recipe", "a", 0)
    served = ServedAccumulator(str(tmp_path / "tensorboard"))
    served.Reload()
    assert len(served.Tensors("recipe/text_summary")) == 1


def test_the_first_page_has_the_story_in_two_groups(run: Path) -> None:
    assert set(events(run).Tags()["scalars"]) == {
        "eval/loss", "eval/perplexity", "train/loss", "train/epoch_loss", "train/learning_rate", "train/grad_norm",
        "train/tokens_per_second", "train/memory_peak_gib", "train/memory_planned_gib", "train/cache_hit_share",
        "train/trained_parameters",
    } | ({"train/moved_share"} if metrics(run, "moved_share") else set())  # fmt: skip
    found = events(run)
    planned = json.loads((run / "plan.json").read_text())["memory"]["peak"] / 2**30
    shown = [event.value for event in found.Scalars("train/memory_planned_gib")]
    assert shown == pytest.approx([planned] * 19, rel=1e-5)
    assert {event.value for event in found.Scalars("train/cache_hit_share")} == {1.0}


def test_runs_are_compared_by_hparams_in_the_run_itself(run: Path) -> None:
    assert [path.name for path in run.rglob("events.*") if path.parent != run / "tensorboard"] == []
    content = events(run).PluginTagToContent("hparams")
    data = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = data.session_start_info.hparams
    assert values["learning_rate"].number_value == 1e-3
    assert values["mask"].string_value == "last:4, head"
    assert (values["boundary"].number_value, values["batch"].number_value, values["ranks"].number_value) == (2, 1, 1)
    assert values["engine"].string_value == "local"
    assert values["optimizer"].string_value == "adamw"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} <= set(events(run).Tags()["scalars"])
    assert "_hparams_/session_end_info" in content


def test_the_shown_answers_are_those_of_the_trained_model(run: Path) -> None:
    text = events(run).Tensors("answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    opened = open_model(str(run), None, None)

    rows = load_dataset(opened.config.data, opened.loaded.tokenizer, 42).validation[:2]
    assert text.count("\n| ") == 3, "the header and two rows"

    ends = Encoder(opened.loaded.tokenizer, 2048).stop_ids()
    for row, line in zip(rows, text.splitlines()[-2:], strict=True):
        prompt, reference = row.token_ids[: row.answer_start], row.token_ids[row.answer_start :]
        (answer,) = complete_together(opened.loaded.model.eval(), opened.loaded.tokenizer, [prompt], ends, 5)
        decoded = opened.loaded.tokenizer.decode(list(reference), skip_special_tokens=True)
        assert line.endswith(f"| {_cell(decoded)} | {_cell(answer)} |")


@pytest.mark.parametrize("mask", [("last:2", "head"), ("head",), ("all",), ("embeddings",)], ids=str)
def test_a_joined_model_gives_the_logits_of_the_whole_one(tiny_model: Path, tmp_path: Path, mask: tuple[str]) -> None:
    flags = ("--mask.train", *mask, "--data.validation", "0.25", "--prefix.cache_dir", tmp_path / "cache")
    trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", *flags)), World())
    row = trainer.context.dataset.validation[0]
    ids = torch.tensor([list(row.token_ids)])
    released = isinstance(trainer.state.prefix, CachedPrefix)
    assert released == (mask not in (("all",), ("embeddings",)))
    prefix = (
        trainer.state.prefix.offloaded_prefix()
        if isinstance(trainer.state.prefix, CachedPrefix)
        else trainer.state.prefix
    )
    with torch.no_grad(), trainer.state.joined.with_prefix(prefix) as model:
        joined = model(ids).logits
        again = model(ids).logits
    whole = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32")).model.eval()
    with torch.no_grad():
        assert torch.equal(joined, whole(ids).logits)
    assert torch.equal(joined, again)
    if isinstance(trainer.state.prefix, CachedPrefix):
        assert trainer.state.prefix.prefix is None, "it stays let go"


def test_nothing_is_generated_unless_asked_for(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    trainer = set_up(invocation(*tiny_flags(tiny_model, tmp_path, "--data.validation", "0.25")), World())
    monkeypatch.setattr(CachedPrefix, "offloaded_prefix", None)
    assert sample_answers(trainer.context, trainer.state) == []


def test_other_ranks_write_nothing_and_rank_0_never_waits_for_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    with Monitor(tmp_path, False, 5) as monitor:
        monitor.board.text("recipe", "a", 0)
        monitor.board.image("train/mask", draw_mask([AuditRow("head", 1, 10, 10)]), 0)
        monitor.board.hparams({"seed": 1})
        monitor.board.finish()
    assert list(tmp_path.iterdir()) == []
    flushes: list[int] = []
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: flushes.append(1))
    shown = tensorboard_writer.TensorBoardWriter(tmp_path, 0)
    for step in range(50):
        shown.scalar("train/loss", 1.0, step)
    assert flushes == []
    shown.close()


def test_a_cell_of_the_table_holds_any_text() -> None:
    assert _cell("a | b\n*c* <d>") == r"a \| b \*c\* \<d\>"
    assert _cell("x" * 500).startswith("x" * 400 + " …")
    assert _cell("x" * 500 + "?", end=True).endswith("x?")


def test_the_picture_shows_trained_parts_above_the_frost_line() -> None:
    rows = [AuditRow("embeddings", 1, 10, 0), AuditRow("blocks 0–1", 2, 20, 0), AuditRow("block 2", 1, 10, 10)]
    image = draw_mask(rows)
    column = [image.getpixel((20, y)) for y in range(image.height)]
    trained, frozen, line = (0xE8, 0x74, 0x3B), (0xA8, 0xC8, 0xE8), (0x1F, 0x3B, 0x57)
    assert column.index(trained) < column.index(line) < column.index(frozen)


@pytest.mark.skipif(screenshot.browser() is None, reason="no chromium or chrome is installed")
def test_a_real_browser_shows_every_curve(run: Path, tmp_path: Path) -> None:
    result = run_script("docs/screenshot.py", run, tmp_path / "shot.png")
    assert result.returncode == 0, result.stderr
    assert "train/cache_hit_share" in result.stdout
    assert "eval/loss" in result.stdout
    assert 20_000 < (tmp_path / "shot.png").stat().st_size < 300_000

"""Whole runs with rows and added tokens: what is kept, resumed, exported, evaluated and begun from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import assert_learned_alike, back_to, checkpoint_of, logits, mask
from helpers import invocation, masters_of, metrics, run_here, run_ranks, set_up, tiny_flags, train
from row_runs import ADD, FULL, TOKENS, full_model, rows, rows_with_tokens
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.commands.export import export
from toolkit.inference.open_model import load_tokenizer_of, open_model
from toolkit.runtime.errors import UsageError

NEW = list(range(FULL, FULL + 2))
BOTH = mask(rows("embeddings", "head"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows_with_tokens(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module", params=["tied", pytest.param("apart", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_model(tmp_path_factory.mktemp(request.param) / "model", tied=request.param == "tied")


def flags_of(model: Path, run: Path, data: Path, *more: object) -> list[str]:
    common = ("--data.path", data, "--data.validation", "0.25", "--train.epochs", 2, "--mask.tied", "both")
    return tiny_flags(model, run, *common, *ADD, *more)


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps of the added rows alone."""
    folder = tmp_path_factory.mktemp("rows") / "run"
    assert train(*flags_of(model, folder, data, *BOTH)) == 0
    return folder


def tables_of(model: Any) -> list[torch.Tensor]:
    """The tables of a model, the same one twice if they are tied."""
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def test_only_the_rows_are_trained_and_stored(run: Path, model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tables = 1 if base.config.tie_word_embeddings else 2
    masters = masters_of(checkpoint_of(run))
    assert {tuple(tensor.shape) for tensor in masters.values()} == {(2, 32)}
    assert len(masters) == tables
    (shard,) = (checkpoint_of(run) / "optimizer").glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no iterator)
    assert stored == 3 * tables * 2 * 32, "masters and two moments of the rows"
    assert len(metrics(run)) == 30
    export(run, tmp_path / "export")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert after.config.vocab_size == FULL + 2
    assert after.config.tie_word_embeddings == base.config.tie_word_embeddings
    for name, tensor in base.state_dict().items():
        assert torch.equal(after.state_dict()[name][: len(tensor)], tensor), name
    for old, new, trained in zip(
        tables_of(base), tables_of(after), (*masters.values(), *masters.values()), strict=False
    ):
        assert new.shape == (FULL + 2, 32)
        assert torch.equal(new[NEW], trained)
        assert float((new[NEW] - old.mean(0)).abs().max()) > 1e-3


def test_every_form_of_the_run_has_its_validation_loss(run: Path, data: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    export(run, tmp_path / "delta", delta=True)
    losses = {}
    for source in (run, tmp_path / "model", tmp_path / "delta"):
        result = run_here("evaluate.py", source, "--data.path", data)
        assert result.returncode == 0, result.stderr
        losses[source] = json.loads(result.stdout.splitlines()[-1])["loss"]
    assert len(set(losses.values())) == 1
    held_out = json.loads(run_here("evaluate.py", run).stdout.splitlines()[-1])["loss"]
    assert held_out == pytest.approx(metrics(run, "eval_loss")[-1], abs=1e-6)
    for source in losses:
        result = run_here("generate.py", source, "--question", "<triage> Is it urgent?", "--max-new-tokens", 4)
        assert result.returncode == 0, result.stderr


def test_the_tokenizer_goes_with_the_run_and_its_exports(run: Path, model: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    text = "a <triage>b<urgent> c"
    before = AutoTokenizer.from_pretrained(model)
    own = load_tokenizer_of(open_model(str(run)).config.model)
    for folder in (tmp_path / "model", run / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text).input_ids
        assert ids == own(text).input_ids
        assert [token for token in ids if token >= FULL] == NEW
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, "an ordinary token is shown"
        assert tokenizer("plain text").input_ids == before("plain text").input_ids
        assert tokenizer.chat_template == before.chat_template


def test_a_run_goes_on_exactly_after_a_stop(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    flags = flags_of(model, tmp_path / "run", data, "--output.save_every_steps", 7, "--output.keep", 9, *BOTH)
    assert train(*flags) == 0
    back_to(tmp_path / "run", 7)
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == metrics(run)
    again, expected = masters_of(checkpoint_of(tmp_path / "run")), masters_of(checkpoint_of(run))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_run_begins_from_another_one_with_its_tokens_and_adds_more(
    run: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "model")
    export(run, tmp_path / "delta", delta=True)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    more = ("--data.path", data, "--mask.tied", "both", "--train.max_steps", 2)
    for source in (run, checkpoint_of(run), tmp_path / "delta"):
        flags = tiny_flags(model, tmp_path / "next", *more, "--model.delta", source, *BOTH)
        trainer = set_up(invocation(*flags))
        ids = {own.ids for own in trainer.state.mask.rows}
        assert ids == {tuple(NEW)}, "added also means those of the run before"
        assert max(trainer.context.dataset.train[0].token_ids) == FULL + 1
    flags = tiny_flags(model, tmp_path / "next", *more, "--model.delta", run, "--model.add_tokens", "<x>", *BOTH)
    assert train(*flags) == 0
    opened = open_model(str(tmp_path / "next"))
    assert opened.loaded.tokenizer.convert_tokens_to_ids([*TOKENS, "<x>"]) == [*NEW, FULL + 2]
    assert all(len(table) == FULL + 3 for table in tables_of(opened.loaded.model))
    assert opened.delta is not None
    flags = tiny_flags(model, tmp_path / "last", *more, "--model.delta", tmp_path / "next", *mask("last:1"))
    assert max(set_up(invocation(*flags)).context.dataset.train[0].token_ids) == FULL + 1
    assert expected.shape[-1] == FULL + 2
    result = run_here("evaluate.py", tmp_path / "next", "--data.path", data)
    assert result.returncode == 0, result.stderr


def test_the_plan_counts_the_rows(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    flags = flags_of(model, tmp_path / "run", data, *BOTH)
    planned = run_here("plan.py", *flags)
    assert planned.returncode == 0, planned.stderr
    assert "(2 rows train" in planned.stdout
    assert "16,064" in planned.stdout, "502 rows of 32"
    trainer = set_up(invocation(*flags))
    trained = sum(parameter.numel() for parameter in trainer.state.suffix.parameters() if parameter.requires_grad)
    assert trainer.state.plan.mask.parameters == trained
    saved = json.loads((run / "plan.json").read_text())
    again = json.loads(run_here("plan.py", *flags, "--json").stdout)
    for plan in (again, saved):  # a plan without a run is a GPU's, where the update has another workspace
        del plan["memory"]["peak"], plan["memory"]["most"]["workspace"], plan["memory"]["at_peak"]["workspace"]
    assert (again["memory"], again["disk"]) == (saved["memory"], saved["disk"])


def test_rows_of_the_head_alone_keep_the_whole_prefix_and_its_cache(model: Path, data: Path, tmp_path: Path) -> None:
    losses = {}
    for cache in ("on", "off"):
        more = ("--prefix.cache", cache, "--mask.tied", "untie", "--train.micro_batch_size", 2, *mask(rows("head")))
        assert train(*flags_of(model, tmp_path / cache, data, *more)) == 0
        losses[cache] = metrics(tmp_path / cache)
        trainer = set_up(invocation(*flags_of(model, tmp_path / "x", data, *more)))
        assert trainer.state.mask.boundary == trainer.state.mask.block_count
    assert losses["on"] == losses["off"]


def test_the_cache_knows_a_model_with_more_tokens(model: Path, data: Path, tmp_path: Path) -> None:
    """Under one cache directory: the same rows of data are other ids, and the embeddings another table."""
    shared = ("--prefix.cache_dir", tmp_path / "cache", "--mask.tied", "error", *mask("last:2"))
    plain = ("--data.path", data, "--data.validation", "0.25", "--train.epochs", 2, "--prefix.cache", "on", *shared)
    assert train(*tiny_flags(model, tmp_path / "without", *plain)) == 0
    losses = {}
    for cache in ("on", "off", "on again"):
        more = ("--prefix.cache", cache.split()[0], *shared)
        assert train(*flags_of(model, tmp_path / cache.replace(" ", "-"), data, *more)) == 0
        losses[cache] = metrics(tmp_path / cache.replace(" ", "-"))
    assert losses["on"] == losses["off"] == losses["on again"]
    assert losses["on"] != metrics(tmp_path / "without")


def test_rows_may_train_in_some_phases(model: Path, data: Path, tmp_path: Path) -> None:
    """They rest at what they learned, train on from there, and belong to one entry in all phases."""
    phases = [{"train": [rows("embeddings", "head")], "until_step": 4}, {"train": ["last:1"], "until_step": 7}]
    entry = rows("embeddings", "head", **{"from": FULL})
    flags = flags_of(model, tmp_path / "run", data, "--train.max_steps", 10, "--output.save_every_steps", 6)
    flags += ["--output.keep", "9", "--mask.schedule", *map(json.dumps, phases), *mask(entry)]
    assert train(*flags) == 0
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    export(tmp_path / "run", tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert float((logits(exported) - ours).abs().max()) < 1e-5 * float(ours.abs().max())
    whole = metrics(tmp_path / "run")
    back_to(tmp_path / "run", 6)
    assert train(*flags) == 0
    assert metrics(tmp_path / "run") == whole
    for train_next in ("embeddings", rows("embeddings", **{"from": FULL + 1})):
        more = flags_of(model, tmp_path / "x", data, "--train.max_steps", 10)
        more += ["--mask.schedule", json.dumps({**phases[0]}), *mask(train_next)]
        with pytest.raises(UsageError, match="the same entry in all phases"):
            set_up(invocation(*more))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_learn_what_one_process_learns_and_one_process_goes_on(
    stage: int, model: Path, data: Path, tmp_path: Path
) -> None:
    common = ["--train.epochs", 4, "--train.max_steps", 30, "--output.save_every_steps", 10, "--output.keep", 9]
    common += mask(rows("embeddings", "head"), "last:1/norms")
    alone = flags_of(model, tmp_path / "one", data, "--train.gradient_accumulation_steps", 2, *common)
    assert train(*alone) == 0
    flags = flags_of(model, tmp_path / "two", data, "--ds", f"ds_configs/zero{stage}.json", *common)
    result = run_ranks("launch/train.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_learned_alike(tmp_path / "two", tmp_path / "one")
    export(tmp_path / "two", tmp_path / "export")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    for old, new in zip(tables_of(base), tables_of(after), strict=True):
        assert torch.equal(new[:FULL], old)
    back_to(tmp_path / "two", 10)
    goes_on = flags_of(model, tmp_path / "two", data, "--train.gradient_accumulation_steps", 2, *common)
    assert train(*goes_on, "--resume-override") == 0
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), abs=1e-5)

"""What a model's config asks of training beside the loss, and what does not fit a model's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer, metrics, tiny_flags, tiny_llama, train
from transformers import AutoConfig, AutoModelForCausalLM

import toolkit
from toolkit.config.schema import RunConfig, TrainConfig
from toolkit.data.model_limits import padding_id
from toolkit.inference.answering import Answerer
from toolkit.inference.generation import complete_together
from toolkit.inference.open_model import open_model
from toolkit.models.quirks import training_notes
from toolkit.optim.groups import is_rate_always_zero
from toolkit.planning.engine_spec import engine_spec
from toolkit.planning.meta_model import meta_model
from toolkit.planning.planner import Planner
from toolkit.planning.workload import Workload
from toolkit.runtime.errors import DataError, ModelError
from toolkit.tasks.sample import ask

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "eos_token_id": 0,
    "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def make_model(directory: Path, kind: str, **values: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **values}))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_rows(path: Path, *answers: str) -> Path:
    rows = [{"QUESTION": f"Is it {n}?", "CONTEXTS": ["one", "two"], "LONG_ANSWER": a} for n, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_that_skips_blocks_in_training_is_trained_with_all_of_them(tmp_path: Path, said: list[str]) -> None:
    model = make_model(tmp_path / "opt", "opt", ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.9, dropout=0.0)
    assert train(*tiny_flags(model, tmp_path / "run", "--mask.train", "last:2", "--train.max_steps", "6")) == 0
    assert len(metrics(tmp_path / "run")) == 6
    (line,) = [line for line in said if "layerdrop" in line and "every block runs" in line]
    assert "layerdrop is 0.9" in line


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.5, "output_router_logits": True}, "router_aux_loss_coef 0.5"),
        ("jetmoe", {"aux_loss_coef": 0.25}, "aux_loss_coef 0.25"),
        ("dbrx", {"output_router_logits": True}, "moe_loss_weight 0.01"),
        ("qwen2_moe", {}, "router_aux_loss_coef 0.001"),
        ("llama", {}, ""),
        ("granitemoehybrid", {"num_local_experts": 0}, ""),
    ],
)
def test_a_router_loss_that_is_left_out_is_named_with_its_coefficient(
    kind: str, values: dict[str, Any], said: str
) -> None:
    notes = list(training_notes(AutoConfig.for_model(kind, **values)))
    assert len(notes) == bool(said)
    assert all(f"left out ({said})" in note for note in notes)


@pytest.mark.parametrize(
    ("steps", "warmup", "nothing"), [(1, 0.1, True), (1, 0.0, False), (2, 0.1, False), (3, 1.0, False)]
)
def test_only_a_run_whose_rate_is_zero_at_every_step_learns_nothing(steps: int, warmup: float, nothing: bool) -> None:
    assert is_rate_always_zero(TrainConfig(warmup_ratio=warmup), steps) == nothing


def test_a_run_of_one_step_at_rate_zero_is_warned_of(tiny_model: Path, tmp_path: Path, said: list[str]) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", "1")
    assert train(*flags) == 0
    assert [line for line in said if "one optimizer step, and the learning rate is 0" in line]
    said.clear()
    assert train(*tiny_flags(tiny_model, tmp_path / "more", "--train.max_steps", "2")) == 0
    assert not [line for line in said if "nothing will be learned" in line]


@pytest.fixture(scope="module")
def pad_beyond_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pad") / "model"
    tokenizer, model = make_tokenizer(), tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(directory)
    return directory


def test_padding_is_an_id_that_the_model_embeds(pad_beyond_table: Path, tmp_path: Path) -> None:
    loaded = open_model(str(pad_beyond_table)).loaded
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    assert loaded.tokenizer.pad_token_id == rows
    assert padding_id(loaded.tokenizer, loaded.model) == 0
    more = ("--train.micro_batch_size", "3", "--data.packing", "off", "--prefix.cache", "off", "--train.max_steps", "2")
    assert train(*tiny_flags(pad_beyond_table, tmp_path / "run", *more)) == 0
    path = str(write_rows(tmp_path / "rows.jsonl", "yes", "no, it is not"))
    alone, padded = (toolkit.evaluate(tmp_path / "run", path, batch_size=n).loss for n in (1, 2))
    assert padded == pytest.approx(alone, rel=1e-6)


@pytest.fixture(scope="module")
def few_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "max_position_embeddings": 64}
    return make_model(tmp_path_factory.mktemp("few") / "model", "gpt2", **sizes)


def test_rows_and_prompts_beyond_the_positions_are_one_error(few_positions: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "word " * 80)
    with pytest.raises(DataError, match="tokens, the model has 64 positions; name rows that fit"):
        toolkit.evaluate(few_positions, path)
    loaded = open_model(str(few_positions)).loaded
    with pytest.raises(DataError, match="the model has 64 positions, which leaves none for an answer"):
        Answerer(loaded, 2048, 4).answer(ask("why? " * 80, ()))


def test_an_answer_ends_with_the_positions_and_it_is_said(few_positions: Path, said: list[str]) -> None:
    loaded = open_model(str(few_positions)).loaded
    given = list(Answerer(loaded, 2048, 500).in_order(enumerate([ask("why?", ()), ask("how?", ())])))
    assert len(given) == 2
    assert said.count("answers end where the model's 64 positions do") == 1


def test_a_prompt_with_ids_that_the_model_does_not_embed_is_one_error(few_positions: Path) -> None:
    loaded = open_model(str(few_positions)).loaded
    with pytest.raises(ModelError, match="gives id 512, the model embeds 512 ids"):
        complete_together(loaded.model, loaded.tokenizer, [[1, 512]], [0], 4)


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_of_one_token_train_and_validate(tiny_model: Path, tmp_path: Path, rows: int) -> None:
    data = write_rows(tmp_path / "rows.jsonl", "A", "B", "C", "D", "E", "A")
    flags = ("--data.path", data, "--data.validation", "0.34", "--train.micro_batch_size", rows)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *flags)) == 0
    assert set(metrics(tmp_path / "run", "supervised_tokens")) <= {2.0, 2.0 * rows}
    assert len(metrics(tmp_path / "run", "eval_loss")) == 3


@pytest.mark.parametrize("lengths", [((20, 1),), ((20, 2), (30, 2)), ((300, 290), *((2, 1),) * 16)])
def test_any_number_of_supervised_tokens_can_be_planned(tiny_model: Path, lengths: tuple[tuple[int, int], ...]) -> None:
    config = RunConfig.model_validate({
        "model": {"name_or_path": str(tiny_model)}, "mask": {"tied": "untie"},
        "train": {"micro_batch_size": len(lengths)},
    })  # fmt: skip
    load = Workload(lengths[0][0], max(supervised for _, supervised in lengths), lengths, "these rows")
    planner = Planner(config, meta_model(config.model), load)
    for checkpointing in (False, True):
        plan = planner.plan(planner.variant(engine_spec(None, 1, 1), checkpointing))
        head = plan.flops.passes["suffix forward"].per_supervised
        assert head >= 2 * 512 * 32, "each supervised position costs a row of the head's product"

"""Rows in peft's form: its PeftModel loads them with our logits, and a run begins from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import logits, mask, save_of_zoo
from helpers import tiny_flags, train
from peft import LoraConfig, PeftModel, get_peft_model
from row_runs import ADD, FULL, TOKENS, full_model, rows, rows_with_tokens
from transformers import AutoModelForCausalLM

from toolkit.commands.export import export
from toolkit.config.schema import ModelConfig
from toolkit.inference.open_model import load_base, open_model
from toolkit.runtime.errors import CheckpointError, ModelError

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


LORA = {"lora": {"select": "last:1", "rank": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], [LORA]], ids=["rows", "rows and adapters"])
@pytest.mark.parametrize(("tied", "policy"), [(True, "both"), (True, "head_only"), (True, "untie"), (False, "both")])
def test_peft_loads_the_rows_and_a_run_begins_from_its_directory(
    tied: bool, policy: str, lora: list[Any], tmp_path: Path
) -> None:
    full_model(tmp_path / "model", tied)
    data = rows_with_tokens(tmp_path / "rows.jsonl")
    select = ("head",) if policy in ("head_only", "untie") else ("embeddings", "head")
    own = [rows(*select, ids=[7, 9]), rows(*select, **{"from": 20, "to": 22})]
    added: list[object] = []
    if policy == "both":
        own, added = [rows(*select), *own], list(ADD)
    flags = tiny_flags(tmp_path / "model", tmp_path / "run", "--data.path", data, "--mask.tied", policy, *added)
    assert train(*flags, "--train.max_steps", "8", *mask(*own, *lora)) == 0
    ours = logits(open_model(str(tmp_path / "run")).loaded.model)
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    if added:
        base.resize_token_embeddings(FULL + 2, mean_resizing=False)
    plain = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert float((loaded - ours).abs().max()) < 1e-5 * float(ours.abs().max())
    assert float((loaded[..., :FULL] - plain[..., :FULL]).abs().max()) > 1e-3
    config = ModelConfig(
        name_or_path=str(tmp_path / "model"), dtype="float32", delta=str(tmp_path / "adapter"),
        add_tokens=list(TOKENS) if added else [],
    )  # fmt: skip
    again = logits(load_base(config).model)
    assert float((again - ours).abs().max()) < 1e-5 * float(ours.abs().max())


@pytest.mark.slow
def test_rows_that_peft_would_load_otherwise_are_not_exported_in_its_form(tmp_path: Path) -> None:
    full_model(tmp_path / "tied", tied=True)
    data = rows_with_tokens(tmp_path / "rows.jsonl")
    for name, flags, message in (
        ("untied", ["--mask.tied", "untie", *mask(rows("embeddings", ids=[7]))], "peft would use them for both"),
        ("partly", ["--mask.tied", "both", *ADD, *mask(rows("embeddings", ids=[FULL]))], "did not all train"),
    ):
        common = tiny_flags(tmp_path / "tied", tmp_path / name, "--data.path", data, "--train.max_steps", 2)
        assert train(*common, *map(str, flags)) == 0
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / name, tmp_path / "adapter", adapter=True)


@pytest.mark.slow
def test_rows_of_a_head_with_a_bias_are_not_exported_in_pefts_form(tmp_path: Path) -> None:
    save_of_zoo("phi", tmp_path / "phi")
    flags = tiny_flags(tmp_path / "phi", tmp_path / "run", "--train.max_steps", 2, *mask(rows("head", ids=[7])))
    assert train(*flags) == 0
    with pytest.raises(CheckpointError, match="lm_head has a bias, which peft leaves out where rows of it train"):
        export(tmp_path / "run", tmp_path / "adapter", adapter=True)


def test_a_damaged_or_foreign_directory_with_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    settings = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(settings.read_text())
    for wrong, message in (
        ({"embed_tokens": [3]}, "holds 2 rows of base_model.model.model.embed_tokens"),
        ({"other": [3, 5]}, "its trainable_token_indices name None"),
        ({"embed_tokens": [3, 900]}, "does not fit"),
    ):
        settings.write_text(json.dumps({**values, "trainable_token_indices": wrong}))
        with pytest.raises(CheckpointError, match=message):
            load_base(ModelConfig(name_or_path=str(tiny_model), dtype="float32", delta=str(tmp_path / "adapter")))


def test_what_lacks_or_repeats_the_tokens_of_a_run_is_told_what_to_do(tmp_path: Path) -> None:
    full_model(tmp_path / "model")
    data = rows_with_tokens(tmp_path / "rows.jsonl")
    flags = ["--data.path", data, "--mask.tied", "both", *ADD, "--train.max_steps", 2]
    flags += mask(rows("embeddings", "head"), LORA)
    assert train(*tiny_flags(tmp_path / "model", tmp_path / "run", *flags)) == 0
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    model = ModelConfig(name_or_path=str(tmp_path / "model"), dtype="float32", delta=str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"row 501 of model.embed_tokens, which has 500 rows; .*model.add_tokens"):
        load_base(model)
    again = model.model_copy(update={"delta": str(tmp_path / "run"), "add_tokens": list(TOKENS)})
    with pytest.raises(ModelError, match=r"which the run of model\.delta has added"):
        load_base(again)

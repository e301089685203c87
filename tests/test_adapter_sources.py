"""A directory that peft wrote, and a model with code of its own, are opened by their names alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import logits, mask
from helpers import ENGLISH, tiny_flags, train
from peft import LoraConfig, PeftModel, get_peft_model
from remote_code import with_remote_code
from row_runs import ADD, full_model, rows, rows_with_tokens
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.inference.open_model import open_model
from toolkit.runtime.errors import CheckpointError, ModelError, UsageError

pytestmark = [  # peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

LORA = {"lora": {"select": "last:2", "rank": 4}}


def exported(model: Path, folder: Path, *flags: object, export: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A run of a few steps, and its adapters in peft's form."""
    assert train(*tiny_flags(model, folder / "run", "--train.max_steps", 4, *map(str, flags))) == 0
    trusted = "--trust-remote-code" in export
    return folder / "run", toolkit.export(folder / "run", folder / "adapter", adapter=True, trust_remote_code=trusted)


def losses(*sources: Path, data: Path = ENGLISH, **more: Any) -> list[float]:
    """The loss of each source on the same rows."""
    return [toolkit.evaluate(source, data, **more).loss for source in sources]


@pytest.mark.slow
def test_an_exported_adapter_has_the_loss_and_the_answers_of_its_run(tiny_model: Path, tmp_path: Path) -> None:
    run, adapter = exported(tiny_model, tmp_path, *mask(LORA, "head"))
    base, ours, theirs = losses(tiny_model, run, adapter)
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert abs(base - ours) > 1e-3
    assert toolkit.generate(adapter, "Is it safe?") == toolkit.generate(run, "Is it safe?")


def test_what_peft_wrote_is_opened_with_pefts_logits(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(again, str(tmp_path / "adapter")))
    opened = open_model(str(tmp_path / "adapter"), dtype="float32")
    assert opened.config.model.delta == str(tmp_path / "adapter")
    torch.testing.assert_close(logits(opened.loaded.model), expected)


@pytest.mark.slow
def test_added_tokens_and_the_chat_template_come_from_the_tokenizer_beside_the_adapter(tmp_path: Path) -> None:
    full_model(tmp_path / "model")
    data = rows_with_tokens(tmp_path / "rows.jsonl")
    flags = ("--data.path", data, "--mask.tied", "both", *ADD, *mask(rows("embeddings", "head"), LORA))
    run, adapter = exported(tmp_path / "model", tmp_path, *flags)
    ours, theirs = losses(run, adapter, data=data)
    assert theirs == pytest.approx(ours, abs=1e-6)
    template = open_model(str(run)).loaded.tokenizer.chat_template
    (adapter / "chat_template.jinja").write_text(f"{template} ")
    assert open_model(str(adapter)).loaded.tokenizer.chat_template == f"{template} "


@pytest.mark.slow
def test_a_base_that_moved_is_named_by_the_user(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    _, adapter = exported(base, tmp_path, *mask(LORA))
    (before,) = losses(adapter)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"base_model_name_or_path.*not an existing directory.*name it with --base"
    ):
        open_model(str(adapter))
    assert losses(adapter, base=tmp_path / "moved") == [before]
    with pytest.raises(ModelError, match="nowhere/at/all' is not an existing directory"):
        open_model(str(adapter), base="nowhere/at/all")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model .* name it with --base"),
        ({"revision": 3}, "names no base model .* revision 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
        ({"bias": "all"}, "sets bias"),
        (None, "cannot be read"),
    ],
)
def test_what_cannot_be_laid_on_is_refused(settings: Any, message: str, tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **settings}) if settings else "[")
    with pytest.raises(CheckpointError, match=message):
        open_model(str(tmp_path / "adapter"))


def test_an_adapter_has_no_steps_and_a_model_no_base(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="--step latest names a checkpoint of a run directory"):
        open_model(str(tmp_path / "adapter"), step="latest")
    with pytest.raises(UsageError, match="--base names the base model of a run, delta or adapter"):
        open_model(str(tiny_model), base=tiny_model)


def test_the_code_of_a_whole_model_runs_where_the_user_trusts_it(tiny_model: Path, tmp_path: Path) -> None:
    remote = with_remote_code(tiny_model, tmp_path / "remote")
    with pytest.raises(ModelError, match=r"cannot be loaded|cannot be read"):
        open_model(str(remote))
    opened = open_model(str(remote), trust_remote_code=True).loaded.model
    assert type(opened).__module__.startswith("transformers_modules")
    assert losses(remote, trust_remote_code=True) == losses(tiny_model)


def test_code_of_the_hub_is_not_run_at_no_pinned_commit() -> None:
    with pytest.raises(UsageError, match=r"org/name is on the Hub at no pinned commit.*--local-dir DIR, and name DIR"):
        open_model("org/name", trust_remote_code=True, dtype="float32")


def test_a_run_on_a_models_own_code_is_exported_and_its_exports_are_opened(tiny_model: Path, tmp_path: Path) -> None:
    remote = with_remote_code(tiny_model, tmp_path / "remote")
    flags = ("--model.trust_remote_code", "true", *mask(LORA))
    with pytest.raises(ModelError, match="if you have read that code, pass --trust-remote-code"):
        exported(remote, tmp_path, *flags)
    run = tmp_path / "run"
    adapter = toolkit.export(run, tmp_path / "adapter", adapter=True, trust_remote_code=True)
    merged = toolkit.export(run, tmp_path / "merged", trust_remote_code=True)
    ours, *others = losses(run, adapter, merged, trust_remote_code=True)
    assert others == pytest.approx([ours, ours], abs=1e-6)

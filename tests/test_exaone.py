"""EXAONE 3.x: read without its code, trained, and written back so that its own code and other loaders take it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exaone_reference import CODE, exaone_config, make_exaone, reference_logits
from helpers import ENGLISH, tiny_flags, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.checkpoint.delta import read_delta
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.dataset import load_dataset
from toolkit.exporting.run_export import export_delta, export_model
from toolkit.inference.open_model import load_delta, open_model
from toolkit.models import weight_files
from toolkit.models.load import load, load_tokenizer
from toolkit.runtime.errors import ModelError

IDS = torch.randint(6, 500, (2, 120), generator=torch.Generator().manual_seed(0))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def loaded_from(directory: Path, dtype: str = "float32") -> Any:
    return load(ModelConfig(name_or_path=str(directory), dtype=dtype))


def logits_of(loaded: Any) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model.eval()(IDS).logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def base(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exaone(tmp_path_factory.mktemp("exaone") / "base", tied)


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """A float32 run of a few steps; a tied head was untied."""
    flags = ("--mask.train", "last:2", "head", "--train.max_steps", 4, "--train.learning_rate", "1e-2")
    assert train(*tiny_flags(base, base.parent / "run", *flags)) == 0
    return base.parent / "run"


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    export_model(run, run / "export")
    return run / "export"


@pytest.mark.parametrize("scaled", [True, False], ids=["llama3", "plain"])
def test_a_checkpoint_gives_the_logits_of_the_reference(tmp_path: Path, tied: bool, scaled: bool) -> None:
    changes = {} if scaled else {"rope_scaling": None, "num_key_value_heads": 4}
    loaded = loaded_from(make_exaone(tmp_path / "base", tied, **changes))
    assert loaded.anatomy.block_count == 6
    assert (loaded.anatomy.tied_head is not None) == tied
    torch.testing.assert_close(logits_of(loaded), reference_logits(tmp_path / "base", IDS), rtol=1e-5, atol=1e-5)


def test_the_trained_model_and_its_export_give_the_logits_of_the_reference(base: Path, run: Path, export: Path) -> None:
    reference = reference_logits(export, IDS)
    trained = logits_of(open_model(str(run)).loaded)
    torch.testing.assert_close(trained, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(loaded_from(export)), trained)
    assert not torch.allclose(reference, reference_logits(base, IDS), atol=0.1), "training changed nothing"


def test_an_export_has_the_original_names_and_frozen_tensors(base: Path, export: Path) -> None:
    original, exported = (load_file(directory / "model.safetensors") for directory in (base, export))
    assert set(exported) == set(original) | {"lm_head.weight"}
    trained = {name for name in exported if name.startswith(("transformer.h.4.", "transformer.h.5.", "lm_head"))}
    assert all(torch.equal(exported[name], original[name]) for name in set(exported) - trained)
    assert not any(torch.equal(exported[name], original[name]) for name in trained & set(original))


def test_the_config_stays_but_for_what_training_changed(base: Path, export: Path, run: Path, tmp_path: Path) -> None:
    expected = {**config_of(base), "tie_word_embeddings": False}
    assert config_of(export) == expected
    assert list(config_of(export)) == list(expected), "in the same order"
    export_model(run, tmp_path / "half", "bfloat16")
    assert config_of(tmp_path / "half") == {**expected, "torch_dtype": "bfloat16"}
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_head_that_stays_tied_is_not_written_twice(tmp_path: Path) -> None:
    base = make_exaone(tmp_path / "base", tied=True)
    assert train(*tiny_flags(base, tmp_path / "run", "--mask.train", "last:1", "--train.max_steps", 2)) == 0
    export_model(tmp_path / "run", tmp_path / "export")
    assert (tmp_path / "export" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert set(load_file(tmp_path / "export" / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    torch.testing.assert_close(
        logits_of(loaded_from(tmp_path / "export")), reference_logits(tmp_path / "export", IDS), rtol=1e-5, atol=1e-5
    )


def test_code_tokenizer_and_licence_are_carried_as_they_are_and_nothing_else(base: Path, export: Path) -> None:
    kept = {path.name for path in base.iterdir()} - {"notes.py", "config.json", "model.safetensors"}
    assert {path.name for path in export.iterdir()} == kept | {"README.md", "config.json", "model.safetensors"}
    assert kept > {*CODE, "LICENSE", "generation_config.json", "tokenizer_config.json"}
    assert all((export / name).read_bytes() == (base / name).read_bytes() for name in kept)
    assert not [name for name in sys.modules if "exaone" in name and name.startswith("transformers_modules")]


def test_code_that_the_source_lacks_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_exaone(tmp_path / "base", tied=True)
    (base / "rotary.py").unlink()
    with caplog.at_level(logging.WARNING, "frostline"):
        loaded_from(base).save(tmp_path / "copy")
    assert "has no rotary.py" in caplog.text
    assert (tmp_path / "copy" / "modeling_exaone.py").exists()


def test_code_of_another_repository_stays_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = {"AutoConfig": "org/code--configuration_exaone.ExaoneConfig", "AutoTokenizer": [None, "rotary.Tok"]}
    base = make_exaone(tmp_path / "base", tied=True, auto_map=elsewhere)
    loaded_from(base).save(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").glob("*.py")} == {"rotary.py"}
    assert config_of(tmp_path / "copy") == config_of(base)
    assert not caplog.records


def test_training_and_the_export_speak_exaones_chat_format(base: Path, export: Path) -> None:
    assert load_tokenizer(ModelConfig(name_or_path=str(export))).chat_template.startswith("{% for m in messages %}")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(base)))
    rows = base.parent / "rows.jsonl"
    rows.write_text('{"QUESTION": "Why?", "CONTEXTS": ["It is cold."], "LONG_ANSWER": "Ice."}\n', encoding="utf-8")
    example = load_dataset(DataConfig(path=str(rows), validation=None), tokenizer, 0).train[0]
    prompt, answer = (
        tokenizer.decode(ids)
        for ids in (example.token_ids[: example.answer_start], example.token_ids[example.answer_start :])
    )
    assert prompt.startswith("[|system|][|endofturn|]\n[|user|]")
    assert prompt.endswith("\n[|assistant|]")
    assert answer == "Ice.[|endofturn|]"


def test_run_delta_and_export_are_the_same_model(run: Path, export: Path, tmp_path: Path) -> None:
    export_delta(run, tmp_path / "delta")
    assert torch.equal(logits_of(load_delta(read_delta(tmp_path / "delta"))), logits_of(loaded_from(export)))
    evaluated = [toolkit.evaluate(source, ENGLISH).loss for source in (run, tmp_path / "delta")]
    assert evaluated[0] == evaluated[1]


def test_a_large_model_is_written_in_shards_with_an_index(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 400_000)
    loaded = loaded_from(base)
    loaded.save(tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(load_file(base / "model.safetensors"))
    assert len(set(index.values())) > 1
    assert torch.equal(logits_of(loaded_from(tmp_path / "sharded")), logits_of(loaded))


def test_a_model_of_the_hub_is_written_from_its_snapshot(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--org--exaone", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(base, target_is_directory=True)
    loaded_from(Path("org/exaone")).save(tmp_path / "copy")
    written = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert set(written) == {path.name for path in base.iterdir()} - {"notes.py"}
    differ = [name for name, content in written.items() if content != (base / name).read_bytes()]
    assert set(differ) <= {"model.safetensors"}, "whose header may list the tensors in another order"


def test_an_export_can_be_saved_as_the_plain_llama_it_is(export: Path, tmp_path: Path) -> None:
    loaded = loaded_from(export)
    loaded.model.save_pretrained(tmp_path / "llama")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert config_of(tmp_path / "llama")["model_type"] == "llama"
    assert torch.equal(again.eval()(IDS).logits, logits_of(loaded))


def test_a_config_that_leaves_tying_out_is_tied_as_exaones_own_code_has_it(tmp_path: Path) -> None:
    base = make_exaone(tmp_path / "base", tied=True)
    config = {key: value for key, value in exaone_config(tied=True).items() if key != "tie_word_embeddings"}
    (base / "config.json").write_text(json.dumps(config))
    loaded = loaded_from(base)
    assert loaded.anatomy.tied_head is not None
    loaded.save(tmp_path / "copy")
    assert config_of(tmp_path / "copy") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": None, "hidden_size": None}, "lacks hidden_size, num_layers"),
        ({"embed_dropout": 0.1}, r"embed_dropout is 0\.1; expected 0"),
    ],
)
def test_a_config_that_is_not_exaones_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base = make_exaone(tmp_path / "base", tied=True)
    (base / "config.json").write_text(json.dumps(exaone_config(tied=True, **change)))
    with pytest.raises(ModelError, match=message):
        loaded_from(base)

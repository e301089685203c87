"""What a run is: weights, config, code, tokenizer and template of its base, each compared by what depends on it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, metrics, reseal, tiny_flags, train
from remote_code import with_remote_code
from test_bad_input import run_main

from toolkit.exporting.adapter_directory import export_adapter
from toolkit.inference.open_model import open_model
from toolkit.runtime.errors import CheckpointError


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
CONFIG = r"config.json has changed: rope_parameters.rope_theta was 10000.0, is 50.0"


def test_a_changed_config_is_refused_wherever_the_tensors_are_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    flags = tiny_flags(model, run, "--train.max_steps", 2, "--output.save_every_steps", 1, "--output.keep", 2)
    assert train(*flags) == 0
    shutil.rmtree(checkpoint_of(run))  # as if it had been killed before its last checkpoint
    (run / "checkpoints" / "latest").write_text("step-00000001")
    assert run_main(monkeypatch, "export", str(run), "--output", str(tmp_path / "delta"), "--delta") == 0
    change(model / "config.json", **ROPE)
    with pytest.raises(CheckpointError, match=f"of the base model {CONFIG}"):
        train(*flags)
    for source in (run, checkpoint_of(run), tmp_path / "delta"):
        with pytest.raises(CheckpointError, match=CONFIG):
            open_model(str(source))
    with pytest.raises(CheckpointError, match=CONFIG):
        train(*tiny_flags(model, tmp_path / "second", "--model.delta", tmp_path / "delta"))
    capsys.readouterr()
    rows = ["--data.path", str(ENGLISH)]
    for words in (["evaluate", str(run), *rows], ["evaluate", "base", str(run), *rows],
                  ["export", str(run), "--output", str(tmp_path / "export")]):  # fmt: skip
        assert run_main(monkeypatch, *words) == 2
        assert "rope_theta was 10000.0, is 50.0" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_a_config_that_says_the_same_otherwise_is_the_same(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(model, run, "--train.max_steps", 1)) == 0
    values = json.loads((model / "config.json").read_text())
    values.pop("rope_parameters", None)
    old = {**dict(reversed(values.items())), "rope_theta": 10000.0, "transformers_version": "4.40.0", "x_note": None}
    (model / "config.json").write_text(json.dumps(old, indent=7))
    assert open_model(str(run)).delta is not None


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("tokenizer.json", '"<|user|>"', '"<|User|>"', "the tokenizer is another"),
        ("chat_template.jinja", "<|end|>", "<|end|> ", "the chat template is another"),
    ],
)
def test_a_changed_tokenizer_or_template_is_refused(
    model: Path, tmp_path: Path, file: str, before: str, after: str, message: str
) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(model, run, "--train.max_steps", 1)) == 0
    text = (model / file).read_text(encoding="utf-8")
    assert before in text
    (model / file).write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_model(str(run))


def test_a_changed_generation_config_is_said_and_keeps_the_cached_hidden_states(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ("--prefix.cache", "on", "--prefix.cache_dir", tmp_path / "cache", "--train.max_steps", 1)
    assert train(*tiny_flags(model, tmp_path / "run", *cache)) == 0
    change(model / "generation_config.json", temperature=0.3, do_sample=True)
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*tiny_flags(model, tmp_path / "other", *cache)) == 0
        open_model(str(tmp_path / "run"))
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1
    assert "generation_config.json has changed: do_sample was not there, is True; temperature was" in caplog.text


def scaled(model: Path, factor: float) -> None:
    """Let the model's own code multiply its hidden states."""
    (model / "helper_code.py").write_text(f"SCALE = {factor}\n")
    (model / "tiny_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from .helper_code import SCALE\n\n\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tiny_remote'\n\n\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        for layer in self.model.layers:\n            layer.self_attn.scaling *= SCALE\n"
    )


def test_changed_remote_code_reads_no_old_cache_and_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_remote_code(tiny_model, tmp_path / "model")
    scaled(model, 1.0)
    own = ("--model.trust_remote_code", "true", "--train.max_steps", 2, "--prefix.cache_dir", tmp_path / "cache")
    assert train(*tiny_flags(model, tmp_path / "a", *own, "--prefix.cache", "on")) == 0
    scaled(model, 9.0)
    assert train(*tiny_flags(model, tmp_path / "b", *own, "--prefix.cache", "on")) == 0
    assert train(*tiny_flags(model, tmp_path / "c", *own, "--prefix.cache", "off")) == 0
    assert metrics(tmp_path / "b") == pytest.approx(metrics(tmp_path / "c"), abs=1e-5)
    assert metrics(tmp_path / "a") != pytest.approx(metrics(tmp_path / "b"), abs=1e-3)
    with pytest.raises(CheckpointError, match=r"code that comes with the model has changed: helper_code\.py was"):
        open_model(str(tmp_path / "a"), trust_remote_code=True)
    open_model(str(tmp_path / "b"), trust_remote_code=True)


def test_code_that_the_models_code_imports_from_elsewhere_is_part_of_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, elsewhere = with_remote_code(tiny_model, tmp_path / "model"), tmp_path / "elsewhere"
    (elsewhere / "frost_layers" / "deep").mkdir(parents=True)
    (elsewhere / "frost_layers" / "__init__.py").touch()
    (elsewhere / "frost_layers" / "deep" / "scale.py").write_text("SCALE = 1.0\n")
    (elsewhere / "frost_alone.py").write_text("BIAS = 0.0\n")
    code = (model / "tiny_code.py").read_text()
    own = "import json, torch\nimport frost_alone\nfrom frost_layers.deep.scale import SCALE\n"
    (model / "tiny_code.py").write_text(own + code)
    monkeypatch.syspath_prepend(elsewhere)
    run = tmp_path / "run"
    assert train(*tiny_flags(model, run, "--model.trust_remote_code", "true", "--train.max_steps", 1)) == 0
    base = json.loads((checkpoint_of(run) / "base.json").read_text())
    assert sorted(base["identity"]["code"]) == ["frost_alone", "frost_layers", "tiny_code.py"]
    (elsewhere / "frost_layers" / "deep" / "scale.py").write_text("SCALE = 2.0\n")
    with pytest.raises(CheckpointError, match=r"code that comes with the model has changed: frost_layers was"):
        open_model(str(run), trust_remote_code=True)
    monkeypatch.delitem(sys.modules, "frost_layers")
    monkeypatch.delitem(sys.modules, "frost_alone")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_for_no_commit_of_it_is_pinned(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, file: str
) -> None:
    model = with_remote_code(tiny_model, tmp_path / "model")
    change(model / file, auto_map={"AutoConfig": "org/else--code.C", "AutoTokenizer": ["org/else--code.T", None]})
    flags = tiny_flags(model, tmp_path / "run", "--model.trust_remote_code", "true")
    for words in (["train", *flags], ["plan", *flags], ["evaluate", str(model), "--data.path", str(ENGLISH),
                                                        "--trust-remote-code"]):  # fmt: skip
        if (words[0], file) == ("plan", "tokenizer_config.json"):
            continue  # which a plan does not read
        assert run_main(monkeypatch, *words) == 2
        assert f"{file} takes code from org/else (auto_map), at no pinned commit" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_of_an_earlier_version_is_opened_and_what_is_not_compared_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(model, run, "--train.max_steps", 1)) == 0
    checkpoint = checkpoint_of(run)
    base = json.loads((checkpoint / "base.json").read_text())
    assert base["identity"]["config"]["rope_parameters"]["rope_theta"] == 10000.0
    del base["identity"]
    (checkpoint / "base.json").write_text(json.dumps(base))
    reseal(checkpoint)
    with caplog.at_level(logging.INFO, "frostline"):
        assert open_model(str(run)).delta is not None
    assert "recorded of the base model the weights alone; its config.json and code are not compared" in caplog.text


def test_a_delta_that_names_itself_is_one_message(model: Path, tmp_path: Path) -> None:
    run, delta = tmp_path / "run", tmp_path / "step-00000001"
    assert train(*tiny_flags(model, run, "--train.max_steps", 1)) == 0
    shutil.copytree(checkpoint_of(run), delta)
    base = json.loads((delta / "base.json").read_text())
    base["model"]["delta"] = str(delta)
    (delta / "base.json").write_text(json.dumps(base))
    reseal(delta)
    with pytest.raises(CheckpointError, match="begins from it again"):
        open_model(str(delta))
    with pytest.raises(CheckpointError, match="begins from it again"):
        train(*tiny_flags(model, tmp_path / "second", "--model.delta", delta))


def test_an_adapter_is_not_written_for_a_base_with_another_config(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = tiny_flags(model, run, "--train.max_steps", 1)
    assert train(*flags, "--mask.train", "{lora: {select: last:2}}") == 0
    export_adapter(run, tmp_path / "first")
    change(model / "config.json", **ROPE)
    with pytest.raises(CheckpointError, match=CONFIG):
        export_adapter(run, tmp_path / "second")
    assert not (tmp_path / "second").exists()

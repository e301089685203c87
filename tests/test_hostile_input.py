"""What others hand over, a model, a delta, a template or a table, runs no code, escapes nowhere and tells no secret."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import invocation, make_tokenizer, reseal, tiny_flags, train
from test_bad_input import run_main

from toolkit.config.schema import ModelConfig
from toolkit.data.examples import Encoder
from toolkit.inference.open_model import open_model
from toolkit.models.load import load, load_tokenizer
from toolkit.runtime.errors import ConfigError, DataError, ModelError
from toolkit.runtime.redact import find_secrets, redact
from toolkit.tasks.sample import ask

SECRET = "hf_PlantedSecretThatNobodyMaySee"
SAMPLE = ask("question", ("context",), "answer")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be tampered with."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


class Payload:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def plant_code(folder: Path, trace: Path, config: str, auto_map: dict[str, Any]) -> None:
    """Let a JSON file of a model name Python code beside it, which leaves a trace."""
    (folder / "planted.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Planted: pass\n")
    values = json.loads((folder / config).read_text())
    values["auto_map"] = auto_map
    values.pop("model_type", None)
    (folder / config).write_text(json.dumps(values))


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickled_weights_are_not_loaded(model: Path, tmp_path: Path, suffix: str) -> None:
    trace = tmp_path / "trace"
    name = "pytorch_model" + suffix
    (model / name).write_bytes(pickle.dumps(Payload(trace)))
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"no \\*.safetensors but {name}; pickled weights are not loaded"):
        load(ModelConfig(name_or_path=str(model)))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "pytorch_model.bin", "a\\b.safetensors"])
def test_an_index_that_names_other_files_is_refused(model: Path, name: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="expected names of safetensors files beside it"):
        load(ModelConfig(name_or_path=str(model)))


def test_an_adapter_does_not_stand_in_for_another_model(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ModelError, match="holds an adapter"):
        load(ModelConfig(name_or_path=str(model)))


def test_code_beside_a_model_or_tokenizer_is_not_run(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    plant_code(model, trace, "tokenizer_config.json", {"AutoTokenizer": ["planted.Planted", None]})
    values = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Planted"}
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    with suppress(ModelError):  # transformers may also take the fast tokenizer that is there
        load_tokenizer(ModelConfig(name_or_path=str(model)))
    classes = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    plant_code(model, trace, "config.json", classes)
    with pytest.raises(ModelError):
        load(ModelConfig(name_or_path=str(model)))
    assert not trace.exists()


def test_a_kernel_from_the_hub_is_code_too(model: Path) -> None:
    values = json.loads((model / "config.json").read_text()) | {"attn_implementation": "somebody/kernel"}
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="attention kernel somebody/kernel from the Hub, which is code"):
        load(ModelConfig(name_or_path=str(model)))


def test_a_delta_cannot_choose_that_the_base_models_code_runs(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(*tiny_flags(tiny_model, run, "--train.max_steps", 1)) == 0
    name = (run / "checkpoints" / "latest").read_text()
    checkpoint = run / "checkpoints" / name
    base = json.loads((checkpoint / "base.json").read_text())
    base["model"]["trust_remote_code"] = True
    (checkpoint / "base.json").write_text(json.dumps(base))
    reseal(checkpoint)
    with pytest.raises(ModelError, match="if you have read that code, pass --trust-remote-code"):
        open_model(str(checkpoint))
    assert open_model(str(checkpoint), trust_remote_code=True).delta is not None


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "function": "{{ raise_exception.__globals__['os'].system('touch TRACE') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "change": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "namespace": "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_chat_template_reaches_nothing_outside_its_sandbox(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(template=HOSTILE[kind])
    with pytest.raises(DataError) as error:
        Encoder(tokenizer, 256).encode(SAMPLE)
    assert "chat template" in str(error.value)
    assert "root:" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_template_that_loops_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox bounds one loop, not loops in loops."""
    monkeypatch.setattr("toolkit.data.chat_template._RENDER_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(DataError, match=r"chat template fails .* takes longer than any conversation needs \(0.2 s\)"):
        Encoder(make_tokenizer(template=loop), 256)


SECRETS = [
    SECRET,
    "https://user:ghost-password@example.org/data.jsonl",
    "ghp_0123456789abcdefghijABCDEFGHIJ",
    "https://example.org/x.parquet?X-Amz-Signature=0123456789abcdef",
    "sk-abcdefghijklmnopqrstuvwxyz",
    "AKIAABCDEFGHIJKLMNOP",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_secret_is_hidden_and_refused(secret: str) -> None:
    assert find_secrets({"model": {"name_or_path": secret}}, {}) == ["model.name_or_path"]
    shown = redact(f"cannot read {secret}: no such file", {})
    assert "***" in shown
    for part in (SECRET, "ghost-password", "0123456789abcdef", "abcdefghijklmnop", "ABCDEFGHIJKLMNOP"):
        assert part not in shown


@pytest.mark.parametrize(
    "text",
    ["org/name", "last:4", "hf_home", "C:/models/x", "a@b.example", "https://host/path", "runs/token-test", "sk-1"],
)
def test_ordinary_values_are_left_as_they_are(text: str) -> None:
    assert redact(text, {"HF_TOKEN": "", "MY_TOKEN": "short"}) == text
    assert find_secrets({"x": [text]}, {}) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.path", f"https://me:{SECRET}@host/rows.jsonl"],
        ["--model.name_or_path", f"https://{SECRET}@host/model"],
        [f"--model.token={SECRET}"],
        ["--train.epochs", SECRET],
        ["--mask.train", SECRET],
        ["--ds", f"/nowhere/{SECRET}.json"],
        ["--output.dir", f"runs/{SECRET}"],
    ],
)
@pytest.mark.parametrize("script", ["train", "submit"])
def test_no_error_repeats_a_secret(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], script: str
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--dry-run"] if script == "submit" else []
    assert run_main(monkeypatch, script, *tiny_flags(tiny_model, tmp_path / "run", *flags, *more)) == 2
    shown = "".join(capsys.readouterr())
    assert "error" in shown
    assert SECRET not in shown
    assert list(tmp_path.iterdir()) == []


def test_secrets_in_a_recipe_or_ds_file_are_refused_before_they_are_saved(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data:\n  path: https://me:{SECRET}@host/x.jsonl\n")
    with pytest.raises(ConfigError, match=r"data\.path holds a password or token; .* HF_TOKEN"):
        invocation("--config", str(tmp_path / "recipe.yaml"))
    (tmp_path / "ds.json").write_text(json.dumps({"wandb": {"team": SECRET}}))
    with pytest.raises(ConfigError, match=r"wandb\.team holds a password or token"):
        train(*tiny_flags(tiny_model, tmp_path / "run", "--ds", tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (["--container", f"apptainer exec --env HF_TOKEN={SECRET} image.sif"], {}),
        ([f"--sbatch=--comment={SECRET}"], {}),
        ([], {"NCCL_DEBUG_FILE": f"https://me:{SECRET}@host/x"}),
    ],
)
def test_a_job_script_never_holds_a_secret(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    flags: list[str],
    environ: dict[str, str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert run_main(monkeypatch, "submit", *tiny_flags(tiny_model, tmp_path / "run"), *flags, "--dry-run") == 2
    shown = "".join(capsys.readouterr())
    assert "holds a password or token" in shown
    assert SECRET not in shown


def test_nothing_that_a_run_writes_or_says_holds_the_token_of_its_environment(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    token = "a-token-of-no-known-shape-41"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    flags = tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 2, "--data.validation", "0.1")
    assert run_main(monkeypatch, "train", *flags) == 0
    assert run_main(monkeypatch, "submit", *tiny_flags(tiny_model, tmp_path / "job"), "--dry-run") == 0
    assert run_main(monkeypatch, "train", *flags, "--data.path", f"{token}.jsonl") == 2
    shown = capsys.readouterr()
    assert "data.path holds a password or token" in shown.err
    said = shown.out + shown.err
    assert "#!/bin/bash" in said
    assert "frost line" in said
    written = b"".join(path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file())
    for secret in (token, SECRET):
        assert secret not in said
        assert secret.encode() not in written
    assert b"learning_rate" in written

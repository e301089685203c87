"""Inputs that once gave a traceback or led astray, each with the message it gives now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import invocation, make_tiny_model, make_tokenizer
from store_samples import NAMESPACE, open_store, samples

from toolkit.activation_cache.shard import _name_of
from toolkit.checkpoint.catalog import latest_checkpoint
from toolkit.checkpoint.delta import read_delta
from toolkit.checkpoint.state import read_state
from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.sources import read_rows
from toolkit.engine.deepspeed.json_file import read_ds_config
from toolkit.models.load import load, resolve_source
from toolkit.planning.meta_model import meta_model
from toolkit.runtime.errors import CheckpointError, ConfigError, DataError, ModelError


@pytest.mark.parametrize(
    "recipe",
    [
        "train: {seed: 2020-99-99}",
        "train: {seed: !!int x}",
        "train: " + "[" * 1200,
        "train: {seed: !!timestamp x}",
        "train: {seed: " + "9" * 5000 + "}",
    ],
)
def test_values_that_yaml_itself_stumbles_over(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match="not valid YAML"):
        invocation("--config", str(tmp_path / "recipe.yaml"))


def test_anchors_that_grow_without_end_are_told_in_short(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join([*levels, "train: {epochs: *a11}"]))
    with pytest.raises(ConfigError, match="it stands for more than 100,000 values") as error:
        invocation("--config", str(tmp_path / "recipe.yaml"))
    assert len(str(error.value)) < 200_000


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(DataError, match="no such file"):
            read_rows(name)
        with pytest.raises(ModelError, match="not an existing directory"):
            resolve_source(f"./{name}")
        assert ModelConfig(name_or_path=name, trust_remote_code=False).name_or_path == name


def test_a_deeply_nested_row_is_a_row_with_a_fault_or_one_to_check(tmp_path: Path) -> None:
    """Python's limit for nesting lies within the depths tried, at another one for reading than for writing."""
    for depth in (600, *range(960, 1010)):
        (tmp_path / "rows.jsonl").write_text('{"QUESTION": ' + "[" * depth + "]" * depth + "}")
        (row,) = read_rows(str(tmp_path / "rows.jsonl"))
        assert (row.fault is None) == (row.values is not None)


@pytest.mark.parametrize("content", ["9" * 5000, "[" * 5000])
def test_json_that_python_refuses_to_read(tmp_path: Path, content: str) -> None:
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"not readable JSON|rows cannot be used"):
            load_dataset(DataConfig(path=str(tmp_path / name)), make_tokenizer(), 0)
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match="not valid JSON in UTF-8"):
        read_ds_config(tmp_path / "ds.json")


def test_a_shard_with_a_header_without_end_is_damaged(tmp_path: Path) -> None:
    header = b"[" * 5000
    content = len(header).to_bytes(8, "little") + header
    place = tmp_path / NAMESPACE.sha256
    place.mkdir()
    (place / _name_of(content)).write_bytes(content)
    with open_store(tmp_path) as store:
        assert [store.read(key) for key in samples([0])] == [None]
        assert store.statistics.damaged == 1


@pytest.mark.parametrize("name", ["..", "../..", "step-00000001/..", "/tmp", "", "step-x"])
def test_the_pointer_to_the_latest_checkpoint_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="which is not there; checkpoints present: step-00000001"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[" * 5000, "[]", "{}", '{"step": 1}', "null"])
def test_a_position_of_another_form_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint .* is damaged"):
        read_state(tmp_path)
    for name in ("mask.json", "base.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match="is not a readable delta"):
        read_delta(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [("config.json", {"vocab_size": None}), ("config.json", {"hidden_size": "x"}), ("generation_config.json", None)],
)
def test_a_models_files_with_values_that_transformers_stumbles_over(
    tmp_path: Path, name: str, change: dict[str, object] | None
) -> None:
    model = make_tiny_model(tmp_path / "model")
    values = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(values | change if change is not None else None))
    config = ModelConfig(name_or_path=str(model))
    with pytest.raises(ModelError, match=r"cannot be used|cannot be loaded"):
        load(config) if name == "generation_config.json" else meta_model(config)

"""A run, a cache, a delta and an export that an earlier version wrote are read as if this one had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import edit_state
from helpers import masters_of, metrics, train
from old.make import KILLED_AFTER, QUESTION, unpack
from safetensors import safe_open
from safetensors.torch import load_file

import toolkit
from toolkit.activation_cache.namespace import Namespace
from toolkit.activation_cache.store import ActivationStore
from toolkit.checkpoint.state import read_state

VERSIONS = sorted(Path(__file__).with_name("old").glob("*.json"))


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda path: path.stem)
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The file of an earlier version: its losses and answer, and what it wrote."""
    made: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return made


@pytest.fixture(autouse=True)
def old(figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which that version worked, which is the working directory: its paths are relative."""
    unpack(figures["files"], tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go_on(run: str) -> int:
    return train("--config", f"{run}/config.yaml", "--output.dir", run)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_an_interrupted_run_goes_on_to_the_losses_and_weights_that_it_would_have_had(
    old: Path, figures: dict[str, Any]
) -> None:
    assert go_on("interrupted") == 0
    assert metrics(old / "interrupted", "step")[-1] == 8
    assert metrics(old / "interrupted")[KILLED_AFTER:] == pytest.approx(figures["losses"][KILLED_AFTER:], abs=1e-6)
    assert metrics(old / "interrupted", "eval_loss")[-1] == pytest.approx(figures["eval_loss"], abs=1e-6)
    ours, theirs = (masters_of(old / run / "checkpoints" / "step-00000008") for run in ("interrupted", "finished"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6) for name, tensor in ours.items())


def test_a_finished_run_is_known_as_finished(old: Path) -> None:
    before = contents(old / "finished" / "checkpoints")
    assert go_on("finished") == 0
    assert contents(old / "finished" / "checkpoints") == before


def test_a_run_trained_from_the_start_has_the_same_losses(old: Path, figures: dict[str, Any]) -> None:
    assert train("--config", "finished/config.yaml", "--output.dir", "again") == 0
    assert metrics(old / "again") == pytest.approx(figures["losses"], abs=1e-6)


@pytest.mark.parametrize("step", [KILLED_AFTER, 8])
def test_a_checkpoint_without_keys_that_came_later_is_read(old: Path, step: int) -> None:
    (checkpoint,) = (path.parent for path in old.rglob(f"step-{step:08}/state.json"))
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    read = read_state(checkpoint)
    assert {name: getattr(read, name) for name in state} == state
    del state["eval_loss"]  # an older version still had it only where it was known
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert read_state(checkpoint) == read


def test_a_run_whose_state_lacks_keys_goes_on(old: Path, figures: dict[str, Any]) -> None:
    checkpoint = old / "interrupted" / "checkpoints" / f"step-{KILLED_AFTER:08}"
    recipe = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["recipe"]
    del recipe["optim"], recipe["data"]["packing"], recipe["prefix"]["placement"]
    edit_state(checkpoint, recipe=recipe)
    assert go_on("interrupted") == 0
    assert metrics(old / "interrupted")[KILLED_AFTER:] == pytest.approx(figures["losses"][KILLED_AFTER:], abs=1e-6)


def test_run_delta_and_export_evaluate_to_the_same_loss(figures: dict[str, Any]) -> None:
    assert toolkit.evaluate("finished").loss == pytest.approx(figures["eval_loss"], abs=1e-6)
    losses = [toolkit.evaluate(source, "rows.jsonl").loss for source in ("finished", "delta", "export")]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert losses[0] < toolkit.evaluate("model", "rows.jsonl").loss


@pytest.mark.parametrize("source", ["finished", "delta", "export"])
def test_each_of_them_gives_the_same_answer(figures: dict[str, Any], source: str) -> None:
    assert toolkit.generate(source, [QUESTION], max_new_tokens=12) == [figures["answer"].removesuffix("\n")]


def test_the_run_exports_the_weights_it_exported_then(old: Path) -> None:
    toolkit.export("finished", "export-now")
    toolkit.export("finished", "delta-now", delta=True)
    for then, name in (("export", "model.safetensors"), ("delta", "trained.safetensors")):
        tensors, expected = (load_file(old / folder / name) for folder in (f"{then}-now", then))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


def test_a_run_may_start_from_the_delta(old: Path, figures: dict[str, Any]) -> None:
    assert train("--config", "finished/config.yaml", "--output.dir", "onwards", "--model.delta", "delta") == 0
    assert metrics(old / "onwards")[0] < figures["losses"][0]


def test_the_cache_is_read_or_left_alone(old: Path, figures: dict[str, Any]) -> None:
    """Other sources make another namespace, beside the old one; its entries stay readable under its own name."""
    before = contents(old / "cache")
    assert train("--config", "finished/config.yaml", "--output.dir", "again") == 0
    after = contents(old / "cache")
    assert {path: after[path] for path in before} == before
    (described,) = (path for path in before if path.name == "namespace.json")
    written = json.loads(before[described])
    namespace = Namespace(written["identity"], written["width"], getattr(torch, written["dtype"]))
    assert namespace.sha256 == described.parent.name
    (shard,) = described.parent.glob("*.safetensors")
    with ActivationStore(old / "cache", namespace, keep_free_bytes=0) as store, safe_open(shard, "pt") as file:
        assert len(file.keys()) == 5
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            found = store.read(name)
            assert found is not None
            assert torch.equal(found, file.get_tensor(name))

"""The reference recipe as it is shipped, against a hub with what it names: trained, evaluated, asked and exported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exaone_reference import make_exaone, reference_logits
from helpers import KOREAN, ROOT, metrics, run_script
from safetensors.torch import load_file
from stub_hub import Repository, StubHub, stub_hub

pytestmark = pytest.mark.slow

RECIPE = ROOT / "recipes" / "exaone35_pubmedqa_ko.yaml"
NAMED: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
MODEL, DATA = NAMED["model"]["name_or_path"], NAMED["data"]["path"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubHub]:
    """EXAONE at the recipe's revision with tiny weights, and the data set as its one file, with PubMedQA's columns."""
    root = tmp_path_factory.mktemp("hub")
    make_exaone(root / "model", tied=True, max_position_embeddings=2048)
    rows = [json.loads(line) for line in KOREAN.read_text(encoding="utf-8").splitlines()]
    more = {"LABELS": ["BACKGROUND"], "MESHES": ["Humans"], "YEAR": "2010", "final_decision": "yes"}
    (root / "data").mkdir()
    (root / "data" / "pubmedQA_test_translated.json").write_text(json.dumps([row | more for row in rows]))
    repositories = {
        f"models/{MODEL}": Repository(root / "model", NAMED["model"]["revision"]),
        f"datasets/{DATA}": Repository(root / "data", "a" * 40),
    }
    with stub_hub(repositories) as served:
        yield served


@pytest.fixture(scope="module", params=["torch", "zero2"])
def run(request: pytest.FixtureRequest, hub: StubHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run of four steps, and the environment that it was started in."""
    root = tmp_path_factory.mktemp(request.param)
    environ = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0",
        # whatever else is asked for ends at the stub
        "NO_PROXY": "127.0.0.1,localhost", "HTTP_PROXY": hub.url, "HTTPS_PROXY": hub.url,
    }  # fmt: skip
    flags = ["--config", RECIPE, "--output.dir", root / "run", "--train.max_steps", 4, "--output.sample_tokens", 4]
    if request.param == "zero2":
        launcher = ("deepspeed", "--num_gpus", "2")
        done = run_script(
            "launch/train.py", *flags, "--ds", "ds_configs/zero2.json", launcher=launcher, environ=environ
        )
    else:
        done = run_script("launch/train.py", *flags, environ=environ)
    assert done.returncode == 0, done.stderr
    return root / "run", environ


def test_it_trains_on_the_only_split_and_holds_out_a_tenth(run: tuple[Path, Any]) -> None:
    config = yaml.safe_load((run[0] / "config.yaml").read_text(encoding="utf-8"))
    assert (config["data"]["path"], config["data"]["split"]) == (DATA, "test")
    assert len(metrics(run[0])) == 4
    assert all(math.isfinite(loss) for loss in (*metrics(run[0]), *metrics(run[0], "eval_loss")))


def test_it_is_evaluated_on_what_it_held_out_and_on_the_set(run: tuple[Path, Any]) -> None:
    own, every = (
        run_script("launch/evaluate.py", run[0], *flags, environ=run[1]) for flags in ([], ["--data.path", DATA])
    )
    assert own.returncode == every.returncode == 0, own.stderr + every.stderr
    found, all_rows = (json.loads(done.stdout.splitlines()[-1]) for done in (own, every))
    assert found["loss"] == pytest.approx(metrics(run[0], "eval_loss")[-1], rel=1e-3)
    assert all_rows["supervised_tokens"] > found["supervised_tokens"]
    assert every.stderr.count(f"{DATA} has one split, test, which is taken") == 1


def test_it_answers_questions_of_the_set(run: tuple[Path, Any], tmp_path: Path) -> None:
    flags = ["--input", DATA, "--limit", 2, "--max-new-tokens", 4, "--output", tmp_path / "answers.jsonl"]
    done = run_script("launch/generate.py", run[0], *flags, environ=run[1])
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    own = {"LABELS", "MESHES", "YEAR", "LONG_ANSWER", "final_decision"}
    assert [set(row) for row in answers] == [{"QUESTION", "CONTEXTS", "ANSWER", "REFERENCE", *own}] * 2


def test_its_export_is_exaone_again(run: tuple[Path, Any], hub: StubHub) -> None:
    done = run_script("launch/export.py", run[0], environ=run[1])
    assert done.returncode == 0, done.stderr
    export, base = run[0] / "export", hub.repositories[f"models/{MODEL}"].files
    assert {path.name for path in base.glob("*.py")} - {path.name for path in export.glob("*.py")} == {"notes.py"}
    trained, original = load_file(export / "model.safetensors"), load_file(base / "model.safetensors")
    assert set(trained) == set(original) | {"lm_head.weight"}
    assert torch.equal(trained["transformer.h.0.ln_1.weight"], original["transformer.h.0.ln_1.weight"].bfloat16())
    logits = reference_logits(export, torch.randint(6, 500, (1, 40), generator=torch.Generator().manual_seed(0)))
    assert logits.isfinite().all()


def test_its_code_is_fetched_for_the_export_only(run: tuple[Path, Any], hub: StubHub) -> None:
    exported = next(index for index, line in enumerate(hub.requests) if "LICENSE" in line)
    assert f"HEAD /{MODEL}/resolve/{NAMED['model']['revision']}/config.json" in hub.requests[:exported]
    assert not [line for line in hub.requests[:exported] if line.startswith("GET") and line.endswith(".py")]

"""What an export is to others: the zoo's types, exported, in transformers 5 and in 4.57.6 from a second environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_runs import mask, save_of_zoo
from exports import ADAPTER_READER, IDS, READER, as_if_trained, logits_of, make_base, save_tokenizer
from helpers import clean_environment, tiny_flags, train
from transformers import AutoModelForCausalLM
from zoo import CUT, OTHER, UNCUT

from toolkit.commands.export import export
from toolkit.config.schema import ModelConfig
from toolkit.inference.open_model import open_model
from toolkit.models.load import load

OTHER_VERSION = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")

UNKNOWN_TO_4 = {"afmoe", "exaone_moe", "gemma4_text", "gemma4_text:per layer", "hrm_text", "hyperclovax", "nanochat",
                "solar_open"}  # fmt: skip
"""Types that transformers 4.57.6 has not."""

OTHERWISE_IN_4 = {
    "apertus": "keeps constants of its activation in bfloat16: logits differ by 0.004, the likeliest token never",
    "cpmant": "its head has rows for the prompt too",
    "gemma3n_text": "an untouched model gives other logits too",
    "jamba": "runs on a GPU alone",
    "recurrent_gemma": "an untouched model gives other logits too",
    "zamba2": "calls its kinds of blocks otherwise",
}
"""Types that the two versions compute or describe otherwise, trained or not."""

ALLOWED = 1e-3
"""Largest difference of logits, whose spread is about 1: both compute in float32, in another order. Most differ by less
than 1e-5; Gemma 2, whose soft caps another kernel computes, by 2e-4. A wrong rotary base gives more than 0.1."""


@pytest.fixture(scope="session")
def transformers_4() -> Path:
    """A folder with transformers 4.57.6, installed once from the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "frostline-tests" / "transformers-4.57.6"
    if not folder.is_dir():
        staging = folder.with_name(f".{folder.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(staging)]
        done = subprocess.run([*command, *OTHER_VERSION], capture_output=True, text=True)
        if done.returncode:
            message = f"transformers 4.57.6 cannot be installed here: {done.stderr[-200:]}"
            if os.environ.get("FROSTLINE_REQUIRE_TRANSFORMERS_4"):
                pytest.fail(message)
            pytest.skip(message)
        staging.rename(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """The export of each type and its logits before it was written; one without its older keys too."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = save_tokenizer(root / "tokenizer")
    found = {}
    for number, name in enumerate((*CUT, *UNCUT, *(OTHER.keys() - {"rwkv"}))):
        loaded = as_if_trained(make_base(root / f"base-{number}", name, tokenizer))
        loaded.save(root / f"export-{number}", ends=[0, 5])
        found[name] = root / f"export-{number}", logits_of(loaded.model)
    bare = root / "bare"
    shutil.copytree(found["llama"][0], bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "rope_theta"}))
    return found | {"bare": (bare, found["llama"][1])}


@pytest.mark.slow
def test_exports_give_their_logits_again_in_transformers_5(exported: dict[str, tuple[Path, torch.Tensor]]) -> None:
    for name, (directory, logits) in exported.items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert torch.equal(logits_of(model), logits), name


@pytest.mark.slow
def test_exports_give_the_same_logits_in_transformers_4(
    exported: dict[str, tuple[Path, torch.Tensor]],
    transformers_4: Path,
    tmp_path: Path,
    summarise: Callable[[str], None],
) -> None:
    environment = {**clean_environment(), "PYTHONPATH": str(transformers_4)}
    directories = {str(directory): name for name, (directory, _) in exported.items()}
    command = [sys.executable, "-c", READER, str(tmp_path / "found.pt"), json.dumps(IDS.tolist()), *directories]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    assert found.pop("version") == "4.57.6"
    equal, faults = set(), {}
    for directory, result in found.items():
        name = directories[directory]
        if isinstance(result, str):
            faults[name] = result
            continue
        expected = exported[name][1]
        difference = float((result - expected).abs().max())
        if difference <= ALLOWED and torch.equal(result.argmax(-1), expected.argmax(-1)):
            equal.add(name)
        else:
            faults[name] = f"differs by {difference:.1e}"
    summarise(f"{len(equal)} types with equal logits in both versions; otherwise: {faults}")
    assert "differs" in faults.pop("bare"), "the check does not see a wrong rotary base"
    assert {name for name, fault in faults.items() if fault == "unknown"} == UNKNOWN_TO_4
    assert faults.keys() - UNKNOWN_TO_4 == OTHERWISE_IN_4.keys()
    assert len(equal) >= 20


ADAPTED = ("llama", "qwen2", "gemma3_text", "mixtral", "gpt2")


@pytest.mark.slow
def test_adapters_give_the_runs_logits_in_both_versions_merged_and_as_pefts_directory(
    transformers_4: Path, tmp_path: Path, summarise: Callable[[str], None]
) -> None:
    """Beside a whole head, which an embedding that was tied to it does not follow."""
    expected, directories = {}, []
    for name in ADAPTED:
        folder = tmp_path / name
        loaded = load(ModelConfig(name_or_path=str(save_of_zoo(name, folder / "v5")), dtype="float32"))
        loaded.save(folder / "base", ends=[0, 5])  # with the keys that version 4 reads
        lora = {"lora": {"select": "last:2", "rank": 4, "dora": name == "llama"}}
        flags = tiny_flags(folder / "base", folder / "run", "--train.learning_rate", 0.02, "--train.epochs", 1)
        assert train(*flags, *mask(lora, "head")) == 0
        expected[name] = logits_of(open_model(str(folder / "run")).loaded.model)
        for form in ("merged", "adapter"):
            export(folder / "run", folder / form, adapter=form == "adapter")
        directories.append(str(folder))
    differences = {}
    for version, path in (("4.57.6", str(transformers_4)), ("5", "")):
        environment = {**clean_environment(), **({"PYTHONPATH": path} if path else {})}
        command = [sys.executable, "-c", ADAPTER_READER, str(tmp_path / "found.pt"), json.dumps(IDS.tolist())]
        done = subprocess.run([*command, *directories], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = torch.load(tmp_path / "found.pt")
        assert found.pop("version").startswith(version)
        for (directory, form), result in found.items():
            name = Path(directory).name
            differences[version, name, form] = float((result - expected[name]).abs().max())
            if form == "base":
                assert differences[version, name, form] > 10 * ALLOWED, "training changed too little to be seen"
            else:
                assert differences[version, name, form] <= ALLOWED, differences
    summarise(f"largest differences of logits: {differences}")
    assert len(differences) == 2 * 3 * len(ADAPTED)

"""What setup.cfg, the constraints and the README claim of versions is one thing, and is what was tried."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, metrics, run_script, tiny_flags, train
from packaging.requirements import Requirement
from packaging.version import Version

from toolkit.runtime.environment import OLDEST_PYTHON

NOT_PINNED = {"triton"}
"""Torch's own builds for CUDA want one version of it each, which a pin would keep from being installed."""


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def ranges(*extras: str) -> dict[str, Requirement]:
    needed = [setup()["options"]["install_requires"], *(setup()["options.extras_require"][extra] for extra in extras)]
    found = {r.name.lower(): r for text in needed for line in text.split() if (r := Requirement(line))}
    return {name: requirement for name, requirement in found.items() if name not in NOT_PINNED}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name.lower(): Version(str(r.specifier).removeprefix("==")) for r in pinned}


def test_tested_versions_lie_in_the_ranges_of_the_package() -> None:
    versions, allowed = pins("constraints.txt"), ranges(*setup()["options.extras_require"])
    assert set(allowed) <= set(versions), "every requirement is pinned"
    for name, requirement in allowed.items():
        assert versions[name] in requirement.specifier, name


def test_the_lowest_versions_that_were_tried_are_the_lower_ends_of_the_ranges() -> None:
    allowed = ranges("bundled", "test")
    lower = {name: [Version(s.version) for s in r.specifier if s.operator == ">="] for name, r in allowed.items()}
    assert lower == {name: [version] for name, version in pins("constraints-lowest.txt").items()}


@pytest.mark.parametrize("broken", ["0.16.5", "0.19.2"])
def test_a_deepspeed_that_cannot_recompute_frozen_tensors_is_outside_the_range(broken: str) -> None:
    assert Version(broken) not in ranges()["deepspeed"].specifier


@pytest.mark.distributed
def test_parts_of_blocks_train_under_zero3_with_checkpointing(tiny_model: Path, tmp_path: Path) -> None:
    """DeepSpeed before 0.19.3 frees a frozen tensor that torch compares after the second forward pass (#8148)."""
    parts = ("--mask.train", "last:2/attention", "--train.gradient_checkpointing", "on", "--train.epochs", 1)
    alone, zero3 = tmp_path / "alone", tmp_path / "zero3"
    assert train(*tiny_flags(tiny_model, alone, *parts, "--train.gradient_accumulation_steps", 2)) == 0
    flags = tiny_flags(tiny_model, zero3, *parts, "--ds", ROOT / "ds_configs/zero3.json")
    result = run_script("launch/train.py", *flags, launcher=("deepspeed", "--num_gpus", "2"))
    assert result.returncode == 0, result.stderr
    assert metrics(zero3) == pytest.approx(metrics(alone), rel=1e-5)


def test_every_place_names_the_same_pythons() -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)$", setup()["metadata"]["classifiers"], flags=re.M)
    oldest, newest = classifiers[0], classifiers[-1]
    assert setup()["options"]["python_requires"] == f">={oldest}"
    assert setup()["mypy"]["python_version"] == oldest == ".".join(map(str, OLDEST_PYTHON))
    assert tomllib.loads((ROOT / "ruff.toml").read_text())["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"Python {oldest} to {newest}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {oldest}~{newest}" in (ROOT / "README.ko.md").read_text(encoding="utf-8")

"""A launch script that is started outside the environment says which command to run."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from toolkit.runtime.environment import PACKAGES, describe_missing, installation_advice

SCRIPTS = sorted((ROOT / "launch").glob("*.py"))


def start(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, str(script)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_packages_every_script_names_the_command_and_ends_with_2(script: Path) -> None:
    result = start(script, "-S")  # no site-packages
    assert result.returncode == 2
    assert re.search(r"^error: .* lacks accelerate, .* and \d+ more packages; run `.*$", result.stderr)
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_import_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "toolkit").mkdir()
    for name in ("launch/evaluate.py", "toolkit/__init__.py", "toolkit/runtime/environment.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "toolkit" / "commands").mkdir()
    (tmp_path / "toolkit" / "commands" / "cli.py").write_text("import toolkit.no_such_module\n")
    result = start(tmp_path / "launch" / "evaluate.py")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "toolkit.no_such_module" in result.stderr


def test_the_packages_that_are_looked_for_are_those_that_the_package_requires() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = re.findall(r"^[\w-]+", setup["options"]["install_requires"], flags=re.M)
    assert set(PACKAGES) == set(required)


def test_an_older_python_is_named() -> None:
    assert "(Python 3.9.18) is too old: expected Python 3.11 or newer" in describe_missing((3, 9, 18))
    assert describe_missing(sys.version_info[:3]) == ""


def test_the_remedy_is_the_environment_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    assert installation_advice(tmp_path, Path("/usr"), tmp_path).startswith("run `make train`")
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    assert (
        installation_advice(tmp_path, Path("/usr"), tmp_path)
        == "run `. .venv/bin/activate`, then the same command again"
    )
    assert str(activate) in installation_advice(tmp_path, Path("/usr"), tmp_path / "elsewhere")
    assert installation_advice(tmp_path, tmp_path / ".venv", tmp_path).startswith(
        "run `make train`"
    )  # entered, and incomplete

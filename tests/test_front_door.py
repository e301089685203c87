"""``pip install .`` gives a command that works in an empty folder, and the launch scripts call the same functions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, run_script

import toolkit
from toolkit.commands.frostline import VERBS
from toolkit.runtime.environment import installation_advice
from toolkit.runtime.shipped import PACKAGE, QUICKSTART, find_file, shipped_file

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def frostline(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command of a fresh environment with this package installed in it; it runs in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("toolkit", "recipes", "ds_configs", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # the libraries of this one, but not its pip
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", source]
    subprocess.run(pip, env=clean_environment(), check=True, capture_output=True, text=True)

    def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        empty = cwd or folder / "empty"
        empty.mkdir(exist_ok=True)
        environ = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
        command = [str(folder / "venv" / "bin" / "frostline"), *map(str, words)]
        return subprocess.run(command, cwd=empty, env=environ, capture_output=True, text=True, timeout=3600)

    return run


def test_there_is_a_verb_for_each_launch_script_and_each_has_a_function() -> None:
    assert {verb.replace("-", "_") for verb in VERBS} == {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert {name for name in toolkit.__all__ if name.islower()} == {
        path.stem for path in (ROOT / "launch").glob("*.py")
    } - {
        "submit",
        "rate",
        "report",
        "cache",
        "verify",
        "document",
    }  # toolkit.report is a package, whose write_report takes a comparison


def test_the_launch_scripts_hold_no_logic() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.py")}
    codes = {text.split('"""')[2].replace(f"commands.{verb} ", "commands.VERB ") for verb, text in texts.items()}
    same = {tuple(sorted(code.replace(", at_once=True", "").splitlines())) for code in codes}  # imports are sorted
    assert len(same) == 1
    assert sum("at_once" in code for code in codes) == 1  # plan's


@pytest.mark.slow
def test_help_names_every_verb_and_each_verb_answers_help(frostline: Command) -> None:
    for asked in (["--help"], []):
        top = frostline(*asked)
        assert top.returncode == 0
        assert all(f" {verb} {text} " in " ".join([*top.stdout.split(), ""]) for verb, text in VERBS.items())
    assert frostline("--version").stdout == f"frostline {toolkit.__version__}\n"
    for verb in VERBS:
        told = frostline(verb, "--help")
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith(f"usage: frostline {verb} ")
        assert f"frostline {verb}" in told.stdout.split("\n", 1)[1]
        assert "launch/" not in told.stdout
    wrong = frostline("trian")
    assert wrong.returncode == 2
    assert "invalid choice: trian (choose from train, data-check" in wrong.stderr.replace("'", "")


@pytest.mark.slow
def test_every_verb_works_in_an_empty_folder(frostline: Command, tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model.name_or_path", tiny_model, "--model.dtype", "float32", "--data.max_length", 512]
    flags += ["--mask.train", "last:4"]  # the recipe adapts more blocks than the tiny model has
    trained = frostline("train", *flags, "--train.max_steps", 2, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "no --config given: using " in trained.stderr
    assert "; next: frostline export runs/quickstart\n" in trained.stderr
    assert "examples/data/clinical_qa_ko.jsonl is not in " in trained.stderr
    run = tmp_path / "runs" / "quickstart"
    said = frostline("evaluate", "runs/quickstart", cwd=tmp_path)
    assert json.loads(said.stdout.splitlines()[-1])["held_out"], said.stderr
    answered = frostline("generate", run, "--question", "왜?", "--max-new-tokens", 2, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    assert frostline("export", run, cwd=tmp_path).stdout == f"{run}/export\n"
    planned = frostline("plan", *flags, "--ds", "ds_configs/zero2.json", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["engine"]["name"] == "zero-2", planned.stderr
    job = frostline("submit", *flags, "--output.dir", "x", "--dry-run", cwd=tmp_path)
    assert "python -m toolkit.commands.train --config" in job.stdout, job.stderr
    bad = frostline("train", "--config", "recipes/none.yaml")
    assert bad.returncode == 2
    assert "recipes/none.yaml: no such file" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_what_an_installation_lacks_is_asked_of_pip(tmp_path: Path) -> None:
    assert installation_advice(tmp_path / "site-packages", Path("/usr"), tmp_path) == (
        "run `python -m pip check`, then install what it names"
    )


def test_a_file_that_is_not_here_is_the_one_that_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_file(QUICKSTART) == ROOT / QUICKSTART
    assert find_file("ds_configs/zero2.json") == ROOT / "ds_configs" / "zero2.json"
    assert said == [f"ds_configs/zero2.json is not in {tmp_path}; using {ROOT}/ds_configs/zero2.json, which comes "
                    "with Frostline"]  # fmt: skip
    for unknown in ("ds_configs/none.json", "config/schema.py", "x.yaml", "", "a\0b", "x" * 5000, str(ROOT / "x")):
        assert find_file(unknown) == Path(unknown)
    (tmp_path / "recipes").mkdir()
    (tmp_path / QUICKSTART).write_text("{}")
    assert find_file(QUICKSTART) == Path(QUICKSTART), "what is here comes first"
    assert len(said) == 1


def test_the_package_holds_links_and_no_copies() -> None:
    for name in ("recipes", "ds_configs", "examples/data"):
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).resolve() == ROOT / name
        assert not (PACKAGE / name).readlink().is_absolute()


def test_a_launch_script_runs_from_any_folder(tmp_path: Path) -> None:
    result = run_script("launch/train.py", "--train.epochs", 0, cwd=tmp_path)
    assert result.returncode == 2
    assert f"1 fault in the recipe {ROOT}/recipes/quickstart.yaml and flags" in result.stderr

"""The documentation is true: links resolve, commands and flags exist, versions agree."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, run_script

import toolkit
from toolkit.config.recipe import field_paths
from toolkit.config.schema import RunConfig

PAGES = [
    ROOT / "README.md",
    ROOT / "README.ko.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples/data/README.md",
]
LAUNCHERS = ("python", "deepspeed", "torchrun", "accelerate", "srun")


@cache
def flags_of(script: str) -> frozenset[str]:
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    return frozenset(re.findall(r"(?<![\w-])--[\w.-]+", told.getvalue()))


def commands(page: Path) -> list[list[str]]:
    """Every command with a launch script or benchmark, in code blocks and inline code."""
    code = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    code += re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    lines = [line.split("   #")[0] for block in code for line in block.splitlines()]
    lines = [re.sub(r"^frostline ([a-z]+)", r"python launch/\1.py", line) for line in lines]
    split = [shlex.split(line) for line in lines if re.match(rf"({'|'.join(LAUNCHERS)}) ", line)]
    return [words for words in split if any(re.search(r"(launch|benchmarks)/\w+\.py$", word) for word in words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve_and_lines_fit(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(page: Path) -> None:
    for words in commands(page):
        script = next(word for word in words if re.search(r"(launch|benchmarks)/\w+\.py$", word))
        assert (ROOT / script).is_file(), f"{page.name}: {script}"
        for word in words[words.index(script) + 1 :]:
            if word.startswith("--"):
                assert word in flags_of(script), f"{page.name}: {script} has no {word}"
            elif re.match(r"(recipes|ds_configs)/", word):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["launch", "benchmarks"])
def test_every_script_answers_help_as_a_file(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            result = run_script(f"{folder}/{path.name}", "--help")
            assert (result.returncode, result.stdout[:6]) == (0, "usage:"), path.name


def test_the_readme_shows_every_command_there_is() -> None:
    shown = {word for words in commands(ROOT / "README.md") for word in words}
    assert {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipe_keys_that_are_mentioned_exist(page: Path) -> None:
    sections = "|".join(RunConfig.model_fields)
    mentioned = re.findall(rf"`(?:--)?((?:{sections})\.[a-z_]+)", page.read_text(encoding="utf-8"))
    files = {"config.yaml", "mask.json", "data.md", "train.py"}
    assert set(mentioned) - files <= set(field_paths())


def test_make_train_runs_exactly_the_readmes_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    command = "deepspeed launch/train.py --ds ds_configs/zero2.json"
    assert re.search(rf'^train: .*\n\tPATH="[^"]+" {command}$', makefile, flags=re.M)
    assert f"```bash\n{command}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_tiers_run_every_test_once_and_ci_runs_both() -> None:
    makefile, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/run"))
    tiers = dict(re.findall(r'^(test[\w-]*): .*\n\t\$\(PYTEST\) -m (slow|"not slow")$', makefile, flags=re.M))
    assert tiers == {"test": '"not slow"', "test-slow": "slow"}
    assert "\ntest-all:\n\t$(MAKE) test\n\t$(MAKE) test-slow\n" in makefile
    assert re.findall(r"^make .*", ci, flags=re.M) == ["make docs", "make test", "make test-slow", "make check"]


def test_a_test_of_the_fast_tier_cannot_start_ranks() -> None:
    with pytest.raises(AssertionError, match="a test that starts torchrun is marked as distributed"):
        run_script("launch/train.py", launcher=("torchrun",))


def test_the_changelog_knows_this_version() -> None:
    assert f"## {toolkit.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_of_the_build_machine_is_in_the_repository() -> None:
    for path in [*ROOT.glob("*.*"), *ROOT.glob("[a-z]*/**/*")]:
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".json", ".cfg", ".toml", ".txt", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(work|home|root)/", text), path


def test_every_promise_of_the_reliability_page_is_held_by_a_test_that_exists() -> None:
    rows = [
        line for line in (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines() if "`test_" in line
    ]
    named = [name for line in rows if line.startswith("|") for name in re.findall(r"`(test_\w+)`", line)]
    assert len(named) > 30
    there = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert set(named) <= there

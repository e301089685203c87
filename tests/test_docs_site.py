"""The documentation is a site that builds without a warning, and the architecture page is true to the code."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from test_architecture import LAYERS

import toolkit
from toolkit.config.recipe import field_paths

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; mkdocs fails on a link, an anchor, an API name or a page that is not there."""
    if importlib.util.find_spec("mkdocs") is None and not os.environ.get("FROSTLINE_REQUIRE_DOCS"):
        pytest.skip('needs mkdocs: pip install -c constraints.txt -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site_and_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        text = (site / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="(https?:)?//', text), page.name


def test_the_reference_has_every_public_name_and_every_recipe_key(site: Path) -> None:
    api = (site / "api.html").read_text(encoding="utf-8")
    recipe = html.unescape((site / "recipe.html").read_text(encoding="utf-8"))
    for name in set(toolkit.__all__) - {"FrostlineError", "RunConfig"}:
        assert f'id="toolkit.{name}"' in api
    for name in ("runtime.errors.FrostlineError", "Comparison.loss", "PlanReport.plan", "TrainResult.run"):
        assert f'id="toolkit.{name}"' in api
    for path, info in field_paths().items():
        assert f".{path.split('.')[1]}" in recipe
        assert info.description.split("\n")[0].split(" (")[0].split(":")[0].strip() in re.sub(r"<[^>]+>", "", recipe)


def test_every_page_is_in_the_navigation() -> None:
    text = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(text) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of the architecture page."""
    section = ARCHITECTURE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_layers_on_the_page_are_those_that_the_imports_keep() -> None:
    assert [set(re.findall(r"`(\w+)`", packages)) for _, packages, _ in rows("Layers")] == LAYERS
    assert [number for number, _, _ in rows("Layers")] == [str(n) for n in range(1, len(LAYERS) + 1)]
    named = {name for row in rows("From a recipe to a model") for name in re.findall(r"`(\w+)`", row[1])}
    assert named <= {name for layer in LAYERS for name in layer}


def test_the_walk_of_a_step_is_in_the_code_and_short() -> None:
    walk, called = rows("The walk of a step"), {"main"}
    for file, function, calls in walk:
        text = (ROOT / file.strip("`")).read_text(encoding="utf-8")
        if function:
            name = function.strip("`")
            assert f"def {name}(" in text, f"{file} has no {name}"
            is_called = name in called or name in ("__call__", "forward")  # which calling the object calls
            assert is_called, f"nothing before calls {name}"
        for call in re.findall(r"`([\w.]+)`", calls):
            assert re.search(rf"\b{re.escape(call)}\b", text), f"{file} does not call {call}"
            called.add(call.split(".")[-1])
    assert len({file for file, _, _ in walk}) <= 10


def test_every_file_that_the_docs_name_exists() -> None:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    pages += [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]  # which speaks of the past
    folders = "benchmarks|docs|ds_configs|examples|launch|recipes|tests|toolkit"
    for page in pages:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_what_contributing_sends_people_to_is_there() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for heading in ("Add a selector", "Add an optimizer", "Add a task"):
        steps = guide.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        files = [ROOT / name for name in re.findall(r"`(toolkit/[\w/]+\.py)`", steps)]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        names = re.findall(r"`([A-Za-z_]+)`", steps)
        assert files
        assert names
        for name in names:
            assert re.search(rf"\b{name}\b", code), f"{heading}: {name}"


def test_the_python_that_the_pages_show_uses_public_names() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
        compile(code, page.name, "exec")
        used = set(re.findall(r"toolkit\.(\w+)", code))
        assert used, page.name
        assert used <= set(toolkit.__all__), page.name


def test_every_name_of_the_package_that_the_docs_use_exists() -> None:
    for page in [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]:
        for dotted in re.findall(r"`(toolkit(?:\.\w+)+)`", page.read_text(encoding="utf-8")):
            parts = dotted.split(".")
            module = ROOT.joinpath(*parts)
            if module.is_dir() or module.with_suffix(".py").is_file():
                continue
            owner = module.parent.with_suffix(".py") if len(parts) > 2 else module.parent / "__init__.py"
            assert owner.is_file(), f"{page.name}: {dotted}"
            assert re.search(rf"\b{parts[-1]}\b", owner.read_text(encoding="utf-8")), f"{page.name}: {dotted}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == toolkit.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)

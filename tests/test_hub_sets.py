"""Hub data sets with configurations and revisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import ROWS, as_jsonl
from stub_hub import Repository, StubHub
from test_hub import hub, stored  # noqa: F401 - fixtures
from test_sources import put, with_lists

from toolkit.data.sources import Source, iter_rows
from toolkit.runtime.errors import DataError

SET = "org/configured"
CARD = """---
configs:
- config_name: labeled
  data_files: [{split: train, path: labeled.jsonl}]
- config_name: unlabeled
  data_files: [{split: train, path: unlabeled.jsonl}]
---
"""


@pytest.fixture
def configured(hub: StubHub, tmp_path: Path) -> str:  # noqa: F811
    put(tmp_path / "set" / "README.md", CARD)
    put(tmp_path / "set" / "labeled.jsonl", as_jsonl(ROWS[:4]))
    put(tmp_path / "set" / "unlabeled.jsonl", as_jsonl(ROWS[4:]))
    hub.repositories[f"datasets/{SET}"] = Repository(tmp_path / "set", "c" * 40)
    return SET


def test_a_configuration_and_a_revision_are_named(configured: str) -> None:
    source = Source(configured, configuration="unlabeled", revision="c" * 40)
    assert with_lists(list(iter_rows(source))) == ROWS[4:]
    assert all(file.suffix == ".arrow" and file.is_file() for file in source.files)


def test_without_a_configuration_those_there_are_are_named(configured: str) -> None:
    with pytest.raises(DataError, match=r"several configurations, and data\.name names none .*: labeled, unlabeled$"):
        list(iter_rows(Source(configured)))
    with pytest.raises(DataError, match=r"data\.name is 'x', but .* has no such .* one of: labeled, unlabeled$"):
        list(iter_rows(Source(configured, configuration="x")))


def test_an_unknown_revision_is_refused(configured: str) -> None:
    with pytest.raises(DataError, match=r"has not the revision that is asked for|cannot be loaded"):
        list(iter_rows(Source(configured, configuration="labeled", revision="d" * 40)))

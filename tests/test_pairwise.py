"""Every pair of values of recipe keys, launchers and DeepSpeed files, through the whole life of a run.

All of it has one seed; a part with a seed that changes from day to day tries other rows. PAIRWISE_SEED sets both.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from covering import Row, all_pairs, cover, pairs_of
from helpers import ENGLISH, make_tiny_model, run_script, tiny_llama
from pairwise_table import DS, LAUNCHERS, NOT_COMBINED, REFUSALS, TABLE, USUAL, VALUES
from pydantic import BaseModel

from toolkit.config.mask_schema import LoraConfig, MaskGroup, MaskPhase, RowsConfig
from toolkit.config.rotation_schema import RotationConfig
from toolkit.config.schema import MaskConfig, RunConfig
from toolkit.mask.rotation import resolve_rotation
from toolkit.models.anatomy_detection import detect_anatomy

PART = 4
"""Rows of the part."""


def seed(usual: str = "all pairs") -> str:
    return os.environ.get("PAIRWISE_SEED", usual)


def make_files(folder: Path) -> None:
    """Six rows in three forms, once with a bad one more, two held-out rows, a test row, a mixture, and a model."""
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: len(json.dumps(row)))
    rows = [{**row, "patient": f"p{at}", "label": "ab"[at % 2]} for at, row in enumerate(rows)]
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines[:6]), encoding="utf-8")
    (folder / "bad.jsonl").write_text("\n".join([*lines[:6], '{"QUESTION": ""}']), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(lines[6:8]), encoding="utf-8")
    (folder / "test.jsonl").write_text(lines[10], encoding="utf-8")
    (folder / "more_0.jsonl.gz").write_bytes(gzip.compress(lines[8].encode()))
    chats = []
    for row in rows[:6]:
        texts = ("be brief", row["QUESTION"][:40], "yes", "sure?", row["LONG_ANSWER"][:40])
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        chats.append(json.dumps({"messages": messages, "patient": row["patient"], "label": row["label"]}))
    (folder / "chat.jsonl").write_text("\n".join(chats), encoding="utf-8")
    sides = {
        "prompt": [{"role": "user", "content": rows[9]["QUESTION"]}],
        "completion": [{"role": "assistant", "content": rows[9]["LONG_ANSWER"]}],
    }
    (folder / "prompts.jsonl").write_text(json.dumps({**rows[9], **sides}), encoding="utf-8")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, ["QUESTION", "CONTEXTS", "LONG_ANSWER", "patient", "label"], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows({**row, "CONTEXTS": json.dumps(row["CONTEXTS"])} for row in rows[:6])
    make_tiny_model(folder / "model")


def live(rows: list[tuple[int, Row]], folder: Path) -> dict[int, str | None]:
    """What was wrong with each row, or none; the rows of a launcher share its processes."""
    found: dict[int, str | None] = {}
    for launcher, command in {**LAUNCHERS, "python": (sys.executable,)}.items():
        own = [(number, row) for number, row in rows if row["launcher"] == launcher]
        if not own:
            continue
        place = folder / launcher.replace(" ", "-")
        place.mkdir()
        make_files(place)
        (place / "plan.json").write_text(json.dumps({"usual": USUAL, "rows": own}))
        result = run_script("tests/pairwise_worker.py", place, launcher=command)
        outcomes = place / "outcomes.jsonl"
        lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []
        found |= {line["row"]: line["wrong"] for line in map(json.loads, lines)}
        lost = result.stdout[-1000:] + result.stderr[-3000:]
        found |= {number: f"its process ended: {lost}" for number, _ in own if number not in found}
    return found


def try_rows(rows: list[Row], chosen_by: str, folder: Path, summarise: Callable[[str], None]) -> None:
    """Live rows, print the table, and fail with what was wrong."""
    outcomes = live(list(enumerate(rows)), folder)
    wrong = [f"{rows[number]}\n{what}" for number, what in sorted(outcomes.items()) if what is not None]
    covered = set().union(*(pairs_of(row) for number, row in enumerate(rows) if outcomes[number] is None))
    owed = all_pairs(TABLE, REFUSALS)
    summarise(
        f"pairwise, PAIRWISE_SEED={chosen_by!r}: {len(TABLE)} factors ({len(VALUES)} recipe keys), "
        f"{sum(map(len, TABLE.values()))} values, {len(covered & owed)} of {len(owed)} pairs covered, "
        f"{len(REFUSALS)} refused by name, {len(rows)} runs"
    )
    assert not wrong, "\n\n".join(wrong)


def keys(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """All recipe keys, with their sections."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{before}{name}.")
        else:
            yield before + name


def test_every_recipe_key_is_combined_or_says_why_not() -> None:
    assert set(keys(RunConfig)) == set(VALUES) | set(NOT_COMBINED)
    assert all(len(values) >= 2 for values in VALUES.values())
    groups = json.dumps(VALUES["mask.train"])
    assert all(f'"{name}"' in groups for name in MaskGroup.model_fields)
    assert all(f'"{name}"' in groups for name in LoraConfig.model_fields)
    assert all(f'"{field.alias or name}"' in groups for name, field in RowsConfig.model_fields.items())
    phases = json.dumps(VALUES["mask.schedule"])
    assert all(f'"{name}"' in phases for name in MaskPhase.model_fields)
    rotations = json.dumps(VALUES["mask.rotation"])
    assert all(f'"{name}"' in rotations for name in RotationConfig.model_fields)


def test_the_rows_have_every_pair_that_is_not_refused() -> None:
    rows = cover(TABLE, seed(), REFUSALS)
    assert set().union(*map(pairs_of, rows)) == all_pairs(TABLE, REFUSALS)
    assert len(rows) < 80, "as a product there were more than 10^20"
    assert rows == cover(TABLE, seed(), REFUSALS)


def test_every_rotation_rotates_in_the_shortest_run() -> None:
    """What two turns draw follows from the seed; a run whose turns all draw the same blocks is refused."""
    anatomy = detect_anatomy(tiny_llama(tied=False))
    tried = 0
    for pair in map(dict, all_pairs(TABLE, REFUSALS)):
        if set(pair) == {"mask.rotation", "mask.train"} and pair["mask.rotation"] != "none":
            given = {key.removeprefix("mask."): VALUES[key][name] for key, name in pair.items()}
            resolve_rotation(MaskConfig.model_validate(given), anatomy).turns(2)
            tried += 1
    assert tried >= 8


@pytest.mark.slow
def test_a_part_of_all_pairs_lives(tmp_path: Path, summarise: Callable[[str], None]) -> None:
    """In one process without DeepSpeed, whose kernel takes long to compile."""
    today = seed(datetime.date.today().isoformat())
    rows = cover({**TABLE, "launcher": ["python"], "ds": ["none"]}, today, REFUSALS)
    try_rows(rows[:PART], today, tmp_path, summarise)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_pairs_live(tmp_path: Path, summarise: Callable[[str], None]) -> None:
    """The longest test there is: some 75 lives of a run."""
    assert {f"{name}.json" for name in DS if name != "none"} < {path.name for path in Path("ds_configs").iterdir()}
    try_rows(cover(TABLE, seed(), REFUSALS), seed(), tmp_path, summarise)


@pytest.mark.slow
def test_refused_combinations_are_refused_by_name(tmp_path: Path) -> None:
    """Each with the usual values of everything else, so that nothing else can be meant."""
    pairs = list(REFUSALS.items())
    rows = [(number, {**USUAL, **dict(pair)}) for number, (pair, _) in enumerate(pairs)]
    for number, said in live(rows, tmp_path).items():
        pair, message = pairs[number]
        assert said is not None, f"{sorted(pair)} was not refused"
        assert said.startswith("refused: "), said
        assert re.search(message, said), f"{sorted(pair)} expected {message!r}, found {said}"

"""The short words for rows of tables in ``plan.py --compare``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_here, tiny_flags

from toolkit.config.mask_schema import MaskConfig
from toolkit.planning.comparison import parse_mask
from toolkit.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("rows embeddings from:49152", {"select": ["embeddings"], "from": 49152}),
        ("rows embeddings+head added", {"select": ["embeddings", "head"], "from": "added"}),
        ("rows head from:3,to:8", {"select": ["head"], "from": 3, "to": 8}),
        ("rows head ids:3,8", {"select": ["head"], "ids": [3, 8]}),
    ],
)
def test_a_word_for_rows_is_the_entry_of_a_recipe(text: str, entry: dict[str, object]) -> None:
    assert parse_mask(f"last:2 {text}", MaskConfig()) == MaskConfig.model_validate(
        {"train": ["last:2", {"rows": entry}]}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows", "'rows embeddings added'"), ("rows embeddings", "'rows embeddings added'"),
        ("rows embeddings from", "'rows embeddings added'"), ("rows embeddings 5", "'rows embeddings added'"),
        ("rows embeddings first:5", "first"), ("rows embeddings from:x", "is no row"),
        ("rows embeddings ids:3,-1", "greater than or equal to 0"), ("rows embeddings from:9,to:3", "backwards"),
    ],
)  # fmt: skip
def test_what_is_no_word_for_rows_is_told_the_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--compare '{text}' is no mask: .*{message}"):
        parse_mask(text, MaskConfig())


def test_rows_stand_beside_adapters_with_the_plan_of_their_entry(tiny_model: Path) -> None:
    flags = [*tiny_flags(tiny_model, Path("unused")), "--mask.tied", "both", "--json"]
    found = json.loads(run_here("plan.py", *flags, "--compare", "rows embeddings from:90", "lora last:2").stdout)
    entry = "{rows: {select: embeddings, from: 90}}"
    own = json.loads(run_here("plan.py", *flags, "--mask.train", entry).stdout)
    assert found[0]["memory"] == own["memory"]["peak"]
    assert (found[0]["boundary"], found[1]["boundary"]) == (0, 4)

"""What tests of rows share: models whose tables are full, and rows of data with new tokens in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import ENGLISH, make_tokenizer, tiny_llama

TOKENS = ("<triage>", "<urgent>")
ADD = ("--model.add_tokens", *TOKENS)
FULL = 500
"""Tokens of the tests' tokenizer, and rows of the tables of ``full_model``."""


def full_model(directory: Path, tied: bool = True) -> Path:
    """A model whose tables have a row for each token and no more."""
    model, tokenizer = tiny_llama(tied), make_tokenizer()
    assert len(tokenizer) == FULL
    model.resize_token_embeddings(FULL, mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def rows_with_tokens(path: Path) -> Path:
    """The English sample with a new token in each question and in each answer."""
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["QUESTION"], row["LONG_ANSWER"] = f"<triage> {row['QUESTION']}", f"<urgent>{row['LONG_ANSWER']}"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def rows(*select: str, **settings: Any) -> dict[str, Any]:
    """An entry of rows: those that were added, unless ``settings`` say others."""
    return {"rows": {"select": list(select), **(settings or {"from": "added"})}}

"""PubMedQA's files as they are published, of made-up size."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import ENGLISH

LABELS = ("yes", "no", "maybe")


def write_pubmedqa(folder: Path) -> None:
    """Write 60 questions to train on and 60 to test, as ``ori_pqal.json`` and ``test_ground_truth.json`` have them."""
    texts = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    rows = {}
    for number in range(120):
        text = texts[number % len(texts)]
        rows[str(1000 + number)] = {
            "QUESTION": f"{number}: {text['QUESTION']}", "CONTEXTS": [context[:200] for context in text["CONTEXTS"]],
            "LABELS": ["METHODS"], "LONG_ANSWER": text["LONG_ANSWER"], "final_decision": LABELS[number % 3],
        }  # fmt: skip
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    truth = {key: row["final_decision"] for key, row in list(rows.items())[::2]}
    (folder / "test_ground_truth.json").write_text(json.dumps(truth))

"""docs/own-task.md is followed to the letter: its rows, its task file and its commands, with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from helpers import ROOT, run_here

PAGE = (ROOT / "docs" / "own-task.md").read_text(encoding="utf-8")
FILES = {"json": "summaries.jsonl", "yaml": "discharge.yaml"}
"""What the page says to save each block as, by its language."""


def test_the_page_is_followed_to_the_letter(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language, name in FILES.items():
        (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
        assert f"as `{name}`" in PAGE
        Path(name).write_text(block, encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in commands] == ["launch/train.py", "launch/evaluate.py", "launch/generate.py"]
    small = ["--model.name_or_path", tiny_model, "--model.dtype", "float32", "--mask.train", "last:2",
             "--train.max_steps", 2, "--output.sample_answers", 0, "--output.report", "[]"]  # fmt: skip
    told = ""
    for words in commands:
        more = small if words[1] == "launch/train.py" else []
        done = run_here(words[1], *words[2:], *more)
        assert done.returncode == 0, done.stderr
        told += done.stdout
    for metric in ("valid", "exact_match", "constrained/valid", "constrained/fields"):
        assert re.search(rf"^{metric}( \(declared by the task\))?$", told, flags=re.MULTILINE), metric
    scores = [model["scores"] for model in json.loads(told.splitlines()[-2])["models"]]
    assert [one["constrained/valid"]["value"] for one in scores if "constrained/valid" in one] == [1.0, 1.0]
    schema = yaml.safe_load(Path("discharge.yaml").read_text(encoding="utf-8"))["output"]["schema"]
    lines = Path("fields.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 8
    for line in lines:
        jsonschema.validate(json.loads(json.loads(line)["ANSWER"]), schema)

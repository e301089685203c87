"""Entries of LLaMA-Factory's dataset_info.json as tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tasks import MESSAGES, read, said

from toolkit.runtime.errors import DataError
from toolkit.tasks.choose import load_task

INFO = {
    "mine": {"file_name": "x.json", "columns": {"prompt": "q", "query": "ctx", "response": "a", "history": "h"}},
    "chat": {"formatting": "sharegpt", "columns": {"messages": "talk"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "patient", "assistant_tag": "doctor"}},
    "pairs": {"ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "seen": {"formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "open": {"formatting": "openai", "columns": {"messages": "m"},
             "tags": {"role_tag": "role", "content_tag": "content"}},
    "odd": {"formatting": "chatml", "columns": {"messages": "m"}},
    "calls": {"columns": {"tools": "t"}},
}  # fmt: skip


def test_entries_of_llama_factorys_dataset_info_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(INFO))
    task = {"dataset_info": str(path), "name": "mine"}
    sample = read({"q": "i", "ctx": "x", "a": "o", "h": [["a", "b"]]}, task)
    assert said(sample) == [("user", "a"), ("assistant", "b"), ("user", "i\nx"), ("assistant", "o")]
    talk = [{"who": "patient", "says": "q"}, {"who": "doctor", "says": "a"}]
    assert said(read({"talk": talk}, {**task, "name": "chat"})) == [("user", "q"), ("assistant", "a")]
    assert said(read({"m": MESSAGES}, {**task, "name": "open"})) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    with_tools = read({"instruction": "i", "output": "o", "t": '[{"name": "f"}]'}, {**task, "name": "calls"})
    assert with_tools.tools == ({"name": "f"},)
    for name, message in (
        ("odd", "formatting chatml; expected alpaca"),
        ("pairs", "preference pairs"),
        ("seen", "has images"),
        ("min", "did you mean mine?"),
    ):
        with pytest.raises(DataError, match=message):
            load_task({**task, "name": name})

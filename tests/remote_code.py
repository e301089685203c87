"""A tiny model whose class ships with it as code that transformers does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def with_remote_code(model: Path, directory: Path) -> Path:
    """A copy of a Llama that is of a type of its own."""
    shutil.copytree(model, directory)
    (directory / "tiny_code.py").write_text(_CODE)
    values = json.loads((directory / "config.json").read_text())
    values |= {
        "model_type": "tiny_remote", "architectures": ["TinyForCausalLM"],
        "auto_map": {"AutoConfig": "tiny_code.TinyConfig", "AutoModelForCausalLM": "tiny_code.TinyForCausalLM"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    return directory

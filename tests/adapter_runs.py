"""What tests of adapters share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import make_tokenizer
from zoo import make

IDS = torch.arange(5, 65).reshape(2, 30)


def mask(*entries: Any) -> list[str]:
    """Flags of a mask with these entries."""
    return ["--mask.train", *(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)]


def logits(model: Any) -> torch.Tensor:
    """A model's logits on ``IDS``."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def save_of_zoo(name: str, directory: Path, **more: Any) -> Path:
    """Save a model of the zoo with room for the sample rows and their tokens."""
    positions = dict.fromkeys(("max_position_embeddings", *(["n_positions"] if name == "gpt2" else [])), 512)
    make(name, vocab_size=512, **positions, **more).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory

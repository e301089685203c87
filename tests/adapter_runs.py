"""What tests of adapters share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer, masters_of, metrics
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


def checkpoint_of(run: Path) -> Path:
    """The latest checkpoint of a run."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def back_to(run: Path, step: int) -> None:
    """Leave a run as it was after a step that it has a checkpoint of."""
    (run / "checkpoints" / "latest").write_text(f"step-{step}")
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def assert_learned_alike(run: Path, other: Path) -> None:
    """Two runs in float32 took the same steps and ended with the same masters."""
    assert metrics(run) == pytest.approx(metrics(other), abs=1e-5)
    expected = masters_of(checkpoint_of(other))
    for name, tensor in masters_of(checkpoint_of(run)).items():
        assert torch.allclose(tensor, expected[name], atol=2e-5), name

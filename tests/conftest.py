"""Shared fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: a Llama of 6 blocks with a tied head and random float32 weights."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")

"""Fingerprint what a checkpoint belongs to, and list the versions that wrote it."""

from __future__ import annotations

import platform
from importlib import metadata

from transformers import PreTrainedTokenizerBase

import toolkit
from toolkit.checkpoint.delta import Base
from toolkit.data.dataset import Dataset
from toolkit.data.tokenizer_digest import digest, tokenizer_digest
from toolkit.mask.schedule import Schedule

_LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "safetensors", "bitsandbytes")


def fingerprints(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, base: Base, schedule: Schedule
) -> dict[str, str]:
    """Return the SHA-256 of rows, tokenizer, chat template, base model and mask schedule, by name."""
    return {
        "data": dataset.fingerprint,
        **({"test": dataset.test_fingerprint} if len(dataset.test) else {}),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest(tokenizer.chat_template or ""),
        "base": base.sha256,
        "schedule": schedule.sha256,
    }


def versions() -> dict[str, str]:
    """Return the versions of this toolkit, Python and the libraries that compute."""
    return {
        "frostline": toolkit.__version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def version(name: str) -> str:
    """Return the version of an installed library, or ``not installed``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"

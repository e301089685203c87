"""Fingerprint what a checkpoint belongs to, and list the versions that wrote it."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata

from transformers import PreTrainedTokenizerBase

import toolkit
from toolkit.checkpoint.delta import Base
from toolkit.data.dataset import Dataset
from toolkit.mask.schedule import Schedule

_LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "safetensors", "bitsandbytes")


def fingerprints(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, base: Base, schedule: Schedule
) -> dict[str, str]:
    """Return the SHA-256 of rows, tokenizer, chat template, base model and mask schedule, by name."""
    return {
        "data": dataset.fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest(tokenizer.chat_template or ""),
        "base": base.sha256,
        "schedule": schedule.sha256,
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a tokenizer's rules, vocabulary and special tokens, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # a call may leave its own settings behind
            rules.pop(passing, None)
    return digest([rules, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])


def versions() -> dict[str, str]:
    """Return the versions of this toolkit, Python and the libraries that compute."""
    return {
        "frostline": toolkit.__version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def digest(value: object) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def version(name: str) -> str:
    """Return the version of an installed library, or ``not installed``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"

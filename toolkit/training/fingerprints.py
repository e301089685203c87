"""What a checkpoint belongs to: fingerprints of all that decides what is learned, and versions for the record."""

from __future__ import annotations

import hashlib
import json
import platform

from transformers import PreTrainedTokenizerBase

import toolkit
from toolkit.checkpoint.delta import Base
from toolkit.data.dataset import Dataset
from toolkit.mask.schedule import Schedule
from toolkit.training.consistency import version

_LIBRARIES = ("torch", "transformers", "tokenizers", "deepspeed", "numpy", "safetensors", "bitsandbytes")


def fingerprints(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, base: Base, schedule: Schedule
) -> dict[str, str]:
    """SHA-256 of each of them, by name."""
    return {
        "data": dataset.fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest(tokenizer.chat_template or ""),
        "base": base.sha256,
        "schedule": schedule.sha256,
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's rules, vocabulary and special tokens, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # a call may leave its own settings behind
            rules.pop(passing, None)
    return digest([rules, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])


def versions() -> dict[str, str]:
    """Of this toolkit, Python and the libraries that compute."""
    return {
        "frostline": toolkit.__version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def digest(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

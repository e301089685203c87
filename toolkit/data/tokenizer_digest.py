"""Digest what a tokenizer makes of a text, and what the tokens of a row depend on in all."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolkit.models.identity import remote_code


def digest(value: object) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of what ``tokenizer_digest`` is of, in a quarter of its time; it may differ between versions."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer_digest(tokenizer)
    rules = backend.to_str()
    rules = rules[max(rules.find('"added_tokens"'), 0) :]  # after truncation and padding
    return digest([rules, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])


def tokenizer_code(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer's class, with the SHA-256 of its source where it came with the model."""
    kind = type(tokenizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith("transformers."):
        return name
    if came_with_it := remote_code([kind]):
        return f"{name} {digest(came_with_it)}"
    source = inspect.getsourcefile(kind)
    return f"{name} {hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ''}"

"""Name the parts of a base model beside its weights, and say which of them differ from those of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers
from transformers import PreTrainedModel

from toolkit.data.tokenizer_digest import digest, tokenizer_digest
from toolkit.models.identity import config_values, generation_values, module_classes, remote_code
from toolkit.models.load import LoadedModel

TO_COMPUTE = ("config", "code")
"""Parts that hidden states and logits of the same token ids depend on."""
TO_READ = (*TO_COMPUTE, "tokenizer", "tokenizer_code")
"""Parts that the meaning of a row depends on, however it is rendered."""
UNKNOWN_PARTS = (
    "an earlier version wrote it and recorded of the base model the weights alone; its config.json and code are not "
    "compared"
)
"""What is said of a base without ``identity``."""
_NAMES = {
    "config": "config.json", "code": "the code that comes with the model", "tokenizer": "the tokenizer",
    "tokenizer_code": "the code that comes with the tokenizer", "chat_template": "the chat template",
    "generation_config": "generation_config.json",
}  # fmt: skip
_MOST_NAMED = 6


def computing_parts(model: PreTrainedModel) -> dict[str, Any]:
    """Return the parts ``TO_COMPUTE`` of a loaded model."""
    return {
        "config": config_values(model.config),
        "code": remote_code(module_classes(model)),
        "transformers": transformers.__version__,
    }


def identify(loaded: LoadedModel) -> dict[str, Any]:
    """Return the parts of a base model as ``base.json`` keeps them: readable values, or their SHA-256.

    It is called before a mask is applied. The chat template is that which the tokenizer has now.
    """
    return {
        **computing_parts(loaded.model),
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "tokenizer_code": remote_code([type(loaded.tokenizer)]),
        "chat_template": digest(loaded.tokenizer.chat_template or ""),
        "generation_config": generation_values(loaded.model, loaded.ends),
    }


def differences(then: Mapping[str, Any] | None, now: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Describe each of ``parts`` that is not what it was, in one line; a part that either side lacks is not compared.

    ``then`` and ``now`` are what ``identify`` returned; None for a base that an earlier version recorded.
    """
    if then is None:
        return []
    same_version = then.get("transformers") == now.get("transformers")
    found = []
    for part in parts:
        old, new = then.get(part), now.get(part)
        if old is None or new is None or old == new:
            continue
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            found.append(f"{_NAMES[part]} is another (SHA-256 {str(old)[:12]} then, {str(new)[:12]} now)")
        elif changes := list(_changes(old, new, same_version or part != "config")):
            more = f" and {len(changes) - _MOST_NAMED} more" if len(changes) > _MOST_NAMED else ""
            found.append(f"{_NAMES[part]} has changed: {'; '.join(changes[:_MOST_NAMED])}{more}")
    return found


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], counts_missing: bool, above: str = "") -> Iterator[str]:
    """Yield the settings that differ; one that a side lacks only if ``counts_missing``: versions add and drop keys."""
    for key in dict.fromkeys([*then, *now]):
        if key in then and key in now:
            old, new = then[key], now[key]
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                yield from _changes(old, new, counts_missing, f"{above}{key}.")
            elif old != new:
                yield f"{above}{key} was {_short(old)}, is {_short(new)}"
        elif counts_missing:
            yield f"{above}{key} was {_short(then.get(key))}, is {_short(now.get(key))}"


def _short(value: object) -> str:
    text = "not there" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""The chat template of a run: the model's own, or the recipe's, with the recipe's switches in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from toolkit.config.data_schema import DataConfig
from toolkit.data.chat_rendering import Rendering
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.shipped import find_file

log = logging.getLogger("frostline")

NAMED = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Templates by the names that ``data.chat_template`` takes."""
_LONGEST_TEMPLATE = 16 * 2**20  # bytes; a tokenizer_config.json may list thousands of tokens beside it
_MARKS = {"chatml": "<|im_end|>"}
"""The mark that ends a turn, by template."""


def rendering_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """Return how a recipe renders conversations, and give the tokenizer its chat template; see ``use_chat_template``.

    Raises:
        UsageError: as ``use_chat_template``.
    """
    template = use_chat_template(tokenizer, data)
    return Rendering(template=template, parses_special=data.special_tokens == "parse")


def use_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str | None:
    """Give the tokenizer the recipe's chat template and switches; return that template, None if both are the model's.

    Raises:
        ConfigError: a switch is no name, or the model has no chat template that it could switch.
        DataError: the file cannot be read, or holds no template.
    """
    if data.chat_template is None and not data.template_kwargs:
        return None
    template = str(tokenizer.chat_template or "")
    if data.chat_template is not None:
        template = NAMED.get(data.chat_template) or _read_template(data.chat_template)
        mark = _MARKS.get(data.chat_template)
        if mark is not None and mark not in tokenizer.get_vocab():
            log.info(
                "data.chat_template %s: the tokenizer has no token %s, so it is spelled in several; model.add_tokens "
                "adds it", data.chat_template, mark,
            )  # fmt: skip
    if not template:
        raise ConfigError(
            ["data.template_kwargs is given, but the model has no chat template; name one in data.chat_template"],
            "recipe",
        )
    switches = _switches(data.template_kwargs)
    for name in data.template_kwargs:
        if not re.search(rf"\b{name}\b", template.removeprefix(switches)):
            log.warning("data.template_kwargs sets %s, which the chat template does not use; it has no effect", name)
    tokenizer.chat_template = switches + template.removeprefix(switches)
    return str(tokenizer.chat_template)


def _read_template(path: str) -> str:
    """Read a template file, plain or as chat_template of a tokenizer_config.json."""
    file = find_file(path)
    try:
        text = read_regular(file, _LONGEST_TEMPLATE)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.chat_template is {path}, which is not {' or '.join(NAMED)}, and no file that can be read ({error})"
        ) from None
    if file.suffix == ".json":
        try:
            text = json.loads(text)["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: holds no text at chat_template; expected a template file, or such a JSON"
            ) from None
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except (TemplateError, TypeError) as error:
        line = getattr(error, "lineno", None)
        raise DataError(f"{path}{f' line {line}' if line else ''}: is no chat template: {error}") from None
    return text


def _without_generation(text: str) -> str:
    """Return a template without transformers' own tags around answers, which jinja alone does not know."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)


def _switches(values: Mapping[str, Any]) -> str:
    """Return template text that sets variables which the caller of the template does not.

    It stands in the template itself, so that whoever renders it, an export's user too, gets what was trained. The final
    ``{{ '' }}`` keeps the template's first line break.
    """
    if bad := [name for name in values if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
        raise ConfigError([f"data.template_kwargs has {bad[0]!r}; expected names such as enable_thinking"], "recipe")
    parts = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif -%}}"
        for name, value in values.items()
    ]
    return "".join(parts) + ("{{ '' }}" if parts else "")


def _literal(value: Any) -> str:
    """Return a value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)

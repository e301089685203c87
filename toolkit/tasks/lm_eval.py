"""Read lm-eval's task files: questions with options, whose prompt, options and right one are Jinja templates.

The rules are those of lm-eval 0.4.13 for ``output_type: multiple_choice`` without examples before the question.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.config import yaml_text
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.runtime.paths import read_regular
from toolkit.tasks.sample import RowFaultError

log = logging.getLogger("frostline")

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""Chat template of a prompt without one: as text, with a blank before an option."""

_MARKS = {"output_type", "doc_to_text", "doc_to_choice", "dataset_path", "include"}
"""Keys by which a task file is known to be lm-eval's."""
_READ = {"task", "output_type", "dataset_path", "dataset_kwargs", "test_split", "validation_split", "doc_to_text",
         "doc_to_choice", "doc_to_target"}  # fmt: skip
_WITHOUT_EFFECT = {
    "task_alias", "tag", "group", "metadata", "version", "metric_list", "training_split", "fewshot_split",
    "fewshot_delimiter", "should_decontaminate", "doc_to_decontamination_query", "generation_kwargs",
}  # fmt: skip
"""Keys that change neither prompts nor rows, nor acc and acc_norm, where no examples precede a question."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "num_fewshot": (None, 0), "description": (None, ""), "target_delimiter": (None, " "), "repeats": (None, 1),
    "gen_prefix": (None, ""),
}  # fmt: skip
"""Values of further keys that are understood; other values change prompts, and so do other keys."""


class _Python(str):
    """A ``!function`` of a task file, which is Python code."""


def _python(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> _Python:
    return _Python(f"!{tag} {node.value}")


class _Loader(yaml.SafeLoader):
    """Reads ``!function`` and other tags as text that names them."""

    yaml_multi_constructors = {**yaml.SafeLoader.yaml_multi_constructors, "!": _python}  # noqa: RUF012 - yaml's form


@dataclass(frozen=True)
class LmEvalTask:
    """A task file of lm-eval, ready to make questions of rows."""

    name: str
    text: str
    """Template of the prompt, or the column that holds it."""
    choice: str | tuple[str, ...]
    """Options, or a template or column of them."""
    target: str | int
    """Template or column of the right option: its number from 0, or its text; or the number itself."""
    files: tuple[str, ...]
    """Local files that the task names for the split that lm-eval scores; none if it names a set of the Hub."""

    def item(self, values: Any, columns: Set[str]) -> dict[str, Any]:
        """Return a row as ``question``, ``options`` and ``answer``, the number of the right one from 0.

        Raises:
            RowFaultError: a template fails, or what it gives is no text or option, or has blanks at its ends, which a
                chat template drops.
        """
        if not isinstance(values, Mapping):
            raise RowFaultError(f"is a {type(values).__name__}; expected an object with columns")
        question = _value(self.text, values, columns, "doc_to_text")
        if not isinstance(question, str) or not question or question.isdigit():
            raise RowFaultError(f"gives {str(question)[:60]!r} for doc_to_text; expected the text of a question")
        options = self._options(values, columns)
        for text in (question, *options):
            if text != text.strip():
                raise RowFaultError(
                    f"gives {text[-60:]!r}, with blanks at an end, which not every chat template keeps; write "
                    "doc_to_text and doc_to_choice without them"
                )
        return {"question": question, "options": options, "answer": self._answer(values, columns, options)}

    def _options(self, values: Mapping[str, Any], columns: Set[str]) -> list[str]:
        found: Any = self.choice
        if isinstance(found, str):
            found = _value(found, values, columns, "doc_to_choice")
            if self.choice not in columns:
                found = _literal(found)
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) < 2:
            raise RowFaultError(f"gives {str(found)[:60]!r} for doc_to_choice; expected a list of two options or more")
        if odd := [option for option in found if not isinstance(option, str) or not option]:
            raise RowFaultError(f"gives the option {odd[0]!r} for doc_to_choice; expected text")
        return list(found)

    def _answer(self, values: Mapping[str, Any], columns: Set[str], options: Sequence[str]) -> int:
        found: Any = self.target
        if isinstance(found, str):
            found = _value(found, values, columns, "doc_to_target")
            if self.target not in columns and found.isdigit():
                found = int(found)
        if isinstance(found, str) and found in options:
            return options.index(found)
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(options):
            return found
        raise RowFaultError(
            f"gives {str(found)[:60]!r} for doc_to_target; expected a number from 0 to {len(options) - 1}, or the text "
            "of an option"
        )


def is_lm_eval_file(path: str) -> bool:
    """Return whether a file is a task file of lm-eval, by its keys; False if it cannot be read as YAML."""
    if not path.endswith((".yaml", ".yml")):
        return False
    try:
        values = _read(path)
    except (DataError, ConfigError):
        return False
    return bool(_MARKS & values.keys())


def read_lm_eval_task(path: str) -> LmEvalTask:
    """Read a task file of lm-eval.

    Raises:
        DataError: it cannot be read.
        ConfigError: it is no YAML, or not a question with options; or it has what changes prompts or rows in other ways
            than by its templates. All faults are named.
    """
    values = _read(path)
    faults = list(_faults(values))
    files: tuple[str, ...] = ()
    if not faults:
        files, more = _files(values)
        faults += more
    if faults:
        raise ConfigError(faults, f"lm-eval task {path}")
    metrics = [one.get("metric") for one in values.get("metric_list") or () if isinstance(one, Mapping)]
    if others := [str(name) for name in metrics if name not in ("acc", "acc_norm")]:
        log.info("%s names %s in metric_list: here it has acc and acc_norm alone", path, ", ".join(others))
    choice = values["doc_to_choice"]
    if isinstance(choice, Mapping):
        choice = list(choice.values())
    return LmEvalTask(
        str(values.get("task") or Path(path).stem), values["doc_to_text"],
        choice if isinstance(choice, str) else tuple(choice), values["doc_to_target"], files,
    )  # fmt: skip


def _read(path: str) -> dict[str, Any]:
    try:
        values = yaml_text.load(read_regular(Path(path), yaml_text.MOST_BYTES), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a task file of lm-eval") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([" ".join(str(error).split())[:300]], f"lm-eval task {path}") from None
    if not isinstance(values, dict):
        raise ConfigError(["it is no mapping; expected the keys of an lm-eval task"], f"lm-eval task {path}")
    return {str(key): value for key, value in values.items()}


def _faults(values: Mapping[str, Any]) -> list[str]:
    """Return what in a task file is not understood, or would change prompts, rows or scores."""
    faults = []
    for key, value in values.items():
        if key in _WITHOUT_EFFECT:
            continue
        if code := next((one for one in _nested(value) if isinstance(one, _Python)), None):
            faults.append(f"{key} is {code}: Python code of a task is not run; write it as a Jinja template")
        elif key in _ONLY and value not in _ONLY[key]:
            faults.append(f"{key} is {value!r}, which changes the prompt or the scores; expected {_ONLY[key][-1]!r}")
        elif key == "include":
            faults.append(f"include is {value!r}: a task is read from one file; copy the keys of that one into it")
        elif key not in _READ and key not in _ONLY and value is not None:
            faults.append(f"{key} is not supported: it may change prompts, rows or scores; leave it out")
    if values.get("output_type") != "multiple_choice":
        faults.append(f"output_type is {values.get('output_type')!r}; expected multiple_choice")
    kinds = {"doc_to_text": (str,), "doc_to_choice": (str, list, dict), "doc_to_target": (str, int)}
    for key, types in kinds.items():
        found = values.get(key)
        if not isinstance(found, types) or isinstance(found, bool):
            faults.append(f"{key} is {found!r}; expected a template or column" + " or options" * (list in types))
        elif isinstance(found, list | dict) and not all(isinstance(one, str) for one in _nested(found)):
            faults.append(
                f"{key} has {found!r}; expected texts (yes and no in quotes, which YAML reads as true, false)"
            )
        elif isinstance(found, str) and not isinstance(found, _Python):
            try:
                _template(found)
            except TemplateError as error:
                faults.append(f"{key} is no valid template: {error}")
    if not isinstance(values.get("task", ""), str):
        faults.append("task is a list of tasks; expected one task")
    return faults


def _files(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Return the local files of the split that lm-eval scores, and what is wrong with how they are named."""
    options = values.get("dataset_kwargs") or {}
    if not isinstance(options, Mapping) or set(options) - {"data_files"}:
        return (), [f"dataset_kwargs is {options!r}; expected data_files alone"]
    named = options.get("data_files")
    if named is None:
        return (), []
    split = values.get("test_split") or values.get("validation_split")
    if isinstance(named, Mapping):
        if split not in named:
            return (), [
                f"data_files has {', '.join(map(str, named))}; expected test_split or validation_split to be one"
            ]
        named = named[split]
    elif split != "train":
        return (), [f"test_split is {split!r}, and files without the name of a split are train; name it in data_files"]
    files = [named] if isinstance(named, str) else named
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return (), [f"data_files is {named!r}; expected a local file, or a list of them"]
    return tuple(files), []


def _nested(value: Any) -> list[Any]:
    """Return a value, or the values within it."""
    if isinstance(value, Mapping):
        return [one for part in value.values() for one in _nested(part)]
    return [one for part in value for one in _nested(part)] if isinstance(value, list) else [value]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


_ENVIRONMENT = _environment()


@lru_cache(maxsize=64)
def _template(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)


def _value(source: str, values: Mapping[str, Any], columns: Set[str], key: str) -> Any:
    """Return the column that a key names, or what its template gives."""
    if source in columns:
        if source not in values:
            raise RowFaultError(f"has no column {source}, which {key} names")
        return values[source]
    try:
        return _template(source).render({str(name): value for name, value in values.items()})
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, re.error) as error:
        raise RowFaultError(f"cannot be rendered by {key}: {error}") from None


def _literal(text: str) -> Any:
    """Return the list that a template prints, as Python writes it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text

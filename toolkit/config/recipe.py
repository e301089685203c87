"""Read a recipe, override it by flags, and report every fault at once."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from toolkit.config import peer_keys, yaml_text
from toolkit.config.data_schema import PathEntry
from toolkit.config.mask_schema import LoraConfig, LoraEntry, MaskGroup, MaskPhase, RowsConfig, RowsEntry
from toolkit.config.rotation_schema import RotationConfig
from toolkit.config.schema import REMOVED_OPTIMIZER, RunConfig
from toolkit.config.section import Section
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.printable import has_controls, one_line
from toolkit.runtime.redact import find_secrets, strings_in

_SHORT_REPR = reprlib.Repr()  # nested YAML anchors can expand a small file to an enormous value
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 120
_SHORT_REPR.maxlevel = 3
_FREE_TEXT = re.compile(
    r"data\.(task|template_kwargs|separator|identifier_patterns|oversample|group_by|stratify_by)\b|model\.add_tokens\b"
    r"|data\.\w+\.task\b"
)
"""Keys whose text may have several lines, tabs, or any character: texts of a task, columns, patterns and tokens."""


def field_paths(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Return every leaf key of the recipe as ``section.key``, mapped to its pydantic field."""
    paths: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            paths |= field_paths(info.annotation, f"{prefix}{name}.")
        else:
            paths[prefix + name] = info
    return paths


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Suggest a valid key for an unknown one, or what to use instead; an empty string if nothing is similar.

    The suggestion is a parenthesis that ends the error message. Misspellings are found by the last part of the key,
    with or without its section (``learnin_rate`` suggests ``train.learning_rate``), and so are the names of other
    trainers (``toolkit.config.peer_keys``). ``name`` is the unknown key, or flag without its dashes.
    """
    name = name.lower().replace("-", "_")
    section, _, leaf = name.rpartition(".")
    valid = list(valid)
    paths = {path.rsplit(".", 1)[-1]: path for path in valid}

    def suggestion(key: str) -> str:
        return f" (did you mean {key}?)"

    if section in valid:
        return f" ({section} is one key; give it whole, as a mapping)"
    if leaf in paths:
        return suggestion(paths[leaf])
    if leaf in peer_keys.EQUIVALENT_KEYS:
        ours = peer_keys.EQUIVALENT_KEYS[leaf]
        return suggestion(ours if ours in valid else paths.get(ours.rsplit(".", 1)[-1], ours))
    for word in (leaf, section):
        if word in peer_keys.ALTERNATIVES:
            return f" ({peer_keys.ALTERNATIVES[word]})"
    if not section and (near := difflib.get_close_matches(name, RunConfig.model_fields, n=1)):
        return suggestion(near[0])
    if near := difflib.get_close_matches(leaf, peer_keys.EQUIVALENT_KEYS, n=1, cutoff=0.9):
        return suggestion(peer_keys.EQUIVALENT_KEYS[near[0]])
    if near := difflib.get_close_matches(leaf, paths, n=3):
        return suggestion(next((paths[one] for one in near if paths[one].startswith(f"{section}.")), paths[near[0]]))
    if near := difflib.get_close_matches(leaf, peer_keys.EQUIVALENT_KEYS, n=1, cutoff=0.8):
        return suggestion(peer_keys.EQUIVALENT_KEYS[near[0]])
    return ""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe file into nested dictionaries, without validation.

    Raises:
        ConfigError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = read_regular(Path(path), yaml_text.MOST_BYTES)
    except FileNotFoundError:
        fault = f"{path}: no such file; --config takes a YAML recipe such as recipes/quickstart.yaml"
        raise ConfigError([fault]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as UTF-8 text ({error})"]) from None
    try:
        recipe = parse_yaml(text)
    except ValueError as error:
        raise ConfigError([f"{path}: not valid YAML: {error}"]) from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ConfigError([f"{path}: holds a {type(recipe).__name__}; expected sections such as model: and train:"])
    return recipe


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML text, of which JSON is a part; no tag constructs anything else.

    Raises:
        ValueError: not valid, in one line.
    """
    try:
        return yaml_text.load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's constructors let through what a value such as 2020-99-99 or !!int x raises
        raise ValueError(" ".join(str(error).split())[:400]) from None


def merge(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested recipe overridden by dotted flags, as in ``{"train.epochs": "5"}``."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for dotted, value in flags.items():
        section, key = dotted.split(".")
        if not isinstance(merged.get(section), dict):
            if merged.get(section) is not None:
                continue  # the section is not a mapping, which build() reports
            merged[section] = {}
        merged[section][key] = value
    return {key: value for key, value in merged.items() if value is not None}


def build_config(values: Mapping[str, Any], source: str, faults: Iterable[str] = ()) -> RunConfig:
    """Validate nested values, as ``merge`` returns them, into a ``RunConfig``.

    Raises:
        ConfigError: there are faults, here or in earlier ``faults`` such as unknown flags; the message names the
            ``source`` of the values, and lists all faults with value, expectation and remedy.
    """
    all_faults = list(faults)
    all_faults += [
        f"{where} holds a password or token; no key needs one: log in with `hf auth login`, or set HF_TOKEN"
        for where in find_secrets(values)
    ]
    all_faults += [  # a path with a line break would end a line of a job's script, and forge one of a log
        f"{one_line(where)} holds a control character, such as a line break: {_SHORT_REPR.repr(text)}; remove it"
        for where, text in strings_in(values)
        if has_controls(text) and not _FREE_TEXT.match(where)
    ]
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        all_faults += [_describe_fault(fault) for fault in error.errors()]
    if all_faults or config is None:
        raise ConfigError(list(dict.fromkeys(all_faults)), source)
    return config


def read_saved(path: Path) -> RunConfig:
    """Read the recipe ``path`` of an existing run, to open what it trained.

    An optimizer that later versions removed counts as today's default: with this recipe nothing is trained.

    Raises:
        ConfigError: the recipe cannot be read, or has faults.
    """
    values = read_recipe(path)
    optim = values.get("optim")
    if isinstance(optim, dict) and optim.get("name") == REMOVED_OPTIMIZER:
        values = {**values, "optim": {key: value for key, value in optim.items() if key != "name"}}
    return build_config(values, f"recipe {path}")


def _describe_fault(fault: Any) -> str:
    """Turn a pydantic error (an item of ``ValidationError.errors()``) into one line of the message."""
    tags = (MaskGroup.__name__, LoraEntry.__name__, RowsEntry.__name__, PathEntry.__name__)
    union_branches = ("function-", "float", "str", "constrained", *tags)
    parts = [str(part) for part in fault["loc"] if not str(part).startswith(union_branches)]
    where = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        valid = list(field_paths())
        # a recipe may hold several of these sections, so their keys are not in field_paths()
        sections: dict[str, type[Section]] = {
            "schedule": MaskPhase,
            "rotation": RotationConfig,
            MaskGroup.__name__: MaskGroup,
            LoraEntry.__name__: LoraEntry,
            "lora": LoraConfig,
            RowsEntry.__name__: RowsEntry,
            "rows": RowsConfig,
            PathEntry.__name__: PathEntry,
        }
        for part, section in sections.items():
            if part in fault["loc"]:
                keys = [field.alias or key for key, field in section.model_fields.items()]
                valid = [".".join([*parts[:-1], key]) for key in keys]
        if "lora" in fault["loc"] and parts[-1] in peer_keys.LORA_KEYS:
            return f"{where}: unknown key (did you mean {'.'.join([*parts[:-1], peer_keys.LORA_KEYS[parts[-1]]])}?)"
        kinds = {"dora": "dora: true", "rslora": "rslora: true", "qlora": "base_precision: nf4"}
        if parts[-1] in kinds and MaskGroup.__name__ in fault["loc"]:
            return f"{where}: unknown key; expected {{lora: {{select: …, {kinds[parts[-1]]}}}}} (docs/adapters.md)"
        return f"{where}: unknown key{did_you_mean(where, valid)}"
    if fault["type"] == "model_type" and where in RunConfig.model_fields:
        first = next(path for path in field_paths() if path.startswith(f"{where}."))
        return f"{where} is {_SHORT_REPR.repr(fault['input'])}; expected keys under it, such as {first}"
    examples = {"lora": "{select: last:8}", "rows": "{select: embeddings, from: added}"}
    if fault["type"] == "model_type" and parts[-1] in examples:
        return f"{where} is {_SHORT_REPR.repr(fault['input'])}; expected keys under it, such as {examples[parts[-1]]}"
    if fault["type"] == "union_tag_invalid":
        return f"{where} is {_SHORT_REPR.repr(fault['input'])}; expected text, or a mapping with path and weight"
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message  # a fault between two sections names its keys itself
    return f"{where} is {_SHORT_REPR.repr(fault['input'])}; expected {message}"


def dump(config: RunConfig) -> str:
    """Return the resolved recipe as YAML text, itself a valid ``--config``."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

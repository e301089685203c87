"""The files beside a model's weights: found in its directory or Hub snapshot, and copied into an export as they are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file
from transformers.utils.hub import list_repo_templates

from toolkit.runtime import hub
from toolkit.runtime.paths import is_directory

log = logging.getLogger("frostline")

TEMPLATES_FOLDER = "additional_chat_templates"
"""Name of the folder of named chat templates, beside ``chat_template.jinja``."""

_COPIED_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
)  # fmt: skip
"""Files of a checkpoint that an export copies if they exist: tokenizer, chat template, processors, terms of use."""

_ONLY_IN_TRANSFORMERS_5 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Tokenizer classes that transformers 4 does not know, each with one that both versions know."""


@dataclass(frozen=True)
class SourceFiles:
    """Finds, reads and copies the files of a directory or Hub repository beside the weights."""

    source: str
    revision: str | None

    def find(self, name: str) -> Path | None:
        """Return the path of a file of the source, downloaded if need be; None if the source has no such file."""
        try:
            with hub.downloads(self.source):
                path = cached_file(self.source, name, revision=self.revision)
        except OSError:
            return None
        return Path(path) if path else None

    def read_json(self, name: str) -> dict[str, Any]:
        """Read the object in a JSON file; empty if the source has no such file.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        path = self.find(name)
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return values

    def end_tokens(self) -> tuple[int, ...]:
        """Return the ``eos_token_id`` of generation_config.json and config.json, in that order; no weights are read.

        A file that is missing or unreadable names none; loading the model says what is wrong with it.
        """
        tokens: list[int] = []
        for name in ("generation_config.json", "config.json"):
            with suppress(OSError, ValueError, RecursionError):
                for level in config_levels(self.read_json(name)):
                    ends = level.get("eos_token_id")
                    tokens += [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
        return tuple(dict.fromkeys(tokens))

    def copy_into(self, more: Collection[str], directory: Path) -> None:
        """Copy tokenizer, chat templates, processors, terms of use and remote code into an export; no code is run.

        Files are copied unchanged, but for tokenizer_config.json where transformers 4 would refuse it. ``more`` names
        further files of which the tokenizer consists. ``directory`` exists.

        Raises:
            OSError: the disk is full or refuses, or a file of the source can no longer be read.
        """
        for name in {*_COPIED_FILES, *more, *self._named_templates()}:
            self._copy_file(name, directory)
        if (config := directory / "tokenizer_config.json").is_file():
            _adapt_for_transformers_4(config)
        self._copy_remote_code(directory)

    def write_generation_config(
        self, generation: GenerationConfig | None, ends: Collection[int], directory: Path
    ) -> None:
        """Write the source's generation_config.json with every token in it that ends an answer.

        Args:
            generation: the model's generation config, whose token ids are used if the source has no such file.
            ends: all tokens that end an answer; if empty, the source's list stays.
            directory: the export's directory, which exists.

        Raises:
            OSError: the disk is full or refuses, or the source's file can no longer be read.
        """
        name = "generation_config.json"
        values = self.read_json(name)
        source_ends = _as_list(values.get("eos_token_id", getattr(generation, "eos_token_id", None)))
        stop_tokens = [token for token in source_ends if token in ends or not ends]
        stop_tokens += [token for token in ends if token not in source_ends]
        if values and (not ends or stop_tokens == _as_list(values.get("eos_token_id"))):
            self._copy_file(name, directory)
        elif stop_tokens:
            tokens = {key: getattr(generation, key, None) for key in ("bos_token_id", "pad_token_id")}
            values = values or {key: token for key, token in tokens.items() if token is not None}
            values["eos_token_id"] = stop_tokens[0] if len(stop_tokens) == 1 else stop_tokens
            values.pop("_from_model_config", None)  # it would let transformers replace what is written here
            write_model_json(directory / name, values)

    def chat_template_json(self) -> str | dict[str, str] | None:
        """Read the templates in chat_template.json, which tokenizers do not read; None if there is no such file.

        Raises:
            ValueError: the file holds something else.
        """
        values = self.read_json("chat_template.json")
        if not values:
            return None
        template = values.get("chat_template") if isinstance(values, dict) else None
        if isinstance(template, list):
            template = {str(entry["name"]): entry["template"] for entry in template}
        texts = list(template.values()) if isinstance(template, dict) else [template]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError('Its chat_template.json holds no template; expected {"chat_template": "…"}.')
        assert isinstance(template, (str, dict))
        return template

    def _named_templates(self) -> Iterator[str]:
        """Yield the paths, within the source, of its named chat templates."""
        if is_directory(self.source):
            names = [path.stem for path in (Path(self.source) / TEMPLATES_FOLDER).glob("*.jinja")]
        else:
            names = list_repo_templates(self.source, local_files_only=False, revision=self.revision)
        for name in names:
            yield f"{TEMPLATES_FOLDER}/{name}.jinja"

    def _copy_remote_code(self, directory: Path) -> None:
        """Copy the modules that config and tokenizer name in auto_map, and those that these import.

        A missing module is logged.
        """
        pending = [
            *_auto_modules(self.read_json("config.json")),
            *_auto_modules(self.read_json("tokenizer_config.json")),
        ]
        seen: set[str] = set()
        while pending:
            module = pending.pop()
            if module in seen:
                continue
            seen.add(module)
            if module.isidentifier() and self._copy_file(f"{module}.py", directory):
                pending += get_relative_imports(directory / f"{module}.py")
            else:
                log.warning(
                    "%s has no %s.py, which its auto_map or code names, so the export has none either; "
                    "loading the export with trust_remote_code would fail",
                    self.source, module,
                )  # fmt: skip

    def _copy_file(self, name: str, directory: Path) -> bool:
        """Copy a file of the source into ``directory``; return False if the source has no such file."""
        path = self.find(name)
        if path is not None:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
        return path is not None


def require_own_code(source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a model or tokenizer whose code is in another repository, where it may change: no commit of it is pinned.

    Raises:
        OSError: a file cannot be read.
        ValueError: ``auto_map`` names another repository, and ``trust_remote_code`` would run its code.
    """
    for name in ("config.json", "tokenizer_config.json") if trust_remote_code else ():
        values = SourceFiles(source, revision).read_json(name)
        others = {text.split("--")[0] for text in _auto_references(values) if "--" in text} - {source}
        if others:
            raise ValueError(
                f"Its {name} takes code from {', '.join(sorted(others))} (auto_map), at no pinned commit, so it may be "
                "other code each time. Copy that code, as you have read it, beside the file, and take the name and -- "
                "out of auto_map."
            )


def config_levels(config: object) -> list[Mapping[str, Any]]:
    """Return a config, and the text model's config nested in it if there is one; nothing for what is no object."""
    levels = [config, config.get("text_config")] if isinstance(config, Mapping) else []
    return [level for level in levels if isinstance(level, Mapping)]


def write_model_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` as these files are usually written: indented, in the order of the keys."""
    path.write_text(f"{json.dumps(values, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


def _adapt_for_transformers_4(path: Path) -> None:
    """Rename the tokenizer's class and extra tokens so that transformers 4 reads the file too.

    A file that it reads already is not written.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    adapted = dict(values)
    if values.get("tokenizer_class") in _ONLY_IN_TRANSFORMERS_5:
        adapted["tokenizer_class"] = _ONLY_IN_TRANSFORMERS_5[values["tokenizer_class"]]
        # transformers 4 adds token_type_ids where nothing is said, and generate() refuses them
        adapted.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(extra := values.get("extra_special_tokens"), list):  # a mapping of names in transformers 4
        del adapted["extra_special_tokens"]
        adapted["additional_special_tokens"] = [*values.get("additional_special_tokens", []), *extra]
    if adapted != values:
        write_model_json(path, adapted)


def _as_list(value: object) -> list[int]:
    """Return the token ids of an ``eos_token_id``, which is a number, a list or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [int(str(value))]


def _auto_modules(config: dict[str, Any]) -> Iterator[str]:
    """Yield the modules beside the config that its auto_map names, not those of another repository ("org/name--…")."""
    for reference in _auto_references(config):
        if "--" not in reference:
            yield reference.rpartition(".")[0]


def _auto_references(config: object) -> Iterator[str]:
    """Yield the classes that an auto_map names, as ``module.Class`` or ``org/name--module.Class``."""
    named = config.get("auto_map") if isinstance(config, Mapping) else None
    for value in named.values() if isinstance(named, Mapping) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and reference:
                yield reference

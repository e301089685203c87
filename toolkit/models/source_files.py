"""The files beside a model's weights: found in its directory or Hub snapshot, and copied into an export as they are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file
from transformers.utils.hub import list_repo_templates

from toolkit.runtime.paths import is_directory

log = logging.getLogger("frostline")

TEMPLATES = "additional_chat_templates"
"""Folder of the named chat templates beside ``chat_template.jinja``."""

_CARRIED = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "tiktoken.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
)  # fmt: skip
"""Files that belong to a checkpoint, as far as it has them: tokenizer, chat template, processors, terms of use."""

_ONLY_IN_TRANSFORMERS_5 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Tokenizer classes that transformers 4 does not know, and what both versions read in their place."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a directory or Hub repository beside the weights."""

    source: str
    revision: str | None

    def find(self, name: str) -> Path | None:
        """Find a file of the source and download it if need be; none if the source has no such file."""
        try:
            path = cached_file(self.source, name, revision=self.revision)
        except OSError:
            return None
        return Path(path) if path else None

    def json(self, name: str) -> dict[str, Any]:
        """Read the object in a JSON file; empty if the source has no such file.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        path = self.find(name)
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return values

    def config(self) -> dict[str, Any]:
        """Read the object in config.json.

        Raises:
            OSError: there is none any more.
        """
        config = self.json("config.json")
        if not config:
            raise OSError(
                f"{self.source} has no config.json any more; expected the one that was there when it was read"
            )
        return config

    def carry(self, more: Collection[str], directory: Path) -> None:
        """Copy tokenizer, chat templates, processors, terms of use and code; none of the code is run.

        The tokenizer's class alone is named otherwise, where transformers 4 would refuse it.

        Args:
            more: names of other files that the tokenizer consists of.
            directory: exists.

        Raises:
            OSError: the disk, or a file of the source.
        """
        for name in {*_CARRIED, *more, *self._named_templates()}:
            self._copy(name, directory)
        if (config := directory / "tokenizer_config.json").is_file():
            _name_for_transformers_4(config)
        self._carry_code(directory)

    def write_generation_config(
        self, generation: GenerationConfig | None, ends: Collection[int], directory: Path
    ) -> None:
        """Write the source's generation_config.json with every token in it that ends an answer.

        Args:
            generation: of the model; its own tokens stand where the source has no such file.
            ends: all tokens that end an answer; of the source's own, those that are not among them are left out.
            directory: exists.

        Raises:
            OSError: the disk, or the file of the source.
        """
        name = "generation_config.json"
        values = self.json(name)
        known = _as_list(values.get("eos_token_id", getattr(generation, "eos_token_id", None)))
        every = [
            *(token for token in known if token in ends or not ends),
            *(token for token in ends if token not in known),
        ]
        if values and (not ends or every == _as_list(values.get("eos_token_id"))):
            self._copy(name, directory)
        elif every:
            tokens = {key: getattr(generation, key, None) for key in ("bos_token_id", "pad_token_id")}
            values = values or {key: token for key, token in tokens.items() if token is not None}
            values["eos_token_id"] = every[0] if len(every) == 1 else every
            values.pop("_from_model_config", None)  # it would let transformers replace what is written here
            write_model_json(directory / name, values)

    def chat_template_json(self) -> str | dict[str, str] | None:
        """Read the templates in chat_template.json, which tokenizers do not read; none if there are none.

        Raises:
            ValueError: the file holds something else.
        """
        values = self.json("chat_template.json")
        if not values:
            return None
        found = values.get("chat_template") if isinstance(values, dict) else None
        if isinstance(found, list):
            found = {str(entry["name"]): entry["template"] for entry in found}
        texts = list(found.values()) if isinstance(found, dict) else [found]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError('Its chat_template.json holds no template; expected {"chat_template": "…"}.')
        assert isinstance(found, (str, dict))
        return found

    def _named_templates(self) -> Iterator[str]:
        if is_directory(self.source):
            yield from (f"{TEMPLATES}/{path.name}" for path in (Path(self.source) / TEMPLATES).glob("*.jinja"))
        else:
            yield from (
                f"{TEMPLATES}/{name}.jinja"
                for name in list_repo_templates(self.source, local_files_only=False, revision=self.revision)
            )

    def _carry_code(self, directory: Path) -> None:
        """Copy the modules that config and tokenizer name in auto_map, and those that these import."""
        wanted = [*_auto_modules(self.json("config.json")), *_auto_modules(self.json("tokenizer_config.json"))]
        seen: set[str] = set()
        while wanted:
            module = wanted.pop()
            if module in seen:
                continue
            seen.add(module)
            if module.isidentifier() and self._copy(f"{module}.py", directory):
                wanted += get_relative_imports(directory / f"{module}.py")
            else:
                log.warning(
                    "%s has no %s.py, which its auto_map or code names, so the export has none either; "
                    "loading the export with trust_remote_code would fail",
                    self.source,
                    module,
                )

    def _copy(self, name: str, directory: Path) -> bool:
        path = self.find(name)
        if path is not None:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
        return path is not None


def write_model_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` as these files are usually written: indented, in the order of the keys.

    Raises:
        OSError: the disk.
    """
    path.write_text(f"{json.dumps(values, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


def _name_for_transformers_4(path: Path) -> None:
    """Name class and extra tokens so that transformers 4 reads them too; a file that it reads stays as it is."""
    values = json.loads(path.read_text(encoding="utf-8"))
    wanted = dict(values)
    if values.get("tokenizer_class") in _ONLY_IN_TRANSFORMERS_5:
        wanted["tokenizer_class"] = _ONLY_IN_TRANSFORMERS_5[values["tokenizer_class"]]
        # transformers 4 adds token_type_ids where nothing is said, and generate() refuses them
        wanted.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(extra := values.get("extra_special_tokens"), list):  # a mapping of names in transformers 4
        del wanted["extra_special_tokens"]
        wanted["additional_special_tokens"] = [*values.get("additional_special_tokens", []), *extra]
    if wanted != values:
        write_model_json(path, wanted)


def _as_list(value: object) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [int(str(value))]


def _auto_modules(config: dict[str, Any]) -> Iterator[str]:
    """Return the modules beside the config that its auto_map names, not those of another repository ("org/name--…")."""
    for value in (config.get("auto_map") or {}).values():
        for reference in value if isinstance(value, list) else [value]:
            if reference and "--" not in reference:
                yield reference.rpartition(".")[0]

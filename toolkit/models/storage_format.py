"""Read a checkpoint into a transformers model, and write it back in the format that it came in."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import WeightConverter, rename_source_key, revert_weight_conversion

from toolkit.models.config_json import QUANTISATION_KEYS, config_to_write
from toolkit.models.source_files import SourceFiles, write_model_json
from toolkit.models.weight_files import Comparison, StoredTensors, read_stored, weights_to_write

log = logging.getLogger("frostline")


class StorageFormat(Protocol):
    """Reads a checkpoint into a model that transformers knows, and writes such a model back in the same form."""

    @property
    def files(self) -> SourceFiles:
        """The files beside the weights."""

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Read the model; return it and transformers' loading information.

        Args:
            options: arguments for ``from_pretrained``, ``output_loading_info`` among them.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: it cannot be understood.
        """

    def tokenizer_options(self) -> dict[str, Any]:
        """Return what ``AutoTokenizer.from_pretrained`` needs beside the source.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: it cannot be understood.
        """

    def targets(self, model: PreTrainedModel, stored: StoredTensors) -> dict[str, str]:
        """Map each stored name to that of its tensor in the model's state dict, whether the model has it or not."""

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, ends: Collection[int] = ()
    ) -> Comparison:
        """Write ``model`` and its tokenizer into ``directory``, which is created.

        Args:
            model: a model that ``read`` returned; its values, precision and head tying may have changed.
            tokenizer: the model's tokenizer.
            directory: target directory, empty or absent.
            ends: tokens that end an answer, for generation_config.json.

        Returns:
            How the written weights compare with the source's.

        Raises:
            OSError: the disk is full or refuses, or a file of the source can no longer be read.
        """


def refuse_kernels(config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Refuse a config that names an attention kernel on the Hub, which is compiled code.

    Raises:
        ValueError: it names one, and ``trust_remote_code`` is off.
    """
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named and not trust_remote_code:
        raise ValueError(
            f"its config.json asks for the attention kernel {named} from the Hub, which is code; remove "
            "attn_implementation from it, or read that code and set model.trust_remote_code"
        )


def drop_quantisation(config: PretrainedConfig, stored: StoredTensors, source: str) -> None:
    """Remove a quantisation config whose weights are not quantised, and log that.

    BitNet's stays: it describes how the network computes with weights that are stored in floating point.
    """
    text = config.get_text_config()
    levels = [config] if text is config else [config, text]
    for level in levels:
        for key in QUANTISATION_KEYS:
            found = getattr(level, key, None)
            if isinstance(found, dict) and stored.are_unquantised and found.get("quant_method") != "bitnet":
                delattr(level, key)
                log.warning(
                    "%s: its config.json has a %s (%s), but its weights are stored plain (%s); it is trained as it is "
                    "stored, and exports have no %s",
                    source, key, found.get("quant_method", "no method named"),
                    ", ".join(sorted({entry["dtype"] for entry in stored.entries.values()})), key,
                )  # fmt: skip


@dataclass(frozen=True)
class TransformersFormat:
    """Reads and writes what transformers itself loads and saves."""

    source: str
    revision: str | None
    trust_remote_code: bool

    @property
    def files(self) -> SourceFiles:
        """The files beside the weights."""
        return SourceFiles(self.source, self.revision)

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Read the model as ``AutoModelForCausalLM`` does.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: transformers does not know its model type, or its config asks for code.
        """
        shared = self.tokenizer_options()
        config = AutoConfig.from_pretrained(self.source, **shared)
        refuse_kernels(config, self.trust_remote_code)
        drop_quantisation(config, read_stored(self.files), self.source)
        model, info = AutoModelForCausalLM.from_pretrained(self.source, config=config, **shared, **options)
        return model, info

    def tokenizer_options(self) -> dict[str, Any]:
        """Return the revision, and whether remote code may run."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def targets(self, model: PreTrainedModel, stored: StoredTensors) -> dict[str, str]:
        """Map each stored name as transformers renames it on loading."""
        state = model.state_dict()
        conversions = getattr(model, "_weight_conversions", None) or []
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        targets = {}
        for name in stored.entries:
            target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            targets[name] = name if target not in state and name in state else str(target)
        return targets

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, ends: Collection[int] = ()
    ) -> Comparison:
        """Write the weights under the source's names, and its other files, with a config.json that fits the weights.

        Raises:
            OSError: the disk is full or refuses, or the source can no longer be read.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config, stored = self.files.config(), read_stored(self.files)

        def to_stored_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
            return saved

        weights = weights_to_write(model, stored, self.targets(model, stored), to_stored_layout)
        comparison = weights.write(stored, directory)
        export_config = config_to_write(config, model)
        write_model_json(directory / "config.json", export_config)
        self.files.write_generation_config(model.generation_config, ends, directory)
        self.files.copy_into(tokenizer.vocab_files_names.values(), directory)
        return comparison

"""Read a checkpoint into a transformers model, and write it back in the format that it came in."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter, rename_source_key, revert_weight_conversion

from toolkit.models.config_json import QUANTISATION_KEYS, config_to_write
from toolkit.models.source_files import SourceFiles, require_own_code, write_model_json
from toolkit.models.weight_files import StoredTensors, WeightComparison, write_weights

log = logging.getLogger("frostline")


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
    for level in [config] if text is config else [config, text]:
        for key in QUANTISATION_KEYS:
            settings = getattr(level, key, None)
            if isinstance(settings, dict) and stored.are_unquantised and settings.get("quant_method") != "bitnet":
                delattr(level, key)
                log.warning(
                    "%s: its config.json has a %s (%s), but its weights are stored plain (%s); it is trained as it is "
                    "stored, and exports have no %s",
                    source, key, settings.get("quant_method", "no method named"),
                    ", ".join(sorted({entry["dtype"] for entry in stored.entries.values()})), key,
                )  # fmt: skip


@dataclass(frozen=True)
class StorageFormat:
    """Reads a checkpoint into a model that transformers knows, and writes such a model back as its source has it.

    As it stands, it reads and writes what transformers itself loads and saves.
    """

    source: str
    revision: str | None
    trust_remote_code: bool = False

    @property
    def files(self) -> SourceFiles:
        """Files beside the weights."""
        return SourceFiles(self.source, self.revision)

    def read(self, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Read the model with ``options`` of ``from_pretrained``; return it and the loading information asked for.

        Raises:
            OSError: the checkpoint cannot be found.
            ValueError: transformers does not know its model type, or its config asks for code.
        """
        shared = self.tokenizer_options()
        config = AutoConfig.from_pretrained(self.source, **shared)
        refuse_kernels(config, self.trust_remote_code)
        drop_quantisation(config, StoredTensors(self.files), self.source)
        model, info = AutoModelForCausalLM.from_pretrained(self.source, config=config, **shared, **options)
        return model, info

    def tokenizer_options(self) -> dict[str, Any]:
        """Return what ``AutoTokenizer.from_pretrained`` needs beside the source; raises as ``read`` does."""
        require_own_code(self.source, self.revision, self.trust_remote_code)
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def model_names(self, model: PreTrainedModel, stored: StoredTensors) -> dict[str, str]:
        """Map each stored name to that of its tensor in the model's state dict, whether the model has it or not."""
        state = model.state_dict()
        conversions = getattr(model, "_weight_conversions", None) or []
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        model_names = {}
        for name in stored.entries:
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            model_names[name] = name if renamed not in state and name in state else str(renamed)
        return model_names

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, ends: Collection[int] = ()
    ) -> WeightComparison:
        """Write a model and its tokenizer; return how the written weights compare with the source's.

        Args:
            model: a model that ``read`` returned; its values, precision and head tying may have changed.
            tokenizer: the model's, whose files are copied from the source.
            directory: target directory, empty or absent.
            ends: tokens that end an answer, for generation_config.json.

        Raises:
            OSError: the disk is full or refuses, or a file of the source can no longer be read.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config, stored = self.files.read_json("config.json"), StoredTensors(self.files)
        if not config:
            raise OSError(
                f"{self.source} has no config.json any more; expected the one that was there when it was read"
            )
        to_stored_layout = partial(self._to_stored_layout, model)
        comparison = write_weights(model, stored, self.model_names(model, stored), to_stored_layout, directory)
        write_model_json(directory / "config.json", self._config_to_write(config, model))
        self.files.write_generation_config(model.generation_config, ends, directory)
        self.files.copy_into(tokenizer.vocab_files_names.values(), directory)
        return comparison

    def _to_stored_layout(self, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's state dict under the names and in the shapes of the checkpoint."""
        converted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
        return converted

    def _config_to_write(self, config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
        """Return the source's ``config`` as it is written beside the weights of ``model``."""
        return config_to_write(config, model)

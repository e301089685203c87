"""Load a whole model by its name, or the base of a directory that peft wrote with its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from toolkit.config.schema import ModelConfig
from toolkit.inference.peft_adapter import apply_peft_adapter, base_of_adapter
from toolkit.models.added_tokens import add_token_rows
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import Dtype, LoadedModel, load, load_tokenizer, resolve_source, stored_dtype
from toolkit.runtime.errors import CheckpointError, ModelError, UsageError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_whole(name: str, trust_remote_code: bool, dtype: Dtype | None) -> tuple[LoadedModel, ModelConfig]:
    """Load the model that a directory, Hub id or bundled name stands for, and say how; see ``open_model``."""
    model, dtype = _describe(name, None, trust_remote_code, dtype)
    loaded = load(model)
    cast_weights(loaded.model, getattr(torch, dtype))
    return loaded, model


def load_with_adapter(
    directory: Path, base: str | Path | None, trust_remote_code: bool, dtype: Dtype | None
) -> tuple[LoadedModel, ModelConfig]:
    """Load the base of a directory that peft wrote, merge its adapters, and say how; see ``open_model``.

    A tokenizer beside the adapters is used in place of the base's, and its tokens beyond the base's tables get rows.

    Raises:
        CheckpointError: as ``apply_peft_adapter``, or no base model is named.
        ModelError: the base model cannot be loaded.
        UsageError: ``trust_remote_code`` and the base is on the Hub at no pinned commit.
    """
    name, revision = (str(base), None) if base is not None else base_of_adapter(directory)
    try:
        resolve_source(name)
    except ModelError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"{directory} stands for the model {name} with adapters (base_model_name_or_path in its "
            f"adapter_config.json), which cannot be loaded: {error}. If it moved, name it with --base"
        ) from None
    model, dtype = _describe(name, revision, trust_remote_code, dtype)
    has_tokenizer = any((directory / file).is_file() for file in _TOKENIZER_FILES)
    loaded = load(model, load_tokenizer(model, directory if has_tokenizer else None))
    length = loaded.model.get_input_embeddings().weight.shape[0]
    added = sorted(row for row in loaded.tokenizer.get_vocab().values() if row >= length)
    if has_tokenizer and added:
        add_token_rows(loaded.model, added)
        loaded = replace(loaded, anatomy=detect_anatomy(loaded.model))
    apply_peft_adapter(loaded, directory)
    loaded = replace(loaded, anatomy=replace(detect_anatomy(loaded.model), added=tuple(added)))
    cast_weights(loaded.model, getattr(torch, dtype))
    return loaded, model.model_copy(update={"delta": str(directory)})


def _describe(
    name: str, revision: str | None, trust_remote_code: bool, dtype: Dtype | None
) -> tuple[ModelConfig, Dtype]:
    """Return how a model is loaded, and the precision to cast it to; None takes that in which it is stored."""
    dtype = dtype or stored_dtype(name, revision)
    loaded_as = "bfloat16" if dtype == "bfloat16" else "float32"
    values = {"name_or_path": name, "revision": revision, "trust_remote_code": trust_remote_code, "dtype": loaded_as}
    try:
        return ModelConfig.model_validate(values), dtype
    except ValidationError:
        raise UsageError(
            f"--trust-remote-code runs code that you have read, and {name} is on the Hub at no pinned commit, where it "
            f"may change: hf download {name} --revision COMMIT --local-dir DIR, and name DIR"
        ) from None


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights that have the model's dtype; buffers (rotary frequencies) and weights kept in float32 stay."""
    stored_as = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == stored_as:
            parameter.data = parameter.data.to(dtype)

"""Build a model without its weights: every tensor on the meta device, with a shape and no storage."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from toolkit.config.schema import ModelConfig
from toolkit.inference.open_model import all_added_tokens, load_tokenizer_of
from toolkit.models.added_tokens import add_token_rows, token_ids
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.exaone import llama_name, read_exaone_config
from toolkit.models.load import LoadedModel, is_exaone_source, resolve_source
from toolkit.models.quirks import turn_off_layerdrop
from toolkit.models.source_files import require_own_code
from toolkit.models.storage_format import refuse_kernels
from toolkit.models.weight_files import open_weights
from toolkit.runtime import hub
from toolkit.runtime.errors import FrostlineError, ModelError, PlanError
from toolkit.runtime.out_of_memory import is_out_of_memory
from toolkit.runtime.safetensors_io import FLOATS
from toolkit.split.logit_processing import MODEL_CODE_ERRORS


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device, and its parts."""

    model: PreTrainedModel
    anatomy: Anatomy
    note: str
    """Where the shapes were read from, for the plan."""

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """Return the longest input in tokens; None if the config states none."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(longest) if longest else None


def meta_model(config: ModelConfig) -> MetaModel:
    """Build the model of a recipe from its config.json alone, and compare it with the headers of its safetensors.

    Raises:
        ModelError: the model is missing, transformers cannot build its config, or its weights have other shapes; or as
            ``load_tokenizer``, if tokens are added.
        PlanError: the model's class cannot be built on the meta device.
    """
    source = resolve_source(config.name_or_path, needs_weights=False)
    exaone = is_exaone_source(source, config)
    try:
        with torch.device("meta"):
            model = _build_on_meta(source, config, exaone)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.name_or_path {source!r} cannot be planned from its config. {_one_line(error)}"
        ) from None
    except Exception as error:  # a class that was not written for the meta device may raise anything
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise _build_error(source, error) from None
    turn_off_layerdrop(model)
    model.config.use_cache = False
    anatomy = detect_anatomy(model)
    try:
        note = _compare_with_headers(Path(source), anatomy, exaone)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the weights in {source} cannot be read ({type(error).__name__}: {error}); restore them"
        ) from None
    if tokens := all_added_tokens(config):  # the weights in the files have no rows for them
        added = token_ids(load_tokenizer_of(config), tokens)
        add_token_rows(model, added)
        anatomy = replace(detect_anatomy(model), added=added)
    return MetaModel(model, anatomy, note)


def meta_model_of(loaded: LoadedModel) -> MetaModel:
    """Build the meta model of a loaded model. Call it before a mask is applied, which changes the model's config.

    Raises:
        PlanError: the model's class cannot be built on the meta device.
    """
    model = loaded.model
    try:
        with torch.device("meta"):
            meta = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    except MODEL_CODE_ERRORS as error:
        raise _build_error(type(model).__name__, error) from None
    turn_off_layerdrop(meta)
    return MetaModel(meta, loaded.anatomy, "the loaded model")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _build_error(name: str, error: Exception) -> PlanError:
    """Return the error for a class that cannot be built on the meta device."""
    return PlanError(
        f"{name} cannot be planned: its class cannot be built on the meta device ({_one_line(error)[:200]})"
    )


def _build_on_meta(source: str, config: ModelConfig, exaone: bool) -> PreTrainedModel:
    """Build the model of ``source`` from its config; the caller sets the meta device as default."""
    attention = config.attn_implementation
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        # saves the same activations as sdpa, and planning does not need the flash_attn package
        "attn_implementation": "sdpa" if attention == "flash_attention_2" else attention,
    }
    if exaone:
        return LlamaForCausalLM._from_config(read_exaone_config(source, config.revision), **options)
    trust = config.trust_remote_code
    try:
        with hub.downloads(source):
            require_own_code(source, config.revision, trust)
            hf_config = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=trust)
    except Exception as error:  # transformers validates some values and raises anything on others
        raise ModelError(
            f"the config.json of {source} cannot be used ({type(error).__name__}: {_one_line(error)})"
        ) from None
    refuse_kernels(hf_config, trust)
    return AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust, **options)


def _compare_with_headers(directory: Path, anatomy: Anatomy, exaone: bool) -> str:
    """Compare the safetensors headers in ``directory`` with the meta model's shapes; return ``MetaModel.note``.

    Raises:
        ModelError: shapes differ, or the weights are quantised.
    """
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not files:
        return "config.json; no weights were looked at"
    stored = {
        llama_name(name) if exaone else name: info
        for file in files
        for name, info in open_weights(file).entries.items()
    }
    is_incomplete = any(tensor.alias_of is None and tensor.name not in stored for tensor in anatomy.tensors)
    wrong, packed = [], set()
    for name, info in stored.items():
        tensor = anatomy.by_name.get(name)
        in_place_of_weights = tensor.can_train if tensor is not None else is_incomplete and not name.endswith("bias")
        if in_place_of_weights and info["dtype"] not in {*FLOATS, "BOOL", "I64"}:  # the last two store no weights
            packed.add(info["dtype"])
        if tensor is not None and tuple(info["shape"]) != tensor.shape:
            wrong.append(f"  - {name}: {tuple(info['shape'])} stored, config.json makes it {tensor.shape}")
    if wrong:
        raise ModelError("\n".join([f"{directory}: config.json and weights do not agree:", *wrong[:5]]))
    if packed:
        raise ModelError(
            f"{directory} holds weights of type {', '.join(sorted(packed))}; "
            "expected floating point weights: name the unquantised model"
        )
    agreeing = len(stored.keys() & anatomy.by_name.keys())
    dtypes = ", ".join(sorted({info["dtype"] for info in stored.values()}))
    gib = sum(info["data_offsets"][1] - info["data_offsets"][0] for info in stored.values()) / 2**30
    return f"config.json; headers of {agreeing} tensors agree ({dtypes}, {gib:.2f} GiB)"

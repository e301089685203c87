"""Build a model without its weights: every tensor on the meta device, which knows shapes and holds no bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from toolkit.config.schema import ModelConfig
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.exaone import is_exaone, llama_name, read_exaone_config
from toolkit.models.load import LoadedModel, explain_hub_error, resolve_source
from toolkit.models.quirks import turn_off_layerdrop
from toolkit.models.storage_format import refuse_kernels
from toolkit.models.weight_files import open_weights
from toolkit.runtime.errors import FrostlineError, ModelError, PlanError
from toolkit.runtime.out_of_memory import is_out_of_memory
from toolkit.runtime.safetensors_io import FLOATS

LOOKED_AT_CONTENT = (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
"""Errors that a model raises on tensors without content, or cut where it cannot be."""


@dataclass(frozen=True)
class MetaModel:
    """Hold a model whose tensors have no content, and its parts."""

    model: PreTrainedModel
    anatomy: Anatomy
    note: str
    """Where it was read from, and what the headers of the weights say."""

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """Return the longest input in tokens, where the config states one."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(longest) if longest else None


def meta_model(config: ModelConfig) -> MetaModel:
    """Build the model that ``config`` names from its config.json alone, and check the headers of its safetensors.

    Raises:
        ModelError: no such model, a config that transformers cannot build, or weights of other shapes than it says.
        PlanError: its class cannot be built without bytes.
    """
    source = resolve_source(config.name_or_path, needs_weights=False)
    exaone = is_exaone_source(source, config)
    try:
        with torch.device("meta"):
            model = _build(source, config, exaone)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"model.name_or_path {source!r} cannot be planned from its config. {text}") from None
    except Exception as error:  # a class built in a way it was not made for raises anything
        if isinstance(error, FrostlineError) or is_out_of_memory(error):
            raise
        raise _cannot_build(source, error) from None
    turn_off_layerdrop(model)
    model.config.use_cache = False
    anatomy = detect_anatomy(model)
    try:
        note = _check_headers(Path(source), anatomy, exaone)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the weights in {source} cannot be read ({type(error).__name__}: {error}); restore them"
        ) from None
    return MetaModel(model, anatomy, note)


def meta_model_of(loaded: LoadedModel) -> MetaModel:
    """Build the meta model of one that is loaded, before a mask is applied, which changes its config.

    Raises:
        PlanError: its class cannot be built without bytes.
    """
    model = loaded.model
    try:
        with torch.device("meta"):
            bare = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    except LOOKED_AT_CONTENT as error:
        raise _cannot_build(type(model).__name__, error) from None
    turn_off_layerdrop(bare)
    return MetaModel(bare, loaded.anatomy, "the loaded model")


def is_exaone_source(source: str, config: ModelConfig) -> bool:
    """Return True if ``source`` is loaded as the Llama that EXAONE 3.x is.

    Raises:
        ModelError: there is no readable config.
    """
    try:
        return is_exaone(source, config.revision) and not config.trust_remote_code
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:400]
        raise ModelError(
            explain_hub_error(source, error) or f"model.name_or_path {source!r}: no readable config.json. {text}"
        ) from None


def _cannot_build(name: str, error: Exception) -> PlanError:
    reason = " ".join(str(error).split())[:200]
    return PlanError(f"{name} cannot be planned: its class cannot be built on the meta device ({reason})")


def _build(source: str, config: ModelConfig, exaone: bool) -> PreTrainedModel:
    attention = config.attn_implementation
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        # keeps what sdpa keeps, and its package need not be here to plan for it
        "attn_implementation": "sdpa" if attention == "flash_attention_2" else attention,
    }
    if exaone:
        return LlamaForCausalLM._from_config(read_exaone_config(source, config.revision), **options)
    shared = {"trust_remote_code": config.trust_remote_code}
    try:
        hf_config = AutoConfig.from_pretrained(source, revision=config.revision, **shared)
    except Exception as error:  # transformers checks some values and stumbles over others
        text = " ".join(str(error).split())[:400]
        raise ModelError(f"the config.json of {source} cannot be used ({type(error).__name__}: {text})") from None
    refuse_kernels(hf_config, config.trust_remote_code)
    return AutoModelForCausalLM.from_config(hf_config, **options, **shared)


def _check_headers(directory: Path, anatomy: Anatomy, exaone: bool) -> str:
    """Compare the headers of ``directory``'s safetensors, if there are any, with the meta model's shapes."""
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not files:
        return "config.json; no weights were looked at"
    stored = {
        llama_name(name) if exaone else name: info
        for file in files
        for name, info in open_weights(file).entries.items()
    }
    lacking = any(tensor.alias_of is None and tensor.name not in stored for tensor in anatomy.tensors)
    wrong, dtypes, packed, bytes_stored = [], set(), set(), 0
    for name, info in stored.items():
        tensor = anatomy.by_name.get(name)
        dtypes.add(info["dtype"])
        bytes_stored += info["data_offsets"][1] - info["data_offsets"][0]
        in_place_of_weights = tensor.can_train if tensor is not None else lacking and not name.endswith("bias")
        if info["dtype"] not in {*FLOATS, "BOOL", "I64"} and in_place_of_weights:  # nobody packs weights in the two
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
    found = len(stored.keys() & anatomy.by_name.keys())
    return (
        f"config.json; headers of {found} tensors agree ({', '.join(sorted(dtypes))}, {bytes_stored / 2**30:.2f} GiB)"
    )

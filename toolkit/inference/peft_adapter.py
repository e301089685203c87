"""Lay the adapters of a directory that peft wrote onto a base model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toolkit.mask.adapters import Adapter, adapted_weight
from toolkit.mask.apply import add_adapters, merge_adapters, parameters_by_name, untie_head
from toolkit.models.exaone import ExaoneFormat, llama_name
from toolkit.models.load import LoadedModel
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.safetensors_io import SafetensorsFile

log = logging.getLogger("frostline")

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE_PRECISION = "frostline.base_precision"
"""Metadata of the tensors' file: precisions of the quantised layers beside which they trained."""
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying",
    "fan_in_fan_out", "init_lora_weights", "eva_config", "runtime_config", "trainable_token_indices",
}  # fmt: skip
"""Settings that need nothing here, or are followed; any other that is set changes what the adapter computes."""
_ROWS_KEY = "token_adapter.trainable_tokens_delta"
"""End of the name of a tensor that holds rows of a table."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


def is_peft_adapter(directory: Path) -> bool:
    """Return True for a directory that peft's ``save_pretrained`` wrote."""
    return (directory / _CONFIG).is_file()


def is_adapter_directory(directory: Path) -> bool:
    """Return True for a directory that peft wrote and that holds no model beside the adapter."""
    return is_peft_adapter(directory) and not (directory / "config.json").is_file()


def base_of_adapter(directory: Path) -> tuple[str, str | None]:
    """Return the base model's name and revision that a directory of peft's names.

    Raises:
        CheckpointError: its configuration cannot be read, or names none.
    """
    try:
        values = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        name, revision = values.get("base_model_name_or_path"), values.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / _CONFIG} cannot be read ({str(error)[:200]}); restore it") from None
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise CheckpointError(
            f"{directory} names no base model (its {_CONFIG} has base_model_name_or_path {name!r} and "
            f"revision {revision!r}); name it with --base"
        )
    return name, revision or None


@torch.no_grad()
def apply_peft_adapter(loaded: LoadedModel, directory: Path) -> None:
    """Merge the adapters in ``directory`` into the model, in float32 and rounded once, and copy ``modules_to_save``.

    Args:
        loaded: the base model, changed in place; EXAONE may be the equivalent Llama.
        directory: adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, it is no plain LoRA or DoRA, or it does not fit the model.
    """
    config, stored = _read(directory)
    rename = llama_name if isinstance(loaded.storage_format, ExaoneFormat) else str
    names = {name: _model_name(name, rename) for name in stored}
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    adapters = _adapters(config, stored, names, directory)
    rows = _take_rows(tensors, names, config, directory)
    _untie_as_peft(loaded, config, tensors, rows)
    modules = [(module, adapter) for adapter in adapters for module in adapter.modules]
    weights = loaded.anatomy.by_name
    names_of_weights = [f"{module}.weight" for module, _ in modules]
    wrong = [name for name in names_of_weights if name not in weights or weights[name].linear is None]
    if not wrong:
        low_rank = dict(t for module, adapter in modules for t in adapter.tensors(module, loaded.anatomy))
        shapes = {**{name: tensor.shape for name, tensor in weights.items()}, **low_rank}
        wrong = [name for name, tensor in tensors.items() if shapes.get(name) != tuple(tensor.shape)]
        widths = {module: shapes.get(f"{module}.weight", ())[1:] for module in rows}
        wrong += [module for module, (_, values) in rows.items() if widths[module] != values.shape[1:]]
    lengths = {module: weights[f"{module}.weight"].shape[0] for module in rows if f"{module}.weight" in weights}
    if short := [module for module, length in lengths.items() if max(rows[module][0], default=0) >= length]:
        raise CheckpointError(
            f"{directory} does not fit: it holds row {max(rows[short[0]][0])} of {short[0]}, which has "
            f"{lengths[short[0]]:,} rows; expected the tokens that it trained in model.add_tokens, in their order"
        )
    if wrong:
        raise CheckpointError(
            f"{directory} does not fit {loaded.model.config.name_or_path or type(loaded.model).__name__}: {wrong[0]} "
            f"and {len(wrong) - 1} more are no linear layers there, are missing, or have another shape; expected the "
            f"base model that it was trained on ({config.base_model_name_or_path}), and adapters on linear layers"
        )
    if lacking := sorted(low_rank.keys() - tensors.keys()):
        raise CheckpointError(f"{directory} lacks {lacking[0]} and {len(lacking) - 1} more tensors; it is damaged")
    add_adapters(loaded.model, adapters, seed=0)
    parameters = parameters_by_name(loaded.model)
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    merge_adapters(loaded.model, tensors)
    for module, (ids, values) in rows.items():
        weight = loaded.model.get_parameter(f"{module}.weight")
        weight[list(ids)] = values.to(weight.dtype)
    log.info("the adapters of %s are merged into %d layers", directory, len(modules))


def _take_rows(
    tensors: dict[str, torch.Tensor], names: Mapping[str, str], config: Any, directory: Path
) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Take the rows of tables out of ``tensors``; return ids and values [R, H] by the table's module.

    ``names`` maps the names in the file, by which the configuration goes, to those in the model.

    Raises:
        CheckpointError: the configuration does not say which rows they are.
    """
    rows = {}
    told = config.trainable_token_indices
    for stored in [name for name in names if name.endswith(f".{_ROWS_KEY}")]:
        values, table, ids = tensors.pop(names[stored]), stored.removesuffix(f".{_ROWS_KEY}"), told
        if isinstance(told, dict):
            ids = next((own for key, own in told.items() if table.endswith(f".{key}")), None)
        are_rows = isinstance(ids, list) and all(type(row) is int and row >= 0 for row in ids)
        if not are_rows or len(ids) != len(values):
            raise CheckpointError(
                f"{directory} holds {len(values)} rows of {table}, and its trainable_token_indices name {ids}; "
                f"expected as many: restore {_CONFIG}"
            )
        rows[names[stored].removesuffix(f".{_ROWS_KEY}")] = ids, values
    return rows


def _read(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return peft's configuration, and the tensors by the names that its file has.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no LoRA that this version understands.
    """
    from peft import LoraConfig, PeftConfig

    if not (directory / _TENSORS).is_file() and any(directory.glob("adapter_model.bin")):
        raise CheckpointError(
            f"{directory} holds adapter_model.bin, and pickled weights are not loaded; load it with peft once and call "
            "save_pretrained"
        )
    try:
        config = PeftConfig.from_pretrained(str(directory))
        file = SafetensorsFile(directory / _TENSORS)
        stored = {name: file.tensor(name) for name in file.entries}
        precision = file.metadata.get(BASE_PRECISION)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} is not a readable peft adapter ({type(error).__name__}: {error}); expected {_CONFIG} and "
            f"{_TENSORS}"
        ) from None
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory} holds a {config.peft_type}; expected LoRA, rsLoRA or DoRA")
    plain, values = vars(LoraConfig()), vars(config)
    if config.init_lora_weights not in _STARTS:
        raise CheckpointError(
            f"{directory} began with init_lora_weights {config.init_lora_weights!r}, which changes the base model's "
            "weights; merge it with peft first, and name the merged model"
        )
    if others := [key for key, value in values.items() if key not in _UNDERSTOOD and value != plain.get(key)]:
        raise CheckpointError(
            f"{directory} sets {others[0]} ({values[others[0]]!r}), which is not supported; expected LoRA, rsLoRA or "
            "DoRA on linear layers. Merge it with peft first, and name the merged model"
        )
    if precision is not None:
        log.warning(
            "the adapters of %s trained on layers in %s, and are merged into plain ones here, which "
            "computes something near; name the run itself, or its export.py --delta, for what was validated",
            directory, precision,
        )  # fmt: skip
    return config, stored


def _model_name(name: str, rename: Any) -> str:
    """Return the name that a tensor of peft's file has in a model with adapters."""
    module, is_adapter, rest = rename(name.removeprefix("base_model.model.")).partition(".lora_")
    if not is_adapter:
        return str(module)
    return f"{module}.lora_{rest.removesuffix('.weight')}.default.weight"


def _adapters(
    config: Any, stored: Mapping[str, torch.Tensor], names: Mapping[str, str], directory: Path
) -> list[Adapter]:
    """Return an adapter for each rank and alpha, beside the layers of ``stored``.

    Patterns of alpha are looked up by the names that the file has, ranks are those of its tensors.

    Raises:
        CheckpointError: there is none, or its alphas are no numbers.
    """
    from peft.utils.other import get_pattern_key

    found: dict[tuple[int, float], list[str]] = {}
    try:
        for name, tensor in stored.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                key = get_pattern_key(list(config.alpha_pattern or {}), module)
                alpha = float((config.alpha_pattern or {}).get(key, config.lora_alpha))
                layer = adapted_weight(names[name]).removesuffix(".weight")
                found.setdefault((tensor.shape[0], alpha), []).append(layer)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{directory}: its alpha cannot be read ({error}); restore {_CONFIG}") from None
    if not found and not config.trainable_token_indices:
        raise CheckpointError(f"{directory} holds no adapter of a linear layer; expected lora_A and lora_B of each")
    return [
        Adapter(tuple(modules), rank, alpha, 0.0, bool(config.use_rslora), bool(config.use_dora), "kaiming")
        for (rank, alpha), modules in found.items()
    ]


def _untie_as_peft(
    loaded: LoadedModel, config: Any, tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Any]
) -> None:
    """Untie a tied head where peft keeps the two apart: it saves one of them, or both as modules of their own.

    Rows of the embeddings are the head's too, and those of the head its own.
    """
    tied = loaded.anatomy.tied_head
    if tied is None or config.ensure_weight_tying:
        return
    if tied.name in tensors or tied.alias_of in tensors or loaded.anatomy.head in rows:
        untie_head(loaded.model, loaded.anatomy)

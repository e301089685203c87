"""Export a run's adapters as a directory that peft's ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from toolkit.checkpoint.choice import Step
from toolkit.checkpoint.delta import Delta
from toolkit.config.schema import ModelConfig
from toolkit.data.chat_rendering import read_rendering
from toolkit.exporting.peft_rows import ROWS_KEY, load_config, require_sayable_rows, rows_by_table
from toolkit.exporting.quantised_base import adapter_card
from toolkit.exporting.run_export import check_paths, staging_directory, write_chat_template
from toolkit.exporting.vllm_rules import vllm_advice
from toolkit.inference.base_check import require_same_config, require_trust
from toolkit.inference.open_model import read_run
from toolkit.inference.peft_adapter import BASE_PRECISION
from toolkit.mask.adapters import Adapter, is_adapter_tensor
from toolkit.mask.rows import is_rows_tensor
from toolkit.models.added_tokens import token_ids
from toolkit.models.exaone import exaone_name
from toolkit.models.load import Dtype, is_exaone_source, load_tokenizer, resolve_source
from toolkit.models.source_files import SourceFiles
from toolkit.models.weight_files import StoredTensors
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.safetensors_io import write_safetensors

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger("frostline")


def export_adapter(
    run: Path,
    target: Path,
    dtype: Dtype = "float32",
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the adapters and rows of a run, and what else trained, for peft.

    Whole tensors beside them become ``modules_to_save``, and a tokenizer with added tokens is written. A card says how
    to load a base whose layers were held in fewer bits. The names of modules are those of the base model's own class,
    as EXAONE's remote code has them.

    Args:
        run: the run directory.
        target: target directory, empty or not existing.
        dtype: precision of the saved tensors; float32 keeps the masters.
        step: checkpoint, by its number or as ``latest`` or ``best``; None takes the latest.
        base: new path of the base model, if it moved.
        trust_remote_code: run code that ships with the base model's config and tokenizer, if it was trained with it.

    Raises:
        CheckpointError: ``run`` is not a run directory, it trained no adapters, or what it trained cannot be said in
            peft's form; or ``target`` is not empty.
        DiskError: ``target`` cannot be written.
        ModelError: the base model cannot be found, or needs its own code without ``trust_remote_code``.
    """
    check_paths(run, target)
    _, delta = read_run(run, step)
    model = delta.base.config.model_copy(update={"name_or_path": str(base)} if base else {})
    require_trust(model, trust_remote_code)
    source = resolve_source(model.name_or_path, needs_weights=False)
    exaone = is_exaone_source(source, model)

    def base_name(name: str) -> str:
        return exaone_name(f"{name}.").removesuffix(".") if exaone else name

    config = _peft_config(delta, model, base_name)
    files = SourceFiles(source, model.revision)
    stored = StoredTensors(files).entries
    tokenizer = load_tokenizer(model) if model.add_tokens else None
    added = token_ids(tokenizer, model.add_tokens) if tokenizer else ()
    model_config = load_config(source, model)
    require_same_config(model_config, delta.base)
    require_sayable_rows(delta, added, model_config, stored)
    _require_same_targets(config, files.read_json("config.json").get("model_type"))
    _require_whole_modules([base_name(name) for name in delta.mask.names], config, stored)
    tensors = _peft_tensors(delta, base_name, getattr(torch, dtype))
    with staging_directory(target) as staging:
        staging.mkdir()
        config.save_pretrained(str(staging))
        precisions = ", ".join(layers.precision for layers in delta.mask.quantised)
        metadata = {"format": "pt", **({BASE_PRECISION: precisions} if precisions else {})}
        write_safetensors(staging / "adapter_model.safetensors", tensors, metadata)
        if tokenizer:
            tokenizer.save_pretrained(str(staging))
        write_chat_template(read_rendering(run), staging)
        if delta.mask.quantised:
            card = adapter_card(delta, source, max(added, default=-1) + 1, stored, base_name)
            (staging / "README.md").write_text(card, encoding="utf-8")
    advice, serves = vllm_advice(config, delta.mask)
    log.log(logging.INFO if serves else logging.WARNING, "%s", advice)


def _peft_tensors(delta: Delta, base_name: Callable[[str], str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what a delta trained by the names that peft's files give it."""
    tensors = {_peft_name(name): tensor for name, tensor in delta.tensors.items() if not is_rows_tensor(name)}
    tensors |= {f"{table}.{ROWS_KEY}": values for table, (_, values) in rows_by_table(delta).items()}
    return {f"base_model.model.{base_name(name)}": tensor.to(dtype) for name, tensor in tensors.items()}


def _peft_name(name: str) -> str:
    """Return the name that peft's files give to a tensor of an adapter; the name of any other tensor as it is."""
    if not is_adapter_tensor(name):
        return name
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default.", ".")


def _peft_config(delta: Delta, base: ModelConfig, base_name: Callable[[str], str]) -> LoraConfig:
    """Return peft's configuration of a delta; ``base_name`` maps a module's name to that in the base's own class.

    Raises:
        CheckpointError: it has no adapters, or peft cannot express it.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    adapters, advice = delta.mask.adapters, "export it as a model, or with --delta"
    if not (adapters or delta.mask.rows):
        raise CheckpointError(f"this run trained no adapters; {advice}")
    if base.delta is not None:
        raise CheckpointError(f"this run's adapters belong to a model with {base.delta} laid onto it; {advice}")
    if delta.mask.tied in ("both", "head_only") and not delta.mask.rows:
        raise CheckpointError(
            f"this run also trained the tensor that head and embeddings share (mask.tied: {delta.mask.tied}), and "
            f"peft's directory has no place for it; {advice}"
        )
    first = adapters[0] if adapters else Adapter((), 1, 1, 0.0, False, False, "kaiming")
    if other := next((one for one in adapters if _shared(one) != _shared(first)), None):
        raise CheckpointError(
            f"this run trained adapters with different settings beside {first.modules[0]} and {other.modules[0]}, and "
            f"peft's directory holds one dropout, rslora and dora for all; {advice}"
        )
    whole = [name for name in delta.mask.names if not (is_adapter_tensor(name) or is_rows_tensor(name))]
    rows = {base_name(table): list(ids) for table, (ids, _) in rows_by_table(delta).items()}
    return LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base.name_or_path, revision=base.revision,
        inference_mode=True, r=first.rank, lora_alpha=cast(int, first.alpha), lora_dropout=first.dropout,
        use_rslora=first.rslora, use_dora=first.dora,
        target_modules=[base_name(module) for one in adapters for module in one.modules] or DUMMY_TARGET_MODULES,
        trainable_token_indices=rows or None,
        modules_to_save=sorted({base_name(name.rpartition(".")[0]) for name in whole}) or None,
        rank_pattern={base_name(m): a.rank for a in adapters for m in a.modules if a.rank != first.rank},
        alpha_pattern={base_name(m): a.alpha for a in adapters for m in a.modules if a.alpha != first.alpha},
    )  # fmt: skip


def _require_same_targets(config: LoraConfig, model_type: str | None) -> None:
    """Raise CheckpointError if peft would read the targets otherwise for a model of this type.

    Of some mixtures of experts it takes dense layers called gate_proj for experts of transformers 4, which are fused.
    """
    if not _targets(config):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read, model = copy.deepcopy(config), SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            convert_peft_config_for_transformers(read, model, None)  # type: ignore[arg-type]
        except ValueError:  # it needs all of the experts' layers
            read.target_modules = None
    if set(_targets(read)) != set(_targets(config)):
        raise CheckpointError(
            f"peft takes some of the adapted layers of {model_type} models for fused experts, so it would load this "
            "adapter wrong; export it as a model, or with --delta"
        )


def _require_whole_modules(trained: Sequence[str], config: LoraConfig, stored: Mapping[str, Any]) -> None:
    """Raise CheckpointError if peft cannot keep the tensors that trained whole as modules of their own.

    Args:
        trained: names of all trained tensors in the base model's own class.
        config: peft's configuration, with the modules that trained whole and the adapted ones.
        stored: the base model's tensors by name, which may lack the first parts of names.
    """
    adapted = set(_targets(config))
    suffixes = {f".{name}" for name in stored}
    if absent := [name for name in adapted if not any(f".{name}.weight".endswith(one) for one in suffixes)]:
        raise CheckpointError(f"the base model has no layer {absent[0]}; name the one that the run was trained on")
    for module in config.modules_to_save or ():
        if inside := [name for name in adapted if f"{name}.".startswith(f"{module}.")]:
            raise CheckpointError(
                f"this run trained tensors of {module} whole and {inside[0]} through an adapter, and peft's directory "
                "cannot hold both; export it as a model, or with --delta"
            )
        own = {one for one in suffixes if f".{module}".endswith(one.rpartition(".")[0])}
        if part := sorted(one for one in own if not any(f".{name}".endswith(one) for name in trained)):
            raise CheckpointError(
                f"this run trained a part of {module} (not its {part[0].rpartition('.')[2]}), and peft's directory "
                "holds whole modules; export it as a model, or with --delta"
            )


def _targets(config: LoraConfig) -> list[str]:
    """Return the adapted layers; peft has a word for none."""
    return [] if isinstance(config.target_modules, str) else list(config.target_modules or ())


def _shared(adapter: Adapter) -> Adapter:
    """Return an adapter's settings without those that peft takes for each module."""
    return replace(adapter, modules=(), rank=0, alpha=0, init="kaiming")

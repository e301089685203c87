"""Fill "auto" in a DeepSpeed JSON from the recipe, and report all contradictions at once. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.config.mask_schema import MaskConfig
from toolkit.config.policy import global_batch, most_micro_batches
from toolkit.config.schema import RunConfig
from toolkit.engine.deepspeed.json_file import (
    check_sections,
    fill_bucket_sizes,
    find_autos,
    read_ds_config,
    zero_stage,
)
from toolkit.engine.deepspeed.nvme_files import check_nvme_paths, nvme_sections
from toolkit.runtime.errors import ConfigError


def load_ds_config(path: Path | None, config: RunConfig, ranks: int, hidden_size: int) -> dict[str, Any] | None:
    """Return ``resolve_ds_config`` of the file that ``--ds`` names; None without one."""
    return None if path is None else resolve_ds_config(read_ds_config(path), config, ranks, hidden_size, path)


def zero_config(ds_config: dict[str, Any]) -> Any:
    """Return DeepSpeed's own reading of ``zero_optimization``, a ``DeepSpeedZeroConfig``; imports DeepSpeed.

    It fills defaults and replaces deprecated keys (``cpu_offload``). ``ds_config`` is the result of
    ``resolve_ds_config``.

    Raises:
        ConfigError: DeepSpeed refuses the section.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    except (ValidationError, AssertionError) as error:
        raise ConfigError([" ".join(str(error).split())], "DeepSpeed file, as DeepSpeed reads it") from None


def resolve_ds_config(
    ds_config: dict[str, Any], config: RunConfig, ranks: int, hidden_size: int, path: Path
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``: ``ds_config`` with the recipe's values filled in.

    The recipe owns batch sizes, precision, clipping, optimizer and schedule. A value in the file that says otherwise
    is a contradiction, never an override. ``optimizer`` and ``scheduler`` blocks are checked and dropped, because
    ``toolkit.optim.groups`` builds both. ZeRO's bucket sizes follow from the model's ``hidden_size`` as in
    transformers. ``ds_config`` is the content of the file ``path``; it is left unchanged.

    Raises:
        ConfigError: the file contradicts the recipe, or has an "auto" that nothing fills; lists all faults.
    """
    resolved = copy.deepcopy(ds_config)
    faults = list(check_sections(resolved))
    if faults:
        raise ConfigError(faults, f"DeepSpeed file {path}")
    zero = resolved.setdefault("zero_optimization", {})
    faults += _fill_recipe_values(resolved, config, ranks)
    faults += _fill_reduce_dtype(resolved, config)
    faults += _check_and_drop_blocks(resolved, config)
    faults += _check_optim_name(resolved, config)
    fill_bucket_sizes(zero, hidden_size)
    faults += check_nvme_paths(resolved)
    faults += _check_changes(resolved, config.mask) if config.mask.changes else ()
    faults += [f'{where} is "auto", but nothing in the recipe fills it; give a value' for where in find_autos(resolved)]
    if faults:
        raise ConfigError(faults, f"DeepSpeed file {path}, read against the recipe")
    if most_micro_batches(config.train) > 1 and zero_stage(resolved):  # stage 0 knows the model's dtype alone
        resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused AdamW runs on offloaded masters too
    if config.optim.name != "adamw":
        resolved["zero_allow_untested_optimizer"] = True  # this repository's tests try them
    resolved.setdefault("steps_per_print", 2**31)  # the progress bar reports steps
    # its throughput, which nobody prints, would cost two waits for the GPU in every step
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    return resolved


def with_fitting_bucket(ds_config: dict[str, Any], elements: int) -> dict[str, Any]:
    """Return ``ds_config`` with a reduction bucket of no more than the ``elements`` that train.

    DeepSpeed allocates all of a bucket, 100 MB for adapters of 5 where a file has the size that suits whole blocks.
    """
    zero = ds_config["zero_optimization"]
    bucket = min(zero_config(ds_config).reduce_bucket_size, elements)
    return {**ds_config, "zero_optimization": {**zero, "reduce_bucket_size": bucket}}


def _fill_recipe_values(ds_config: dict[str, Any], config: RunConfig, ranks: int) -> Iterator[str]:
    """Set the keys that the recipe owns; yield a fault for each that the file sets to another value."""
    train = config.train
    batch = global_batch(train.micro_batch_size, train.gradient_accumulation_steps, ranks)
    micro, accumulation = train.micro_batch_size, most_micro_batches(train)
    owners = ("train.micro_batch_size", "train.gradient_accumulation_steps")
    if train.micro_batch_tokens is not None:  # the engine is told of each step's last micro batch, however many it has
        micro, owners = 1, ("train.micro_batch_tokens", "train.micro_batch_tokens")
    for section, key, value, owner in (
        ("", "train_micro_batch_size_per_gpu", micro, owners[0]),
        ("", "gradient_accumulation_steps", accumulation, owners[1]),
        ("", "train_batch_size", batch, f"micro batch x accumulation x {ranks} ranks"),
        ("", "gradient_clipping", train.max_grad_norm, "train.max_grad_norm"),
        ("bf16", "enabled", config.model.dtype == "bfloat16", "model.dtype"),
        ("fp16", "enabled", False, "model.dtype"),
    ):
        target = ds_config.setdefault(section, {}) if section else ds_config
        in_file = target.get(key, "auto")
        if in_file not in ("auto", value):
            name = f"{section}.{key}" if section else key
            yield f'{name} is {in_file!r}, the recipe\'s {owner} makes it {value!r}; write "auto" or change the recipe'
        target[key] = value


def _fill_reduce_dtype(ds_config: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Set the precision of sums over ranks if the recipe has one; yield a fault if the file sets another, or none."""
    key, words = "communication_data_type", {"float32": "fp32", "bfloat16": "bf16"}
    asked, in_file = words.get(config.train.reduce_dtype or ""), ds_config.pop(key, None)
    word = str("auto" if in_file is None else in_file).lower()
    if asked and word not in ("auto", asked):
        yield (
            f"{key} is {in_file!r}, the recipe's train.reduce_dtype makes it {asked!r}; "
            'write "auto" or change the recipe'
        )
    elif word not in ("auto", "fp32", "bf16", "fp16"):
        yield f"{key} is {in_file!r}; DeepSpeed sums gradients in 'fp32', 'bf16' or 'fp16'"
    if asked or word != "auto":  # without it DeepSpeed sums in the model's precision
        ds_config[key] = asked or word


def _check_and_drop_blocks(ds_config: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Remove the ``optimizer`` and ``scheduler`` blocks; yield what in them contradicts the recipe."""
    train = config.train
    optimizer, scheduler = ds_config.pop("optimizer", None), ds_config.pop("scheduler", None)
    if optimizer is not None:
        if optimizer.get("type") != "AdamW":
            yield (
                f"optimizer.type is {optimizer.get('type')!r}; frostline builds the recipe's optimizer, AdamW: "
                "drop the block"
            )
        expected = {
            "lr": train.learning_rate, "weight_decay": train.weight_decay,
            "betas": list(config.optim.betas), "eps": config.optim.eps,
        }  # fmt: skip
        yield from _check_params(optimizer, "optimizer", expected)
    if scheduler is not None:
        if scheduler.get("type") != "WarmupDecayLR" or train.scheduler != "linear":
            yield (
                f"scheduler.type is {scheduler.get('type')!r}, the recipe's train.scheduler is {train.scheduler!r}; "
                "drop the block, frostline builds the schedule"
            )
        yield from _check_params(scheduler, "scheduler", {"warmup_min_lr": 0, "warmup_max_lr": train.learning_rate})


def _check_optim_name(ds_config: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield settings that DeepSpeed 0.19 does not support with the recipe's ``optim.name``."""
    name, zero = config.optim.name, ds_config["zero_optimization"]
    offload = zero.get("offload_optimizer")
    offload = offload if isinstance(offload, dict) else {}
    if offload.get("ratio", 1.0) != 1.0:
        yield (
            f"zero_optimization.offload_optimizer.ratio is {offload['ratio']!r}; DeepSpeed splits the update between "
            "CPU and GPU with its own CPU Adam alone: drop the key"
        )
    if name == "adamw":
        return
    if offload.get("device") == "nvme":
        yield (
            f"zero_optimization.offload_optimizer.device is 'nvme' and the recipe's optim.name is {name!r}; DeepSpeed "
            'swaps float32 state alone to NVMe: write "cpu", or optim.name: adamw'
        )
    if "zenflow" in zero:
        yield (
            f"zero_optimization.zenflow needs DeepSpeed's own CPU Adam, the recipe's optim.name is {name!r}: "
            "drop the block"
        )
    if zero_stage(ds_config) == 0:
        yield (
            f"zero_optimization.stage is 0 and the recipe's optim.name is {name!r}; without ZeRO DeepSpeed divides "
            "nothing and takes one step with zero gradients at the start: leave out --ds, or write 1, 2 or 3"
        )


def _check_changes(ds_config: dict[str, Any], mask: MaskConfig) -> Iterator[str]:
    """Yield settings under which weights and optimizer state cannot move to the next phase of a mask that changes."""
    key = "mask.schedule" if mask.schedule else "mask.rotation"
    if "offload_param" in nvme_sections(ds_config):
        yield f"zero_optimization.offload_param.device is 'nvme', and {key} moves weights; write 'cpu'"
    if zero_stage(ds_config) == 0:
        yield f"zero_optimization.stage is 0; {key} needs 1, 2 or 3, or no --ds at all"


def _check_params(block: dict[str, Any], name: str, expected: dict[str, Any]) -> Iterator[str]:
    """Yield faults of the ``params`` of block ``name``: unknown keys, and values other than "auto" or the recipe's."""
    params = block.get("params", "auto")
    if params != "auto" and not isinstance(params, dict):
        yield f"{name}.params is {params!r}; expected an object"
    for key, value in params.items() if isinstance(params, dict) else ():
        if value == "auto":
            continue
        if key not in expected:
            yield f'{name}.params.{key} is {value!r}; the recipe has no such setting: drop it or write "auto"'
        elif value != expected[key]:
            yield (
                f"{name}.params.{key} is {value!r}, the recipe makes it {expected[key]!r}; "
                'write "auto" or change the recipe'
            )

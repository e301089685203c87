"""Read a DeepSpeed JSON, and check what holds for training and inference alike. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.config.yaml_text import unique_keys
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.redact import find_secrets

_KNOWN_KEYS = frozenset(
    [
        "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type",
        "csv_monitor", "data_types", "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler",
        "fp16", "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "log_level",
        "memory_breakdown", "optimizer", "prescale_gradients", "scheduler", "steps_per_print", "tensorboard",
        "timers", "train_batch_size", "train_micro_batch_size_per_gpu", "use_node_local_storage",
        "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)  # fmt: skip
"""Top-level keys that are accepted. DeepSpeed ignores unknown keys silently; the keys it knows beyond these act on data
loaders or gradients, which this package handles itself."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON file, with "auto" values as they are.

    Raises:
        ConfigError: the file is missing, not a JSON object, or has keys that DeepSpeed would silently ignore.
    """
    try:
        content = json.loads(read_regular(path, 2**20), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        fault = f"{path}: no such file; --ds takes a DeepSpeed JSON such as ds_configs/zero2.json"
        raise ConfigError([fault]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read as UTF-8 text ({error})"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: not valid JSON in UTF-8: {error}"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: holds a {type(content).__name__}; expected an object"])
    faults = [
        f"{where} holds a password or token; no key of it needs one: remove it" for where in find_secrets(content)
    ]
    for key in content:
        if key not in _KNOWN_KEYS:
            near = difflib.get_close_matches(key, sorted(_KNOWN_KEYS), n=1)
            faults.append(
                f"{key}: not a key that can be used here" + (f" (did you mean {near[0]}?)" if near else "; remove it")
            )
    if faults:
        raise ConfigError(faults, f"DeepSpeed file {path}")
    return content


def check_sections(ds_config: dict[str, Any]) -> Iterator[str]:
    """Yield faults of sections that are not objects, or hold settings under which training would go wrong."""
    for section in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types"):
        if not isinstance(ds_config.get(section, {}), dict):
            yield f"{section} is {ds_config[section]!r}; expected an object"
    bf16, zero = (
        section if isinstance(section, dict) else {}
        for section in (ds_config.get("bf16"), ds_config.get("zero_optimization"))
    )
    for key in bf16:
        if key not in ("enabled", "check_grad_overflow", "immediate_grad_update"):
            yield f"bf16.{key} would take the float32 masters away that low-precision training needs; remove it"
    if bf16.get("check_grad_overflow", True) is not True:
        yield f"bf16.check_grad_overflow is {bf16['check_grad_overflow']!r}: a NaN would reach the weights; remove it"
    if zero.get("compute_grad_norm", True) is not True:
        yield (
            f"zero_optimization.compute_grad_norm is {zero['compute_grad_norm']!r}: nobody would know whether the "
            "gradient is finite; remove it"
        )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3"


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage that a DeepSpeed configuration asks for."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def fill_bucket_sizes(zero: dict[str, Any], hidden_size: int) -> None:
    """Set the sizes that are "auto" in ``zero_optimization`` as transformers does."""
    for key, elements in {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }.items():
        if zero.get(key) == "auto":
            zero[key] = elements


def find_autos(value: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted key of every "auto" that is left in ``value``."""
    if value == "auto":
        yield where
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from find_autos(part, f"{where}.{key}" if where else key)

"""Say the rows that a run trained as peft's trainable token indices, or why they cannot be said so."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from toolkit.checkpoint.delta import Delta
from toolkit.config.schema import ModelConfig
from toolkit.mask.adapters import is_adapter_tensor
from toolkit.models.exaone import read_exaone_config
from toolkit.models.load import is_exaone_source
from toolkit.runtime.errors import CheckpointError

log = logging.getLogger("frostline")

ROWS_KEY = "token_adapter.trainable_tokens_delta"
"""End of the name that the rows of a table have in peft's file."""

_ADVICE = "export it as a model, or with --delta"


def load_config(source: str, model: ModelConfig) -> PretrainedConfig:
    """Load the configuration of the base model, of EXAONE 3.x as the equivalent Llama's."""
    if is_exaone_source(source, model):
        return read_exaone_config(source, model.revision)
    config: PretrainedConfig = AutoConfig.from_pretrained(
        source, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return config


def rows_by_table(delta: Delta) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Return, by the table's module, the ids of the rows that trained, ascending, and their values [R, H]."""
    held: dict[str, dict[int, torch.Tensor]] = {}
    for rows in delta.mask.rows:
        module = rows.table.rpartition(".")[0]
        held.setdefault(module, {}).update(zip(rows.ids, delta.tensors[rows.name], strict=True))
    return {
        module: (tuple(sorted(rows)), torch.stack([rows[row] for row in sorted(rows)])) for module, rows in held.items()
    }


def require_sayable_rows(
    delta: Delta, added: Collection[int], config: PretrainedConfig, stored: Mapping[str, Any]
) -> None:
    """Refuse rows that peft would load otherwise, and say what it needs for those of added tokens.

    Args:
        delta: what the run trained.
        added: ids of the tokens that the run added.
        config: configuration of the base model.
        stored: its tensors by name.

    Raises:
        CheckpointError: an untied head would follow the embeddings; the head of the rows has a bias, which peft leaves
            out; or tokens were added and some of their rows did not train.
    """
    tables = rows_by_table(delta)
    is_tied = bool(config.get_text_config().tie_word_embeddings)
    untied = tables and is_tied and delta.mask.tied == "untie"
    if untied and _embeddings(config, delta.base.config.trust_remote_code) in tables:
        raise CheckpointError(
            "this run untied the head and trained rows of the embeddings, and peft would use them for both, because "
            f"the base ties them; {_ADVICE}"
        )
    if biased := [module for module in tables if any(f".{name}".endswith(f".{module}.bias") for name in stored)]:
        raise CheckpointError(f"{biased[0]} has a bias, which peft leaves out where rows of it train; {_ADVICE}")
    if not added:
        return
    plain = [tensor for tensor in delta.mask.trainable if not is_adapter_tensor(tensor.name)]
    whole = [tensor for tensor in plain if len(tensor.shape) == 2 and tensor.shape[0] > max(added)]
    complete = len(whole) + sum(set(added) <= set(ids) for ids, _ in tables.values())
    if complete < (1 if is_tied and delta.mask.tied != "untie" else 2):
        raise CheckpointError(
            "this run added tokens whose rows did not all train, in the embeddings and in the head, and peft's "
            f"directory holds what trained alone; {_ADVICE}"
        )
    rows = max(added) + 1
    log.info("PeftModel.from_pretrained needs a base with %d rows: %s", rows, resize_call(rows))


def resize_call(rows: int) -> str:
    """Return the line of Python that gives a base as many rows, where it has fewer."""
    return f"base.resize_token_embeddings(max({rows}, base.get_input_embeddings().num_embeddings), mean_resizing=False)"


def _embeddings(config: PretrainedConfig, trust_remote_code: bool) -> str:
    """Return the module name of the token embeddings of a model with this configuration."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    table = model.get_input_embeddings()
    return str(next(name for name, module in model.named_modules() if module is table))

"""Add tokens to a tokenizer, and rows for them to the model's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.models.source_files import write_model_json
from toolkit.runtime.errors import ModelError

_CHUNK_ELEMENTS = 2**22
"""Elements of a table that are converted to integers at once."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer as ordinary ones: texts are split around them, and decoding shows them.

    They are not special, because a special token in a row's text is read as plain text (docs/data.md).

    Raises:
        ModelError: one is there twice, the tokenizer has one of them, or takes fewer.
    """
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        raise ModelError(
            f"model.add_tokens names {', '.join(map(repr, twice))}, which the run of model.delta has added already; "
            "leave it out"
        )
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        listed = ", ".join(f"{token!r} (id {vocabulary[token]})" for token in known)
        raise ModelError(
            f"model.add_tokens names {listed}, which the tokenizer has already; leave it out, and train its row with "
            f"mask.train: {{rows: {{select: embeddings, ids: [{vocabulary[known[0]]}]}}}}"
        )
    # as it is written: a normalizer may put a mark before it, with which it is found at the start of a word alone
    added = tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    if added != len(tokens):
        raise ModelError(
            f"the tokenizer took {added} of the {len(tokens)} tokens of model.add_tokens; expected texts that differ "
            "in more than what it normalises"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of tokens that ``add_tokens`` has added."""
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[token] for token in tokens)


@torch.no_grad()
def add_token_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give tokens a row in the embeddings and in the head, which is the mean of the rows before it.

    Tables that are too short become longer; a padded one has room. The mean is the same on every machine. A model on
    the meta device gets its shapes alone.

    Raises:
        ModelError: transformers cannot lengthen the model's tables.
    """
    old, length, first = _table(model).shape[0], max(ids) + 1, min(ids)
    if length > old:
        _refuse_other_tables(model, old)
        with torch.random.fork_rng(devices=[]):  # transformers draws a start that is replaced
            model.resize_token_embeddings(length, mean_resizing=False)
    new = sorted({*ids, *range(old, length)})
    head: Any = model.get_output_embeddings()
    for table in {
        id(weight): weight for weight in (_table(model), head.weight, head.bias) if weight is not None
    }.values():
        if table.shape[0] < length:
            raise ModelError(
                f"{type(model).__name__} has a table of {table.shape[0]:,} rows, which cannot be lengthened to "
                f"{length:,} for model.add_tokens; leave it out, or name a model with room"
            )
        if not table.is_meta:
            table[new] = _mean_of_rows(table[: min(first, old)]).to(table.dtype)


def _refuse_other_tables(model: PreTrainedModel, length: int) -> None:
    """Raise ModelError if something else has one row for each of ``length`` tokens, which transformers leaves short.

    Such are embeddings for each layer (Gemma 3n and 4), and tables that choose experts by token.
    """
    head: Any = model.get_output_embeddings()
    known = {id(weight) for weight in (_table(model), head.weight, head.bias) if weight is not None}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_table = tensor.ndim > 0 and tensor.shape[0] == length and id(tensor) not in known
        if is_table and not any(word in name for word in ("position", "wpe")):
            raise ModelError(
                f"model.add_tokens lengthens the tables of {type(model).__name__}, and {name} has one row for each "
                "token as well, which transformers does not lengthen; expected a model without such a table"
            )


def _table(model: PreTrainedModel) -> nn.Parameter:
    """Return the weight of the token embeddings."""
    weight: nn.Parameter = model.get_input_embeddings().weight
    return weight


def _mean_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``rows`` [V, ...] over V as float64.

    It is summed up in integers, so that neither the number of threads nor the processor changes a bit of it.
    """
    largest = float(rows.abs().max())
    scale = 2.0 ** (62 - math.ceil(math.log2(len(rows) + 1)) - math.ceil(math.log2(largest or 1.0)))
    step = max(1, _CHUNK_ELEMENTS // max(1, rows[0].numel()))
    total = torch.zeros(rows.shape[1:], dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), step):
        total += (rows[start : start + step].double() * scale).round().long().sum(0)
    return total.double() / (scale * len(rows))


def write_tokens(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write added tokens into the copied files of a tokenizer, or save it anew where it has no tokenizer.json.

    What else the files say stays as it is.

    Raises:
        OSError: the disk is full or refuses.
    """
    rules, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not rules.is_file():
        tokenizer.save_pretrained(str(directory))
        return
    values = json.loads(rules.read_text(encoding="utf-8"))
    values["added_tokens"] = json.loads(backend.to_str())["added_tokens"]
    write_model_json(rules, values)
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if "added_tokens_decoder" in values:
        known = values["added_tokens_decoder"]
        values["added_tokens_decoder"] = known | {
            str(row): {key: getattr(token, key) for key in _TOKEN_KEYS}
            for row, token in tokenizer.added_tokens_decoder.items()
            if str(row) not in known
        }
        write_model_json(settings, values)
    if (older := directory / "added_tokens.json").is_file():
        known = json.loads(older.read_text(encoding="utf-8"))
        write_model_json(older, known | tokenizer.get_added_vocab())


_TOKEN_KEYS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
"""What tokenizer_config.json says of an added token."""

"""Check the data against the model's positions and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.data.examples import Example
from toolkit.data.rows import Rows
from toolkit.runtime.errors import DataError, ModelError


def check_fit(examples: Sequence[Example], model: PreTrainedModel, remedy: str | None = None) -> None:
    """Refuse rows longer than the model's positions and ids beyond its embeddings, before an index error does.

    There must be at least one row. The error message advises ``remedy``; None advises to set ``data.max_length``.

    Raises:
        DataError: a row is too long.
        ModelError: the tokenizer belongs to another model.
    """
    rows = Rows.of(examples)
    longest = int(rows.lengths.max())
    positions = position_limit(model)
    if positions and longest > positions:
        raise DataError(
            f"the longest row has {longest} tokens, the model has {positions} positions; "
            f"{remedy or f'set data.max_length: {positions}'}"
        )
    require_known_ids(rows.largest_id, model)


def require_known_ids(largest: int, model: PreTrainedModel) -> None:
    """Refuse a model whose embedding table has no row for token id ``largest``.

    Raises:
        ModelError: the tokenizer belongs to another model.
    """
    rows = _embedding_rows(model)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives id {largest}, the model embeds {rows} ids; expected a tokenizer made for this model"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the longest input in tokens that the config allows; None if it sets no limit.

    Dynamic NTK stretches the positions of pretraining, which max_position_embeddings means there, by a factor
    (transformers, modeling_rope_utils).
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]  # one, or one for each kind of layer
    stretched = [kind["factor"] for kind in kinds if kind.get("rope_type") == "dynamic"]
    return int(positions * max(stretched, default=1))


def room_for_answer(prompt: Sequence[int], model: PreTrainedModel, most: int) -> int:
    """Return how many tokens may follow ``prompt``: ``most``, or what the model's positions leave.

    Raises:
        DataError: they leave none.
        ModelError: the tokenizer belongs to another model.
    """
    require_known_ids(max(prompt), model)
    positions = position_limit(model)
    if positions and len(prompt) >= positions:
        raise DataError(
            f"the prompt has {len(prompt)} tokens, the model has {positions} positions, which leaves none for an "
            "answer; shorten the question or its contexts"
        )
    return most if positions is None else min(most, positions - len(prompt))


def padding_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Return the padding token's id, or 0 if the model has no embedding of it.

    Any id that is embedded will do, because padding is masked.
    """
    pad_id = int(tokenizer.pad_token_id)
    return pad_id if pad_id < _embedding_rows(model) else 0


def _embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the embedding table."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty tensor between passes

"""Whether data and model go together."""

from __future__ import annotations

from toolkit.data.dataset import Dataset
from toolkit.errors import DataError, ModelError
from toolkit.models.load import LoadedModel


def check_fit(dataset: Dataset, loaded: LoadedModel) -> None:
    """Refuse rows longer than the model's positions and ids beyond its embeddings, before an index error does.

    Raises:
        DataError: a row is too long.
        ModelError: the tokenizer belongs to another model.
    """
    examples = (*dataset.train, *dataset.validation)
    longest = max(len(example.token_ids) for example in examples)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise DataError(
            f"the longest row has {longest} tokens, the model has {positions} positions; "
            f"set data.max_length: {positions}"
        )
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    largest = max(max(example.token_ids) for example in examples)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives id {largest}, the model embeds {rows} ids; expected a tokenizer made for this model"
        )

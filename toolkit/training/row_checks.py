"""Check the rows that train against the tokenizer: every one has a token, and added tokens have rows that train."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from toolkit.mask.layer_mask import LayerMask
from toolkit.models.added_tokens import token_ids
from toolkit.models.anatomy import Anatomy
from toolkit.runtime.errors import MaskError

log = logging.getLogger("frostline")


def check_rows(
    masks: Sequence[LayerMask], anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, added: Sequence[str]
) -> None:
    """Refuse rows that no token has; warn of added tokens whose rows stay at their start.

    Args:
        masks: the mask of each phase.
        anatomy: parts of the model.
        tokenizer: the tokenizer of the run.
        added: tokens that the recipe itself adds.

    Raises:
        MaskError: a row that trains lies in the padding of its table.
    """
    largest = max(tokenizer.get_vocab().values())
    for rows in (rows for mask in masks for rows in mask.rows):
        if beyond := [row for row in rows.ids if row > largest]:
            raise MaskError(
                f"mask.train: rows trains rows {beyond[0]} to {beyond[-1]} of {rows.table}, which no token has: the "
                f"tokenizer's ids end at {largest}, the rest of the table is padding. Expected rows of tokens, such as "
                f"to: {largest}, or from: added with model.add_tokens"
            )
    if not added:
        return
    new = set(token_ids(tokenizer, added))
    tables = {f"{anatomy.token_table}.weight", f"{anatomy.head}.weight"}
    if anatomy.tied_head is not None and all(mask.tied != "untie" for mask in masks):
        tables = {anatomy.tied_head.alias_of or ""}
    for table in sorted(tables):
        trained = {row for mask in masks for rows in mask.rows if rows.table == table for row in rows.ids}
        if not new <= trained and not any(table in mask.names for mask in masks):
            log.warning(
                "model.add_tokens adds %d tokens, and mask.train does not train their rows of %s: they stay the mean "
                "of the others. Expected {rows: {select: [embeddings, head], from: added}} beside what it trains",
                len(new), table,
            )  # fmt: skip

"""Find the largest micro batch of a run, which its memory is planned for."""

from __future__ import annotations

import numpy as np

from toolkit.planning.trace import BatchShape
from toolkit.planning.workload import Workload


def largest_of_rows(workload: Workload, longest: tuple[int, int], rows: int, packed: bool) -> BatchShape:
    """Return the shape of the largest micro batch of ``rows`` rows.

    ``longest`` has the tokens of the longest row and the supervised tokens of the row that has most of them.
    """
    tokens, supervised = longest[0], rows * longest[1]
    if not packed or rows == 1:
        return BatchShape(rows, tokens, supervised)
    lengths = np.full(rows, tokens) if workload.lengths is None else np.sort(workload.tokens_of_rows)[::-1][:rows]
    samples = tuple(np.minimum(lengths, tokens).tolist())
    return BatchShape(1, sum(samples), min(supervised, sum(samples)), samples)


def largest_of_tokens(
    workload: Workload, longest: tuple[int, int], limit: int, rows: int, packed: bool
) -> BatchShape:  # fmt: skip
    """Return the shape of the largest micro batch of up to ``limit`` tokens, cut from ``rows`` rows of a rank.

    Rows of every length may come together, so it is as large as the limit, or one row that is longer than it.
    """
    tokens, most_supervised = longest
    limit = max(min(limit, rows * tokens), tokens)
    count = -(-limit // tokens)  # the fewest rows that reach the limit: attention costs most there
    supervised = count * most_supervised
    if workload.lengths is not None:  # many short rows may have more supervised tokens than few long ones
        of_rows, own = workload.tokens_of_rows, workload.supervised_of_rows
        supervised = max(supervised, int((np.minimum(np.maximum(limit // of_rows, 1), rows) * own).max()))
    if packed and count > 1:
        samples = (*(tokens,) * (limit // tokens), *((limit % tokens,) if limit % tokens else ()))
        return BatchShape(1, limit, min(supervised, limit), samples)
    padded = limit // count
    return BatchShape(count, padded, min(supervised, count * padded))

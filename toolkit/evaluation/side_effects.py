"""Compare models on their rows, and on what training may have done to them beside its task: drift and forgetting."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from toolkit.data.sources import Source
from toolkit.evaluation.comparison import Comparison, compare_models
from toolkit.evaluation.drift import measure_drift, require_base
from toolkit.evaluation.forgetting import FLAG, Items, labelled_items
from toolkit.evaluation.outputs import Asked
from toolkit.evaluation.rows import Part
from toolkit.evaluation.sources import BASE, ModelName, OpenOptions
from toolkit.runtime.errors import DataError

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class SideEffects:
    """Says what is asked beside the comparison on the rows."""

    drift_max_new_tokens: int | None = None
    """Longest answer of the base to an everyday prompt, in tokens; None measures no drift."""
    forgetting: str | None = None
    """Labelled items, see ``labelled_items``; None compares on none."""
    forgetting_task: str | Mapping[str, Any] | None = None
    """Task by which they are read."""


def compare_with_side_effects(
    sources: Sequence[str], named: Source | None, part: Part, asked: Asked, options: OpenOptions, shots: int,
    seed: int, side_effects: SideEffects,
) -> Comparison:  # fmt: skip
    """Do what ``compare_models`` does, then measure drift and forgetting, where asked.

    What is wrong with the request or the labelled items is said before a model loads.

    Raises:
        UsageError, DataError: as ``compare_models``, ``measure_drift`` and ``labelled_items``.
    """
    with ExitStack() as stack:
        items = None
        if side_effects.drift_max_new_tokens is not None:
            require_base(sources, "--drift")
        if side_effects.forgetting is not None:
            require_base(sources, FLAG)
            items = stack.enter_context(labelled_items(side_effects.forgetting, side_effects.forgetting_task))
        comparison = compare_models(sources, named, part, asked, options, shots, seed)
        if side_effects.drift_max_new_tokens is not None:
            gc.collect()  # one model in memory at a time
            log.info("measuring drift on everyday prompts")
            of_drift = Asked(asked.batch_size, max_new_tokens=side_effects.drift_max_new_tokens)
            comparison = replace(comparison, drift=measure_drift(sources, of_drift, options, seed))
        if items is not None:
            gc.collect()
            forgetting = _compare_items(sources, items, Asked(asked.batch_size), options, seed)
            comparison = replace(comparison, forgetting=forgetting)
        return comparison


def _compare_items(sources: Sequence[str], items: Items, asked: Asked, options: OpenOptions, seed: int) -> Comparison:
    """Compare base and sources on labelled items; DataError if a run's recipe would leave some out."""
    names = list(sources)
    if not any(ModelName.parse(name).is_base for name in names):
        names.insert(0, BASE)
    of_items = replace(options, plain_template=items.plain_template)
    found = compare_models(names, items.source, "validation", asked, of_items, seed=seed)
    if found.rows != items.count:
        raise DataError(
            f"{FLAG}: {found.rows} of {items.count} items were scored: the first source cannot read the others "
            "(data.on_bad_row: skip), as the log says; shorten them, or leave them out for all"
        )
    return found if items.data is None else replace(found, data=items.data)

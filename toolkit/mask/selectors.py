"""Selectors: short expressions that name tensors of a model. Imports no torch.

=================  ==================================================================================
``last:N``         the N blocks nearest the head
``first:N``        the N blocks nearest the input
``blocks:LIST``    blocks by index: ``blocks:3``, ``blocks:10-13``, ``blocks:10-13,28``
``head``           the language-model head
``embeddings``     token and position embeddings
``norm``           the norm between the last block and the head
``glob:PATTERN``   tensors whose whole name matches a shell pattern, case-sensitive
``re:PATTERN``     tensors whose whole name matches a regular expression
=================  ==================================================================================

Whole names only: ``re:model.layers.2`` does not reach layers 20 to 29.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence

from toolkit.errors import MaskError
from toolkit.models.anatomy import Anatomy, Part, TensorInfo

FORMS = "last:N, first:N, blocks:LIST, head, embeddings, norm, glob:PATTERN, re:PATTERN"


def resolve(selectors: Sequence[str], anatomy: Anatomy) -> frozenset[str]:
    """The union of what the selectors name, as tensor names of the model (aliases of tied tensors included).

    Raises:
        MaskError: a selector is malformed, out of range, or matches nothing; names close candidates.
    """
    names: set[str] = set()
    for selector in selectors:
        names |= _resolve_one(selector.strip(), anatomy)
    return frozenset(names)


def _resolve_one(selector: str, anatomy: Anatomy) -> set[str]:
    kind, colon, argument = selector.partition(":")
    if selector in _PARTS:
        return _part(selector, anatomy)
    if colon and kind in _WITH_ARGUMENT:
        return _WITH_ARGUMENT[kind](argument, selector, anatomy)
    known = [*_PARTS, *(f"{kind}:" for kind in _WITH_ARGUMENT)]
    near = difflib.get_close_matches(selector if not colon else f"{kind}:", known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise MaskError(f"mask selector {selector!r} is not known; expected one of {FORMS}.{hint}")


def _part(selector: str, anatomy: Anatomy) -> set[str]:
    names = {tensor.name for tensor in anatomy.tensors if tensor.part == _PARTS[selector]}
    if not names:
        raise MaskError(
            f"mask selector {selector!r} matches nothing: this model has no such tensors. "
            f"Its parts are {', '.join(sorted({tensor.part for tensor in anatomy.tensors}))}"
        )
    return names


def _end(argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    count = anatomy.block_count
    if not re.fullmatch(r"[0-9]+", argument) or not 1 <= int(argument) <= count:
        raise MaskError(
            f"mask selector {selector!r}: expected a whole number from 1 to {count}, the blocks of this model"
        )
    size = int(argument)
    return _blocks(range(count - size, count) if selector.startswith("last") else range(size), anatomy)


def _listed(argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    count = anatomy.block_count
    chosen: set[int] = set()
    for item in argument.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", item)
        if not match:
            raise MaskError(
                f"mask selector {selector!r}: {item!r} is not a block; expected a form such as blocks:10-13,28"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise MaskError(f"mask selector {selector!r}: the range {item.strip()} runs backwards; write {high}-{low}")
        if high >= count:
            raise MaskError(
                f"mask selector {selector!r}: block {high} is out of range; "
                f"this model has {count} blocks, 0 to {count - 1}"
            )
        chosen.update(range(low, high + 1))
    return _blocks(chosen, anatomy)


def _glob(argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    return _matching(lambda name: fnmatch.fnmatchcase(name, argument), selector, argument, anatomy)


def _regex(argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise MaskError(f"mask selector {selector!r} is not a regular expression: {error}") from None
    return _matching(lambda name: pattern.fullmatch(name) is not None, selector, argument, anatomy)


def _matching(matches: Callable[[str], bool], selector: str, argument: str, anatomy: Anatomy) -> set[str]:
    names = {tensor.name for tensor in anatomy.tensors if matches(tensor.name)}
    if not names:
        near = difflib.get_close_matches(argument, list(anatomy.by_name), n=3, cutoff=0.0)
        raise MaskError(
            f"mask selector {selector!r} matches none of the {len(anatomy.tensors)} tensors of this model "
            f"(patterns match whole names). Close names: {', '.join(near)}"
        )
    return names


def _blocks(chosen: set[int] | range, anatomy: Anatomy) -> set[str]:
    return {tensor.name for tensor in anatomy.tensors if tensor.block is not None and tensor.block in chosen}


_PARTS: dict[str, Part] = {"head": "head", "embeddings": "embeddings", "norm": "norm"}
_WITH_ARGUMENT: dict[str, Callable[[str, str, Anatomy], set[str]]] = {
    "last": _end,
    "first": _end,
    "blocks": _listed,
    "glob": _glob,
    "re": _regex,
}


def describe(tensors: Sequence[TensorInfo]) -> str:
    """Up to three tensor names, and how many more there are."""
    shown = ", ".join(tensor.name for tensor in tensors[:3])
    return shown if len(tensors) <= 3 else f"{shown} and {len(tensors) - 3} more"

"""Selectors: short expressions that name tensors of a model. Imports no torch.

====================  ===============================================================================
``last:N``            the N blocks nearest the head
``first:N``           the N blocks nearest the input
``blocks:LIST``       blocks by index, negative ones from the end: ``blocks:10-13,28``, ``blocks:-1``
``every:N``           every N-th block: N-1, 2N-1, 3N-1 …
``fraction:F``        that share of the blocks, nearest the head, at least one
``…/PART``            of the blocks named before the slash only ``attention``, ``mlp`` or ``norms``
``head``              the language-model head
``embeddings``        token and position embeddings
``norm``              the norm between the last block and the head
``all``               every tensor
``glob:PATTERN``      tensors whose whole name matches a shell pattern, case-sensitive
``re:PATTERN``        tensors whose whole name matches a regular expression
``contains:TEXT``     tensors whose name contains the text, if that cannot be mistaken
====================  ===============================================================================

Whole names only, but for ``contains``: ``re:model.layers.2`` does not reach layers 20 to 29.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Sequence
from typing import get_args

from toolkit.models.anatomy import Anatomy, Component, Part
from toolkit.runtime.errors import MaskError

FORMS = (
    "last:N, first:N, blocks:LIST, every:N, fraction:F (each also with /attention, /mlp or /norms), "
    "head, embeddings, norm, all, glob:PATTERN, re:PATTERN, contains:TEXT"
)
"""All forms of a selector, for messages."""


def resolve_selectors(selectors: Sequence[str], anatomy: Anatomy) -> frozenset[str]:
    """Return the union of the tensor names that the selectors match.

    A tied tensor has several names; each is returned only if it matches itself.

    Raises:
        MaskError: a selector is malformed, out of range, or matches nothing.
    """
    return frozenset(name for selector in selectors for name in _resolve_one(selector.strip(), anatomy))


def _resolve_one(selector: str, anatomy: Anatomy) -> set[str]:
    """Return the tensor names of one selector; see ``resolve_selectors``."""
    if selector == "all":
        return set(anatomy.by_name)
    if selector in _PARTS:
        return _tensors_of_part(selector, anatomy)
    kind, colon, argument = selector.partition(":")
    if colon and kind == "contains":
        return _select_containing(argument, selector, anatomy)
    if colon and kind in _NAME_SELECTORS:
        return _select_matching(kind, argument, selector, anatomy)
    if colon and kind in _BLOCK_SELECTORS:
        argument, slash, component = argument.partition("/")
        blocks = _resolve_blocks(kind, argument, selector, anatomy)
        return _tensors_of_blocks(blocks, component if slash else None, selector, anatomy)
    known = ["all", *_PARTS, *(f"{kind}:" for kind in (*_BLOCK_SELECTORS, *_NAME_SELECTORS))]
    near = difflib.get_close_matches(selector if not colon else f"{kind}:", known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    if equivalent := _equivalent_selector(selector, anatomy):
        hint = f" Did you mean {equivalent}?"
    raise MaskError(f"mask selector {selector!r} is not known; expected one of {FORMS}.{hint}")


def _tensors_of_part(selector: str, anatomy: Anatomy) -> set[str]:
    """Resolve ``head``, ``embeddings`` or ``norm``."""
    names = {tensor.name for tensor in anatomy.tensors if tensor.part == selector}
    if not names:
        raise MaskError(
            f"mask selector {selector!r} matches nothing: this model has no such tensors. "
            f"Its parts are {', '.join(sorted({tensor.part for tensor in anatomy.tensors}))}"
        )
    return names


def _resolve_blocks(kind: str, argument: str, selector: str, anatomy: Anatomy) -> Collection[int]:
    """Return the indices of the blocks that ``kind:argument`` selects, one of ``_BLOCK_SELECTORS``."""
    total = anatomy.block_count
    if kind == "blocks":
        return _listed_blocks(argument, selector, anatomy)
    if kind == "fraction":
        if not re.fullmatch(r"[0-9]*\.?[0-9]+", argument) or not 0 < float(argument) <= 1:
            raise MaskError(f"mask selector {selector!r}: expected a share of the blocks above 0 and up to 1")
        return range(total - max(1, round(float(argument) * total)), total)
    if not re.fullmatch(r"[0-9]{1,9}", argument) or not 1 <= int(argument) <= total:
        raise MaskError(
            f"mask selector {selector!r}: expected a whole number from 1 to {total}, the blocks of this model"
        )
    number = int(argument)
    return {
        "last": range(total - number, total),
        "first": range(number),
        "every": range(number - 1, total, number),
    }[kind]


def _listed_blocks(argument: str, selector: str, anatomy: Anatomy) -> set[int]:
    """Return the blocks of ``blocks:LIST``."""
    blocks: set[int] = set()
    for item in argument.split(","):
        match = re.fullmatch(r"\s*(-?[0-9]{1,9})(?:-(-?[0-9]{1,9}))?\s*", item)
        if not match:
            raise MaskError(
                f"mask selector {selector!r}: {item!r} is not a block; expected a form such as blocks:10-13,28"
            )
        low = _block_index(int(match[1]), selector, anatomy)
        high = _block_index(int(match[2]), selector, anatomy) if match[2] else low
        if high < low:
            raise MaskError(f"mask selector {selector!r}: the range {item.strip()} runs backwards; write {high}-{low}")
        blocks.update(range(low, high + 1))
    return blocks


def _block_index(block: int, selector: str, anatomy: Anatomy) -> int:
    """Check the index of a block, and turn a negative one into one from the start."""
    count = anatomy.block_count
    if not -count <= block < count:
        raise MaskError(
            f"mask selector {selector!r}: block {block} is out of range; this model has {count} blocks, "
            f"0 to {count - 1} (or -{count} to -1 from the end)"
        )
    return block % count


def _tensors_of_blocks(blocks: Collection[int], component: str | None, selector: str, anatomy: Anatomy) -> set[str]:
    """Return the tensors of blocks, all or only those of a component (``attention``, ``mlp`` or ``norms``)."""
    if component is not None and component not in _COMPONENTS:
        near = difflib.get_close_matches(component, _COMPONENTS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise MaskError(
            f"mask selector {selector!r}: a block has no part {component!r}; expected {', '.join(_COMPONENTS)}.{hint}"
        )
    names = {
        tensor.name
        for tensor in anatomy.tensors
        if tensor.block is not None and tensor.block in blocks and (component is None or tensor.component == component)
    }
    if not names:
        raise MaskError(
            f"mask selector {selector!r} matches nothing: those blocks have no tensors in their {component}"
        )
    return names


def _select_matching(kind: str, argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    """Resolve ``glob:PATTERN`` or ``re:PATTERN``."""
    try:
        pattern = re.compile(fnmatch.translate(argument) if kind == "glob" else argument)
    except re.error as error:
        raise MaskError(f"mask selector {selector!r} is not a regular expression: {error}") from None
    names = {name for name in anatomy.by_name if pattern.fullmatch(name)}
    if not names:
        near = difflib.get_close_matches(argument, list(anatomy.by_name), n=3, cutoff=0.0)
        raise MaskError(
            f"mask selector {selector!r} matches none of the {len(anatomy.tensors)} tensors of this model "
            f"(patterns match whole names). Close names: {', '.join(near)}"
        )
    return names


def _select_containing(argument: str, selector: str, anatomy: Anatomy) -> set[str]:
    """Resolve ``contains:TEXT``, as many training scripts select by substring.

    Refused are the two traps of that: a text that matches nothing, and one that ends in a number and also matches
    longer numbers, as ``layers.2`` in ``layers.20``.
    """
    names = {name for name in anatomy.by_name if argument and argument in name}
    if not names:
        equivalent = _equivalent_selector(argument, anatomy)
        advice = (
            f"On this model write {equivalent}"
            if equivalent
            else f"Its tensors have names such as {next(iter(anatomy.by_name))}"
        )
        raise MaskError(
            f"mask selector {selector!r} matches none of the {len(anatomy.tensors)} tensors of this model. {advice}"
        )
    longer_number = re.compile(rf"{re.escape(argument)}[0-9]") if argument[-1].isdigit() else None
    if longer_number and (mistaken := sorted(name for name in names if longer_number.search(name))):
        equivalent = _equivalent_selector(argument, anatomy) or f"contains:{argument}."
        raise MaskError(
            f"mask selector {selector!r} also matches {mistaken[0]} and {len(mistaken) - 1} more whose number only "
            f"begins alike. Write {equivalent}"
        )
    return names


def _equivalent_selector(text: str, anatomy: Anatomy) -> str | None:
    """Return the selector for a text such as ``layers.28`` or ``lm_head``, a part of tensor names; None if unknown."""
    if block := re.search(r"(?:layers?|blocks?|h)\.([0-9]+)\b", text):
        return f"blocks:{block[1]}" if int(block[1]) < anatomy.block_count else f"last:1 (there is no block {block[1]})"
    parts = {"head": "head", "embed": "embeddings", "wte": "embeddings", "norm": "norm", "ln_f": "norm"}
    return next((part for word, part in parts.items() if word in text), None)


_PARTS: tuple[Part, ...] = ("head", "embeddings", "norm")
_COMPONENTS: tuple[Component, ...] = get_args(Component)
_BLOCK_SELECTORS = ("last", "first", "blocks", "every", "fraction")
_NAME_SELECTORS = ("glob", "re", "contains")

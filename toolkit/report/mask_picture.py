"""Draw what trained as SVG, in the language and the colours of the page: parts of the model, and the frost line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from toolkit.mask.audit import AuditRow
from toolkit.report.phrases import Phrases

_WIDTH, _BOX, _BLOCK, _MOST_BLOCKS, _GAP, _LINE, _MARGIN = 360, 32, 7, 16, 4, 26, 6
"""Sizes; a box grows with its blocks up to ``_MOST_BLOCKS`` more than one."""


_PICTURE = Markup(
    '<svg class="mask" viewBox="0 0 {w} {h}" role="img" aria-label="{label}"><title>{title}</title>{body}</svg>'
)
_FROST_LINE = Markup(
    '<path class="line" d="M4 {y}H356"/><text class="quiet" x="180" y="{t}" text-anchor="middle">{words}</text>'
)
_PART = Markup(
    '<rect class="{kind}" x="6" y="{y}" width="348" height="{height}" rx="5"/><text x="16" y="{middle}">{part}</text>'
    '<text x="226" y="{middle}" text-anchor="end">{size}</text>'
    '<text x="344" y="{middle}" text-anchor="end">{state}</text>'
)


def draw_parts(parts: Sequence[AuditRow], text: Phrases) -> Markup:
    """Return boxes from the head, on top, down to the input; a box of several blocks is taller."""
    heights = [_height(row) for row in parts]
    has_line = any(row.trained for row in parts)
    total = sum(heights) + _GAP * (len(parts) - 1) + (_LINE if has_line else 0) + 2 * _MARGIN
    label = "; ".join(f"{text.part(row.part)}: {text.state(row)}" for row in reversed(parts))
    body = Markup("").join(_boxes(parts, heights, total, text))
    return _PICTURE.format(w=_WIDTH, h=total, label=label, title=text("mask_title"), body=body)


def _boxes(parts: Sequence[AuditRow], heights: Sequence[int], total: int, text: Phrases) -> Iterator[Markup]:
    """Yield the boxes from the input up, and the frost line below the first that trains."""
    bottom, is_drawn = total - _MARGIN, False
    for row, height in zip(parts, heights, strict=True):
        if row.trained and not is_drawn:
            is_drawn = True
            yield _FROST_LINE.format(y=bottom - _LINE + 5, t=bottom - 5, words=text("frost_line"))
            bottom -= _LINE
        kind = "frozen" if not row.trained else "trained" if row.trained == row.parameters else "partly"
        size = f"{row.parameters / 1e6:,.1f} M" if row.parameters >= 1e5 else f"{row.parameters:,}"
        yield _PART.format(
            kind=kind, y=bottom - height, height=height, middle=bottom - height / 2 + 4.5, part=text.part(row.part),
            size=size, state=text.state(row),
        )  # fmt: skip
        bottom -= height + _GAP


def _height(row: AuditRow) -> int:
    first, _, last = row.part.removeprefix("blocks ").partition("–")
    blocks = int(last) - int(first) + 1 if last else 1
    return _BOX + _BLOCK * min(blocks - 1, _MOST_BLOCKS)

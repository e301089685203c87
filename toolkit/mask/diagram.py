"""Draw the layer mask: the model from input to head, what trains, and the frost line."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from toolkit.mask.audit import AuditRow

_FROZEN, _TRAINED, _PARTLY, _LINE, _INK = "#a8c8e8", "#e8743b", "#f0b48c", "#1f3b57", "#202020"
_WIDTH, _LEFT, _RIGHT = 460, 14, 370
_BOX_HEIGHT, _HEIGHT_PER_BLOCK, _MOST_BLOCKS, _GAP = 34, 9, 16, 4
_FROST_LINE_HEIGHT, _MARGIN = 26, 16
"""Sizes in pixels; a box grows with its blocks up to ``_MOST_BLOCKS`` more than one."""


def draw_mask(rows: Sequence[AuditRow]) -> Image.Image:
    """Draw the rows of ``toolkit.mask.audit.audit`` as boxes, the head on top; a box of several blocks is taller."""
    heights = [_box_height(row) for row in rows]
    total = sum(heights) + _GAP * len(rows) + _FROST_LINE_HEIGHT + 2 * _MARGIN
    image = Image.new("RGB", (_WIDTH, total), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    bottom, is_drawn = total - _MARGIN, False
    for row, height in zip(rows, heights, strict=True):
        if row.trained and not is_drawn:
            bottom -= _FROST_LINE_HEIGHT
            is_drawn = True
            pen.line((_LEFT - 10, bottom + 12, _RIGHT + 8, bottom + 12), fill=_LINE, width=3)
            pen.text((_RIGHT + 14, bottom + 12), "frost line", fill=_LINE, font=font, anchor="lm")
        colour = _FROZEN if not row.trained else _TRAINED if row.trained == row.parameters else _PARTLY
        pen.rounded_rectangle((_LEFT, bottom - height, _RIGHT, bottom), radius=5, fill=colour)
        middle = bottom - height / 2
        pen.text((_LEFT + 12, middle), row.part.replace("–", "-"), fill=_INK, font=font, anchor="lm")
        pen.text((_RIGHT - 100, middle), f"{row.parameters / 1e6:,.1f} M", fill=_INK, font=font, anchor="rm")
        pen.text((_RIGHT - 12, middle), row.state, fill=_INK, font=font, anchor="rm")
        bottom -= height + _GAP
    return image


def _box_height(row: AuditRow) -> int:
    """Return the height in pixels of a row's box, which may stand for several blocks."""
    first, _, last = row.part.removeprefix("blocks ").partition("–")
    blocks = int(last) - int(first) + 1 if last else 1
    return _BOX_HEIGHT + _HEIGHT_PER_BLOCK * min(blocks - 1, _MOST_BLOCKS)

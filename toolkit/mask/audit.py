"""The audit table: what trains, what is frozen, and where the frost line is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from toolkit.mask.adapters import adapted_weight, is_adapter_tensor
from toolkit.mask.layer_mask import LayerMask
from toolkit.models.anatomy import Anatomy, TensorInfo


@dataclass(frozen=True)
class AuditRow:
    """A row of the audit table: one part of the model, or neighbouring blocks in the same state."""

    part: str
    tensors: int
    """Number of tensors."""
    parameters: int
    """Number of scalar parameters."""
    trained: int
    """Number of scalar parameters that train."""
    note: str = ""

    @property
    def state(self) -> str:
        """``trained``, ``frozen``, or the share of parameters that trains."""
        if self.trained == 0:
            return "frozen"
        return "trained" if self.trained == self.parameters else f"{self.trained / self.parameters:.1%} trained"


def audit(mask: LayerMask, anatomy: Anatomy) -> list[AuditRow]:
    """Return the rows of the table from input to head; a tied tensor is counted once, in its first part."""
    names = set(mask.names)
    tied = anatomy.tied_head
    held_in = {f"{module}.weight": layers.precision for layers in mask.quantised for module in layers.modules}
    adapters: dict[str, list[int]] = {}  # sizes of the adapters' tensors beside each weight
    for tensor in mask.trainable:
        if is_adapter_tensor(tensor.name):
            adapters.setdefault(adapted_weight(tensor.name), []).append(tensor.parameters)
    sizes = {tensor.name: tensor.parameters for tensor in mask.trainable}
    rows = []
    for part, tensors in _tensors_by_part(anatomy):
        counted = [t for t in tensors if t.alias_of is None or (mask.tied == "untie" and t == tied)]
        note = _tied_note(mask, tied) if tied is not None and tied in tensors else ""
        beside = [size for t in counted for size in adapters.get(t.name, ())]
        if beside:
            note = f"{sum(beside):,} in adapters"
        for precision in dict.fromkeys(held_in[t.name] for t in counted if t.name in held_in):
            size = sum(t.parameters for t in counted if held_in.get(t.name) == precision)
            note += f"{', ' if note else ''}{size:,} held in {precision}"
        trained = sum(t.parameters for t in counted if t.name in names) + sum(beside)
        own = [rows for rows in mask.rows if any(t.name == rows.table for t in counted) and rows.name in sizes]
        if own:  # they take the place of the table's
            note = "; ".join(filter(None, (f"{sum(rows.count for rows in own):,} rows train", note)))
            trained += sum(sizes[rows.name] for rows in own)
        parameters = sum(t.parameters for t in counted) + sum(beside)
        rows.append(AuditRow(part, len(counted) + len(beside), parameters, trained, note))
    return list(_merge_blocks(rows))


def audit_table(mask: LayerMask, anatomy: Anatomy) -> str:
    """Format the audit as an aligned text table with a line at the frost line."""
    rows = audit(mask, anatomy)
    total = _sum_rows("total", rows)
    lines = [f"{'part':<14}{'tensors':>8}{'parameters':>16}  state"]
    is_line_drawn = False
    for row in rows:
        if row.trained and not is_line_drawn:
            lines.append(f"── frost line: {_describe_frost_line(mask)} ".ljust(56, "─"))
            is_line_drawn = True
        note = f"  ({row.note})" if row.note else ""
        lines.append(f"{row.part:<14}{row.tensors:>8}{row.parameters:>16,}  {row.state}{note}")
    share = f"{total.trained:,} trained ({total.trained / total.parameters:.1%})"
    lines.append(f"{total.part:<14}{total.tensors:>8}{total.parameters:>16,}  {share}")
    return "\n".join(lines)


def audit_markdown(mask: LayerMask, anatomy: Anatomy) -> str:
    """Format the audit as a Markdown table, for TensorBoard and the model card."""
    rows = audit(mask, anatomy)
    lines = ["| part | tensors | parameters | state | note |", "|---|---:|---:|---|---|"]
    lines += [
        f"| {row.part} | {row.tensors} | {row.parameters:,} | {row.state} | {row.note} |"
        for row in (*rows, _sum_rows("total", rows))
    ]
    return "\n".join([*lines, "", f"Frost line: {_describe_frost_line(mask)}"])


def _tied_note(mask: LayerMask, tied: TensorInfo) -> str:
    """Return the note in the head's row on how training treats its tied tensor."""
    notes = {
        "untie": "own copy, untied from the embeddings",
        "both": f"one with {tied.alias_of}: no frozen prefix, no gradient ends early",
        "head_only": f"one with {tied.alias_of}, trained through the head alone; the embeddings move along",
        "no": f"tied to {tied.alias_of}",
    }
    return notes[mask.tied]


def _sum_rows(part: str, rows: list[AuditRow]) -> AuditRow:
    """Return the sum of ``rows``, named ``part``."""
    tensors, parameters = sum(row.tensors for row in rows), sum(row.parameters for row in rows)
    return AuditRow(part, tensors, parameters, sum(row.trained for row in rows))


def _describe_frost_line(mask: LayerMask) -> str:
    """Return the place of the frost line as a phrase."""
    if mask.boundary == mask.block_count:
        return f"above all {mask.block_count} blocks"
    return f"block {mask.boundary} of {mask.block_count}" if mask.boundary else "below everything, no frozen prefix"


def _tensors_by_part(anatomy: Anatomy) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Yield each part of the model with its tensors, from input to head."""
    for part in ("embeddings", "other", "block", "norm", "head"):
        tensors = [t for t in anatomy.tensors if t.part == part]
        if part == "block":
            for index in range(anatomy.block_count):
                yield f"block {index}", [t for t in tensors if t.block == index]
        elif tensors:
            yield part, tensors


def _merge_blocks(rows: list[AuditRow]) -> Iterator[AuditRow]:
    """Merge neighbouring blocks in the same state into one row."""

    def key(row: AuditRow) -> tuple[object, ...]:
        return ("block", row.state, row.note) if row.part.startswith("block ") else (row.part,)

    for _, group in groupby(rows, key):
        first, *others = group
        if others:
            last = others[-1].part.removeprefix("block ")
            note = f"{first.note} each" if first.note else ""
            yield replace(_sum_rows(f"blocks {first.part.removeprefix('block ')}–{last}", [first, *others]), note=note)
        else:
            yield first

"""Plan several masks of one recipe, and show side by side what each costs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from toolkit.config.mask_schema import MaskConfig
from toolkit.config.recipe import build_config, parse_yaml
from toolkit.planning.device_fit import DeviceFit
from toolkit.planning.planner import Plan
from toolkit.planning.table import as_dict, flops_text, gib
from toolkit.runtime.errors import ConfigError

_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "qlora": {"base_precision": "nf4"},
}  # fmt: skip
"""Words that make an entry of adapters of the selector after them."""


def parse_mask(text: str, mask: MaskConfig, flag: str = "--compare") -> MaskConfig:
    """Return ``mask`` with what ``text`` trains: ``last:4 head``, ``lora last:8``, ``rows head added``, or YAML.

    ``flag`` names what the text was given to, for messages.

    Raises:
        ConfigError: the text cannot be read.
    """
    entries: list[Any] = []
    try:
        words = [text] if text.startswith(("{", "[")) else shlex.split(text)
        for word in (remaining := iter(words)):
            if word in _ADAPTERS:
                entries.append({"lora": {"select": next(remaining), **_ADAPTERS[word]}})
            elif word == "rows":
                entries.append({"rows": {"select": next(remaining).split("+"), **_which_rows(next(remaining))}})
            elif word.startswith("["):
                entries += parse_yaml(word)
            else:
                entries.append(parse_yaml(word) if word.startswith("{") else word)
        return build_config({"mask": {**mask.model_dump(), "train": entries}}, text).mask
    except (ValueError, StopIteration, TypeError):
        detail = "expected words such as 'last:4 head', 'lora last:8', 'rows embeddings added', or YAML in braces"
    except ConfigError as error:
        detail = "; ".join(error.faults)
    raise ConfigError([f"{flag} {text!r} is no mask: {detail}"])


def _which_rows(word: str) -> dict[str, Any]:
    """Return the rows that ``added``, ``from:7``, ``from:7,to:9`` or ``ids:7,9`` stand for, as keys of an entry."""
    if word == "added":
        return {"from": "added"}
    if word.startswith("ids:"):
        return {"ids": parse_yaml(f"[{word.removeprefix('ids:')}]")}
    return {key: parse_yaml(value) for key, value in (part.split(":") for part in word.split(","))}


def comparison_rows(
    masks: Sequence[str], plans: Sequence[tuple[Plan, DeviceFit | None]], tflops: float | None
) -> list[dict[str, Any]]:
    """Return what each mask costs, as JSON values.

    Args:
        masks: texts of the masks.
        plans: plan of each, and whether it fits a GPU.
        tflops: sustained rate of all ranks in 10¹² FLOP/s, for the expected seconds; None leaves them out.
    """
    rows = []
    for text, (plan, fit) in zip(masks, plans, strict=True):
        values = as_dict(plan)
        first, later = values["flops"]["first_epoch"], values["flops"]["later_epoch"]
        total = None if first is None else round(first - later + later * plan.passes)  # the first fills the cache
        rows.append(
            {
                "mask": text,
                "trained": plan.mask.parameters,
                "boundary": plan.mask.boundary,
                "blocks": plan.mask.block_count,
                "memory": plan.memory.peak,
                "fits": None if fit is None else fit.fits,
                "disk": values["disk"]["most"] + (values["disk"]["cache"] or 0),
                "flops": total,
                "seconds": None if total is None or tflops is None else total / (tflops * 1e12),
            }
        )
    return rows


def comparison_text(rows: Sequence[dict[str, Any]]) -> str:
    """Format ``comparison_rows``; the lowest value of each column is marked with a star."""
    forms: dict[str, Callable[[Any], str]] = {
        "trained": lambda count: f"{count:,}", "memory": gib, "disk": gib, "flops": flops_text, "seconds": duration,
    }  # fmt: skip
    columns = {key: form for key, form in forms.items() if all(row[key] is not None for row in rows)}
    lowest = {key: min(row[key] for row in rows) for key in columns}
    width = max(len(row["mask"]) for row in rows)
    lines = [f"{'mask':<{width}}{'frost line':>14}" + "".join(f"{name:>17}" for name in columns)]
    for row in rows:
        line = f"{row['boundary']} of {row['blocks']}"
        cells = [f"{form(row[key])}{'*' if row[key] == lowest[key] else ' '}" for key, form in columns.items()]
        fits = {None: "", True: "  fits", False: "  does not fit"}[row["fits"]]
        lines.append(f"{row['mask']:<{width}}{line:>14}" + "".join(f"{cell:>17}" for cell in cells) + fits)
    lines.append("memory: the peak of one rank; disk: checkpoints and cache; flops: the whole run; * lowest")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format a time as seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

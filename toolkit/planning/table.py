"""Format a plan as aligned tables and as JSON values."""

from __future__ import annotations

from typing import Any

import numpy as np

from toolkit.config.policy import global_batch
from toolkit.planning.device_fit import DeviceFit
from toolkit.planning.flops import PASSES
from toolkit.planning.memory import KINDS
from toolkit.planning.planner import Plan
from toolkit.runtime.free_memory import RESERVE


def as_text(plan: Plan, fit: DeviceFit | None = None) -> str:
    """Return a plan as text: audit table, memory, FLOPs, disk, and whether the run fits."""
    parts = [f"{plan.model} ({plan.source})"]
    if plan.phases:
        parts.append(_phases_text(plan))
    if plan.rotation is not None:
        parts.append(f"{plan.rotation.text()}\nwhat follows is about the turn that needs most")
    parts.append(plan.audit_text)
    if not plan.is_cut:
        parts.append("this architecture is not cut: the frozen blocks run inside the suffix")
    parts += [_memory_text(plan), _compute_text(plan), _disk_text(plan)]
    if fit is not None:
        parts.append(_fit_text(fit))
    return "\n\n".join(parts)


def _fit_text(fit: DeviceFit) -> str:
    """Return the text that says whether the run fits a GPU, and what to change if not."""
    reserve = f"with {gib(RESERVE)} set aside for the CUDA context and the allocator"
    sizes = f"{gib(fit.needed)} of {gib(fit.budget)}, {reserve}"
    if fit.fits:
        return f"fits: {sizes}"
    lines = [f"does not fit: {sizes}"]
    for number, (text, after) in enumerate(fit.changes):
        lines.append(f"{'first' if number == 0 else 'then'}: {text} -> {gib(after)}")
    if not fit.helps:
        lines.append("that is still too much: train fewer tensors, use a smaller model, or a GPU with more memory")
    return "\n".join(lines)


def as_dict(plan: Plan, fit: DeviceFit | None = None) -> dict[str, Any]:
    """Return a plan as JSON values; bytes and FLOPs are integers."""
    variant, flops = plan.variant, _flops_columns(plan)
    values: dict[str, Any] = {
        "model": plan.model,
        "source": plan.source,
        "mask": {
            "boundary": plan.mask.boundary,
            "blocks": plan.mask.block_count,
            "cut": plan.is_cut,
            **({"rotation": plan.rotation.as_dict()} if plan.rotation else {}),
            "parts": [_attributes(row, "part", "tensors", "parameters", "trained") for row in plan.audit],
        },
        "engine": {
            "name": variant.spec.name,
            "ranks": variant.spec.ranks,
            "optimizer": variant.spec.optimizer,
            "gradient_checkpointing": variant.checkpointing,
        },
        "micro_batch": {
            "rows": variant.rows,
            **({"tokens_at_most": variant.micro_tokens} if variant.micro_tokens else {}),
            "packed": bool(plan.shape.packed),
            "tokens": variant.tokens,
            "supervised": variant.supervised,
            "accumulation": variant.accumulation,
            "global_batch": _rows_per_step(plan),
            "source": plan.workload.source,
        },
        "prefix": {
            "precision": variant.prefix.precision,
            "placement": variant.prefix.placement,
            "away_from_the_device": plan.prefix_memory.offloaded,
            "cached": variant.cached,
        },
        "memory": _attributes(plan.memory, "peak", "moment", "most", "at_peak", "host", "files"),
        "flops": {
            "per_token": {name: round(value) for name, value in flops["a token"].items()},
            "per_step": round(sum(flops["a step"].values())),
            "first_epoch": round(sum(flops["first epoch"].values())) or None,
            "later_epoch": round(sum(flops["later epochs"].values())) or None,
        },
        "disk": {
            "checkpoint": plan.checkpoint,
            "most": _most_on_disk(plan),
            "cache_token": plan.token_bytes if variant.cached else 0,
            "cache": _cache_bytes(plan) if variant.cached else 0,
        },
    }
    if plan.mask.quantised:
        values["quantised"] = {
            "bytes": plan.quantised,
            "layers": {layers.precision: len(layers.modules) for layers in plan.mask.quantised},
        }
    if plan.phases:
        values["schedule"] = [_attributes(phase, "end", "boundary", "trained", "peak") for phase in plan.phases]
    if fit is not None:
        turns = [{"change": text, "needed": after} for text, after in fit.changes]
        values["fit"] = {"gpu_memory": fit.budget, "needed": fit.needed, "fits": fit.fits, "turns": turns}
    return values


def _attributes(item: object, *names: str) -> dict[str, Any]:
    """Return attributes of ``item`` by name."""
    return {name: getattr(item, name) for name in names}


def _phases_text(plan: Plan) -> str:
    """Return the table of a mask schedule's phases."""
    lines = [f"{'phase':<8}{'until':<14}{'frost line':<14}{'trained':>16}{'peak':>14}"]
    for number, phase in enumerate(plan.phases, start=1):
        line = f"{phase.boundary} of {plan.mask.block_count}"
        mark = "  what follows is about this one" if phase.is_most else ""
        lines.append(f"{number:<8}{phase.end:<14}{line:<14}{phase.trained:>16,}{gib(phase.peak):>14}{mark}")
    return "\n".join(lines)


def _memory_text(plan: Plan) -> str:
    """Return the table of memory by kind, with the settings that it is for."""
    variant, spec, memory = plan.variant, plan.variant.spec, plan.memory

    def line(kind: str, most: str, at_peak: str, host: str) -> str:
        return f"{kind:<16}{most:>14}{at_peak:>14}" + (f"{host:>14}" if memory.host else "")

    if plan.shape.packed:
        rows = f"of {len(plan.shape.packed)} rows packed into one of {plan.shape.tokens:,} tokens"
    else:
        rows = f"{plan.shape.rows} x {plan.shape.tokens:,} tokens"
    if variant.micro_tokens is not None:
        rows += f" (train.micro_batch_tokens: {variant.micro_tokens})"
    engine = f"engine {spec.name}, {spec.ranks} rank(s), {spec.optimizer}"
    lines = [
        f"memory of each rank: {engine}, gradient checkpointing {'on' if variant.checkpointing else 'off'}",
        f"micro batch {rows}, {variant.supervised:,} of a row supervised",
        f"({plan.workload.source})",
        line("kind", "at most", "at the peak", "on the host"),
        *(
            line(kind, gib(memory.most[kind]), gib(memory.at_peak[kind]), gib(memory.host.get(kind, 0)))
            for kind in KINDS
        ),
        line("total", "", gib(memory.peak), gib(sum(memory.host.values()))) + f"  in {memory.moment}",
    ]
    if memory.files:
        lines.append(f"in the files of ZeRO-3's offload to NVMe {gib(memory.files)} of each rank")
    prefix = variant.prefix
    if (prefix.precision, prefix.placement) != ("model", "device"):
        place = {"device": "", "cpu": " on the host", "disk": " on disk"}[prefix.placement]
        offloaded = f", {gib(plan.prefix_memory.offloaded)}{place}" if place else ""
        lines.append(f"prefix kept in {prefix.precision} precision{offloaded}")
    for layers in plan.mask.quantised:
        count = f"{len(layers.modules):,} frozen linear layers of adapted blocks"
        lines.append(f"{count} held in {layers.precision}, {gib(plan.quantised)} of the suffix weights in all")
    if variant.cached:
        then = "its weights stay for the next phases" if plan.phases else "then its weights are freed"
        lines.append(f"prefix cached: a first pass computes its hidden states; {then}")
    assumptions = ["the cache is empty and the disk has room for it"] if variant.cached else []
    assumptions += ["the model keeps packed rows apart"] if plan.shape.packed else []
    if assumptions:
        lines.append(f"taken for granted, the run will try: {'; '.join(assumptions)}")
    return "\n".join(lines)


def _compute_text(plan: Plan) -> str:
    """Return the table of FLOPs; the first epoch includes the pass that fills the cache, if the prefix is cached."""
    columns = _flops_columns(plan)
    lines = [f"{'compute':<16}" + "".join(f"{column:>14}" for column in columns)]
    for name in PASSES:
        lines.append(f"{name:<16}" + "".join(f"{flops_text(flops.get(name)):>14}" for flops in columns.values()))
    totals = (flops_text(sum(flops.values()) if flops else None) for flops in columns.values())
    return "\n".join([*lines, f"{'total':<16}" + "".join(f"{total:>14}" for total in totals)])


def _disk_text(plan: Plan) -> str:
    """Return the lines on disk space for checkpoints and cached hidden states."""
    kept = f"{plan.keep} kept and one being written" if plan.keep > 1 else "one kept and one being written"
    lines = [f"checkpoint on disk {gib(plan.checkpoint)}; {gib(_most_on_disk(plan))} with {kept}"]
    if plan.variant.cached:
        size = _cache_bytes(plan)
        total = f", {gib(size)} for the training rows" if size is not None else ""
        lines.append(f"hidden states on disk {plan.token_bytes / 2**10:.2f} KiB a token{total}")
    return "\n".join(lines)


def _cache_bytes(plan: Plan) -> int | None:
    """Return the bytes of the cached hidden states of all training rows; None if the rows are unknown."""
    known = plan.workload.lengths is not None
    return plan.token_bytes * int(plan.workload.tokens_of_rows.sum()) if known else None


def _most_on_disk(plan: Plan) -> int:
    """Return the bytes of all kept checkpoints and one being written."""
    return (plan.keep + 1) * plan.checkpoint


def _rows_per_step(plan: Plan) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return global_batch(plan.variant.rows, plan.variant.accumulation, plan.variant.spec.ranks)


def _flops_columns(plan: Plan) -> dict[str, dict[str, float]]:
    """Return FLOPs by pass, of a token and a row as they are on average, and of an epoch; empty if that is unknown.

    Where the rows are unknown, all are as long as possible. A cached prefix runs in the first epoch alone.
    """
    known = plan.workload.lengths is not None
    rows = np.asarray(plan.workload.lengths if known else ((plan.variant.tokens, plan.variant.supervised),))
    epoch = plan.flops.of(rows)
    tokens = int(rows[:, 0].sum())
    from_cache = {"prefix forward": 0.0} if plan.variant.cached else {}
    return {
        "a token": {name: value / tokens for name, value in epoch.items()},
        "a step": {name: value / len(rows) * _rows_per_step(plan) for name, value in epoch.items()} | from_cache,
        "first epoch": epoch if known else {},
        "later epochs": epoch | from_cache if known else {},
    }


def gib(size: int) -> str:
    """Format bytes in GiB."""
    return f"{size / 2**30:,.2f} GiB"


def flops_text(count: float | None) -> str:
    """Format a number of FLOPs with its unit; a dash if it is unknown."""
    if count is None:
        return "-"
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}FLOP"
    return f"{count:,.0f} FLOP"

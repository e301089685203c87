"""Format a plan as aligned tables and as JSON values."""

from __future__ import annotations

from typing import Any

from toolkit.config.policy import global_batch
from toolkit.planning.device_fit import RESERVE, DeviceFit
from toolkit.planning.flops import PASSES
from toolkit.planning.memory import KINDS, Memory
from toolkit.planning.planner import Plan, packed_lengths

_GIB = 2**30


def as_text(plan: Plan, fit: DeviceFit | None = None) -> str:
    """Return a plan as text: audit table, memory, FLOPs, disk, and whether the run fits."""
    parts = [
        f"{plan.model} ({plan.source})",
        plan.audit_text,
        _memory_text(plan),
        _compute_text(plan),
        _disk_text(plan),
    ]
    if not plan.is_cut:
        parts.insert(2, "this architecture is not cut: the frozen blocks run inside the suffix")
    if plan.phases:
        parts.insert(1, _phases_text(plan))
    if fit is not None:
        parts.append(fit_text(fit))
    return "\n\n".join(parts)


def fit_text(fit: DeviceFit) -> str:
    """Return the text that says whether the run fits a GPU, and what to change if not."""
    needed, budget = _gib(fit.needed), _gib(fit.budget)
    reserve = f"with {_gib(RESERVE)} set aside for the CUDA context and the allocator"
    if fit.fits:
        return f"fits: {needed} of {budget}, {reserve}"
    lines = [f"does not fit: {needed} of {budget}, {reserve}"]
    for number, (text, after) in enumerate(fit.changes):
        lines.append(f"{'first' if number == 0 else 'then'}: {text} -> {_gib(after)}")
    if not fit.helps:
        lines.append("that is still too much: train fewer tensors, use a smaller model, or a GPU with more memory")
    return "\n".join(lines)


def as_dict(plan: Plan, fit: DeviceFit | None = None) -> dict[str, Any]:
    """Return a plan as JSON values; bytes and FLOPs are integers."""
    variant, rows = plan.variant, _epoch_rows(plan)
    values: dict[str, Any] = {
        "model": plan.model,
        "source": plan.source,
        "mask": {
            "boundary": plan.mask.boundary,
            "blocks": plan.mask.block_count,
            "cut": plan.is_cut,
            "parts": _part_values(plan),
        },
        "engine": {
            "name": variant.spec.name,
            "ranks": variant.spec.ranks,
            "optimizer": variant.spec.optimizer,
            "gradient_checkpointing": variant.checkpointing,
        },
        "micro_batch": {
            "rows": variant.rows,
            "packed": bool(packed_lengths(variant, plan.workload)),
            "tokens": variant.tokens,
            "supervised": variant.supervised,
            "accumulation": variant.accumulation,
            "global_batch": _rows_per_step(plan),
            "source": plan.workload.source,
        },
        "prefix": {
            "precision": variant.frozen.precision,
            "placement": variant.frozen.placement,
            "away_from_the_device": plan.frozen.offloaded,
            "cached": variant.cached,
        },
        "memory": _memory_values(plan.memory),
        "flops": {
            "per_token": {name: round(value) for name, value in _flops_per_token(plan).items()},
            "per_step": round(sum(_flops_per_step(plan).values())),
            "first_epoch": round(sum(plan.flops.of(rows).values())) if rows else None,
            "later_epoch": round(sum(_without_cached_prefix(plan, plan.flops.of(rows)).values())) if rows else None,
        },
        "disk": {
            "checkpoint": plan.checkpoint,
            "most": _most_on_disk(plan),
            "cache_token": plan.token_bytes if variant.cached else 0,
            "cache": _cache_bytes(plan) if variant.cached else 0,
        },
    }
    if plan.phases:
        values["schedule"] = [
            {"end": phase.end, "boundary": phase.boundary, "trained": phase.trained, "peak": phase.peak}
            for phase in plan.phases
        ]
    if fit is not None:
        values["fit"] = _fit_values(fit)
    return values


def _memory_values(memory: Memory) -> dict[str, Any]:
    """Return the JSON values of ``memory``."""
    return {
        "peak": memory.peak,
        "moment": memory.moment,
        "most": memory.most,
        "at_peak": memory.at_peak,
        "host": dict(memory.host),
        "files": memory.files,
    }


def _part_values(plan: Plan) -> list[dict[str, Any]]:
    """Return the JSON values of ``mask.parts``: the audit table."""
    return [
        {"part": row.part, "tensors": row.tensors, "parameters": row.parameters, "trained": row.trained}
        for row in plan.audit
    ]


def _phases_text(plan: Plan) -> str:
    """Return the table of a mask schedule's phases."""
    lines = [f"{'phase':<8}{'until':<14}{'frost line':<14}{'trained':>16}{'peak':>14}"]
    blocks = plan.mask.block_count
    for number, phase in enumerate(plan.phases, start=1):
        mark = "  what follows is about this one" if phase.is_most else ""
        lines.append(
            f"{number:<8}{phase.end:<14}{f'{phase.boundary} of {blocks}':<14}{phase.trained:>16,}"
            f"{_gib(phase.peak):>14}{mark}"
        )
    return "\n".join(lines)


def _fit_values(fit: DeviceFit) -> dict[str, Any]:
    """Return the JSON values of ``fit``."""
    return {
        "gpu_memory": fit.budget,
        "needed": fit.needed,
        "fits": fit.fits,
        "turns": [{"change": text, "needed": after} for text, after in fit.changes],
    }


def _memory_text(plan: Plan) -> str:
    """Return the table of memory by kind, with the settings that it is for."""
    variant, spec, memory = plan.variant, plan.variant.spec, plan.memory
    switch = "on" if variant.checkpointing else "off"
    engine = f"engine {spec.name}, {spec.ranks} rank(s), {spec.optimizer}"
    away = f"{'on the host':>14}" if memory.host else ""
    lines = [
        f"memory of each rank: {engine}, gradient checkpointing {switch}",
        f"micro batch {_micro_batch_text(plan)}, {variant.supervised:,} of a row supervised",
        f"({plan.workload.source})",
        f"{'kind':<16}{'at most':>14}{'at the peak':>14}{away}",
    ]
    for kind in KINDS:
        away = f"{_gib(memory.host.get(kind, 0)):>14}" if memory.host else ""
        lines.append(f"{kind:<16}{_gib(memory.most[kind]):>14}{_gib(memory.at_peak[kind]):>14}{away}")
    away = f"{_gib(sum(memory.host.values())):>14}" if memory.host else ""
    lines.append(f"{'total':<16}{'':>14}{_gib(memory.peak):>14}{away}  in {memory.moment}")
    if memory.files:
        lines.append(f"in the files of ZeRO-3's offload to NVMe {_gib(memory.files)} of each rank")
    frozen = variant.frozen
    if (frozen.precision, frozen.placement) != ("model", "device"):
        place = {
            "device": "",
            "cpu": f", {_gib(plan.frozen.offloaded)} on the host",
            "disk": f", {_gib(plan.frozen.offloaded)} on disk",
        }
        lines.append(f"prefix kept in {frozen.precision} precision{place[frozen.placement]}")
    if variant.cached:
        then = "its weights stay for the next phases" if plan.phases else "then its weights are freed"
        lines.append(f"prefix cached: a first pass computes its hidden states; {then}")
    return "\n".join(lines)


def _micro_batch_text(plan: Plan) -> str:
    """Return the shape of a micro batch as a phrase."""
    if lengths := packed_lengths(plan.variant, plan.workload):
        return f"of {len(lengths)} rows packed into one of {sum(lengths):,} tokens"
    return f"{plan.variant.rows} x {plan.variant.tokens:,} tokens"


def _compute_text(plan: Plan) -> str:
    """Return the table of FLOPs; the first epoch includes the pass that fills the cache, if the prefix is cached."""
    columns = ("a token", "a step", "first epoch", "later epochs")
    lines = [f"{'compute':<16}" + "".join(f"{column:>14}" for column in columns)]
    first = plan.flops.of(_epoch_rows(plan)) if _epoch_rows(plan) else None
    table = [
        _flops_per_token(plan),
        _flops_per_step(plan),
        first,
        _without_cached_prefix(plan, first) if first else None,
    ]
    for name in PASSES:
        lines.append(f"{name:<16}" + "".join(f"{_flops_text(flops[name]) if flops else '-':>14}" for flops in table))
    totals = "".join(f"{_flops_text(sum(flops.values())) if flops else '-':>14}" for flops in table)
    return "\n".join([*lines, f"{'total':<16}{totals}"])


def _disk_text(plan: Plan) -> str:
    """Return the lines on disk space for checkpoints and cached hidden states."""
    kept = f"{plan.keep} kept and one being written" if plan.keep > 1 else "one kept and one being written"
    lines = [f"checkpoint on disk {_gib(plan.checkpoint)}; {_gib(_most_on_disk(plan))} with {kept}"]
    if plan.variant.cached:
        size = _cache_bytes(plan)
        total = f", {_gib(size)} for the training rows" if size is not None else ""
        lines.append(f"hidden states on disk {plan.token_bytes / 2**10:.2f} KiB a token{total}")
    return "\n".join(lines)


def _cache_bytes(plan: Plan) -> int | None:
    """Return the bytes of the cached hidden states of all training rows; None if the rows are unknown."""
    rows = _epoch_rows(plan)
    return plan.token_bytes * sum(tokens for tokens, _ in rows) if rows else None


def _most_on_disk(plan: Plan) -> int:
    """Return the bytes of all kept checkpoints and one being written."""
    return (plan.keep + 1) * plan.checkpoint


def _epoch_rows(plan: Plan) -> list[tuple[int, int]]:
    """Return (tokens, supervised tokens) of each training row; empty if the rows are unknown."""
    return list(plan.workload.lengths or ())


def _flops_per_row(plan: Plan) -> dict[str, float]:
    """Return the mean FLOPs of a row by pass; of the longest possible row if the rows are unknown."""
    rows = _epoch_rows(plan) or [(plan.variant.tokens, plan.variant.supervised)]
    return {name: value / len(rows) for name, value in plan.flops.of(rows).items()}


def _flops_per_token(plan: Plan) -> dict[str, float]:
    """Return the mean FLOPs of a token by pass."""
    rows = _epoch_rows(plan) or [(plan.variant.tokens, plan.variant.supervised)]
    tokens = sum(length for length, _ in rows)
    return {name: value / tokens for name, value in plan.flops.of(rows).items()}


def _rows_per_step(plan: Plan) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return global_batch(plan.variant.rows, plan.variant.accumulation, plan.variant.spec.ranks)


def _without_cached_prefix(plan: Plan, flops: dict[str, float]) -> dict[str, float]:
    """Return ``flops`` with the prefix's set to 0 if its hidden states are cached, as after the first epoch."""
    return flops | {"prefix forward": 0.0} if plan.variant.cached else flops


def _flops_per_step(plan: Plan) -> dict[str, float]:
    """Return the FLOPs of an optimizer step by pass, over all ranks."""
    step = {name: value * _rows_per_step(plan) for name, value in _flops_per_row(plan).items()}
    return _without_cached_prefix(plan, step)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB"


def _flops_text(count: float) -> str:
    """Format a number of FLOPs with its unit."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}FLOP"
    return f"{count:,.0f} FLOP"

"""What a report says of the run itself, as sentences and as pairs of a label and a value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from toolkit.checkpoint.manifest import step_of
from toolkit.checkpoint.validation_score import ValidationScore
from toolkit.data.sources import sources_of
from toolkit.evaluation.table import number
from toolkit.report.curves import LABEL, draw_learning_rate, draw_losses
from toolkit.report.facts import RunFacts
from toolkit.report.phrases import Phrases

Pair = tuple[str, str]
"""A label and a value."""


def about(runs: Sequence[RunFacts], text: Phrases) -> Iterator[Markup]:
    """Yield what the model is, which checkpoint of it, and which would be better by validation."""
    run, choice = runs[0], runs[0].choice
    is_best = choice.best == choice.checkpoint
    kind = "other" if not (is_best or choice.is_latest) else "both" if is_best and choice.is_latest else ""
    kind = "folds" if len(runs) > 1 else kind or ("best" if is_best else "latest")
    steps = ", ".join(dict.fromkeys(str(one.choice.step) for one in runs))
    yield text(
        "about", base=run.base.config.name_or_path, version=run.state.versions.get("frostline", "?"), step=steps,
        choice=text(f"choice_{kind}", score=_score(choice.score, text), count=len(runs)),
    )  # fmt: skip
    if len(runs) == 1 and choice.better is not None and choice.best_score is not None:
        yield text("better_step", step=step_of(choice.better), score=_score(choice.best_score, text))


def _score(score: ValidationScore | None, text: Phrases) -> str:
    """Return the validation loss, and the metric that decides if that is another; empty if there is none."""
    if score is None:
        return ""
    loss = text.plain("score", loss=f"{score.loss:.4f}")
    return loss if score.value is None else f"{loss}, {score.metric} {score.value:.4f}"


def trained(run: RunFacts, text: Phrases) -> Iterator[Markup]:
    """Yield sentences on what trained and where the frost line is."""
    mask = run.mask
    if run.total is None:
        yield text("trained_only", trained=f"{run.trained:,}")
    else:
        yield text(
            "trained_share", trained=f"{run.trained:,}", total=f"{run.total:,}", share=f"{run.trained / run.total:.2%}"
        )
    line = "none" if not mask.boundary else "above" if mask.boundary == mask.block_count else "within"
    yield text(f"line_{line}", boundary=mask.boundary, blocks=mask.block_count)
    for adapter in mask.adapters:
        yield text(
            "adapters", kind="DoRA" if adapter.dora else "LoRA", rank=adapter.rank, alpha=f"{adapter.alpha:g}",
            count=len(adapter.modules),
        )  # fmt: skip
    for rows in mask.rows:
        yield text("table_rows", count=f"{rows.count:,}", table=rows.table)
    for layers in mask.quantised:
        yield text("quantised", count=len(layers.modules), precision=layers.precision)
    if mask.tied != "no" and not (mask.tied == "both" and mask.rows):  # of which some rows trained, as said
        yield text(f"tied_{mask.tied}")
    if run.phases:
        yield text("phases")
    if (rotation := run.config.mask.rotation) is not None:
        yield text("rotation", method=rotation.method, blocks=rotation.blocks, steps=rotation.every_steps)


def phases(run: RunFacts, text: Phrases) -> Iterator[Markup]:
    """Yield a line for each phase of a mask schedule."""
    for phase in run.phases:
        sizes = (math.prod(tensor["shape"]) for tensor in phase["trainable"])
        yield text(
            "phase", first=phase["first_step"], last=phase["last_step"], parameters=f"{sum(sizes):,}",
            boundary=phase["boundary"],
        )  # fmt: skip


def curves(runs: Sequence[RunFacts], text: Phrases) -> dict[str, Markup | str] | None:
    """Return both pictures with the words that belong to them; None if there is nothing to draw."""
    known = [run.curves for run in runs if run.curves.steps]
    if not known:
        return None
    first = known[0]
    validated = [(loss, step) for step, loss in zip(first.validation_steps, first.validation_losses, strict=True)]
    finite = [one for one in validated if math.isfinite(one[0])]
    best = min(finite, default=None) if len(known) == 1 else None
    words = text.plain("curve_no_validation") if not finite else ""
    if best is not None:
        words = text.plain("curve_best", loss=f"{best[0]:.4f}", step=best[1])
    if len(known) > 1:
        words = text.plain("curve_folds")
    label = text.plain(
        "curve_loss_label", first=number(first.losses[0]), last=number(first.losses[-1]), steps=first.steps[-1],
        validation=words,
    )  # fmt: skip
    most = max((rate for rate in first.learning_rates if math.isfinite(rate)), default=math.nan)
    rate_label = text.plain("curve_rate_label", steps=first.steps[-1], most=f"{most:.3g}")
    return {
        "loss": _labelled(draw_losses(known, None if best is None else best[1]), label),
        "rate": _labelled(draw_learning_rate(known), rate_label),
        "note": words,
        "has_validation": "yes" if finite else "",
    }


def _labelled(picture: str, label: str) -> Markup:
    return Markup(picture.replace(LABEL, str(Markup.escape(label))))


def data(runs: Sequence[RunFacts], text: Phrases) -> Iterator[Pair]:
    """Yield what the run recorded of its rows."""
    run, config = runs[0], runs[0].config.data
    yield text.plain("data_source"), ", ".join(source.path for source in sources_of(config, "train"))
    yield text.plain("data_task"), run.task
    for key in ("train", "validation", "test", "skipped", "shortened"):
        counts = [f"{one.rows[key]:,}" if key in one.rows else text.plain("unknown") for one in runs]
        yield text.plain(f"data_{key}"), ", ".join(counts)
    if len(runs) > 1 or config.fold is not None:
        numbers = ", ".join(str(one.config.data.fold) for one in runs)
        yield text.plain("data_fold"), text.plain("of", part=numbers, whole=config.folds)
    yield text.plain("data_length"), f"{config.max_length:,}"
    yield text.plain("data_seed"), str(run.config.train.seed)
    yield text.plain("data_group"), config.group_by or text.plain("none")
    yield text.plain("data_stratify"), config.stratify_by or text.plain("none")


def files(run: RunFacts, text: Phrases) -> list[Pair]:
    """Return the files of the rows with their sizes."""
    return [(str(file["path"]), text.plain("bytes", size=f"{file['bytes']:,}")) for file in run.files]


def cost(runs: Sequence[RunFacts], text: Phrases) -> Iterator[Pair]:
    """Yield what the run took, beside what was planned; of folds, all together."""
    totals = [run.last.totals for run in runs]
    steps, whole = (sum(getattr(run.last, name) for run in runs) for name in ("step", "total_steps"))
    yield text.plain("cost_steps"), text.plain("of", part=f"{steps:,}", whole=f"{whole:,}")
    yield (
        text.plain("cost_epochs"),
        text.plain("of", part=runs[0].last.epoch, whole=runs[0].config.train.epochs),
    )
    tokens, seconds = (sum(one.get(name, 0.0) for one in totals) for name in ("tokens", "seconds"))
    yield text.plain("cost_tokens"), f"{tokens:,.0f}"
    yield text.plain("cost_supervised"), f"{sum(one.get('supervised_tokens', 0.0) for one in totals):,.0f}"
    minutes, rest = divmod(seconds, 60)
    yield (
        text.plain("cost_seconds"),
        text.plain("time", hours=int(minutes // 60), minutes=int(minutes % 60), seconds=f"{rest:.1f}"),
    )
    yield text.plain("cost_speed"), f"{tokens / seconds:,.0f}" if seconds else text.plain("unknown")
    peaks = [run.curves.peak_memory_gib for run in runs if run.curves.peak_memory_gib is not None]
    yield text.plain("cost_memory"), text.plain("gib", size=f"{max(peaks):.2f}") if peaks else text.plain("unknown")
    planned = [run.planned_bytes / 2**30 for run in runs if run.planned_bytes is not None]
    size = text.plain("gib", size=f"{max(planned):.2f}" if planned and max(planned) >= 0.01 else "< 0.01")
    yield text.plain("cost_planned"), size if planned else text.plain("unknown")


def versions(run: RunFacts, text: Phrases) -> Iterator[Pair]:
    """Yield engine, hardware and the versions that wrote the checkpoint."""
    yield text.plain("engine"), run.state.engine
    yield text.plain("ranks"), str(run.state.ranks)
    for name in ("device", "cpu_cores", "system"):
        yield text.plain(name), str(run.hardware.get(name) or text.plain("unknown"))
    yield from run.state.versions.items()


def fingerprints(run: RunFacts, text: Phrases) -> list[Pair]:
    """Return the SHA-256 of what went into the run."""
    return [(text.plain(f"fingerprint_{name}"), sha) for name, sha in run.state.fingerprints.items()]

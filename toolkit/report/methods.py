"""The paragraph of methods of a report, to paste into a paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit.data.sources import sources_of
from toolkit.evaluation.comparison import Comparison
from toolkit.evaluation.verdicts import ModelScores
from toolkit.metrics.resampling import LEAST_UNITS, RESAMPLES
from toolkit.report.facts import RunFacts
from toolkit.report.phrases import Phrases
from toolkit.runtime.paths import is_directory, is_file

_OPTIMIZERS = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW", "paged_adamw_8bit": "paged 8-bit AdamW"}
_LIBRARIES = ("frostline", "Python", "torch", "transformers", "deepspeed", "numpy")
_DIGITS = 12
"""Digits of a SHA-256 in a paragraph; the page has all."""


def methods(runs: Sequence[RunFacts], own: ModelScores | None, comparison: Comparison | None, text: Phrases) -> str:
    """Return model, mask, data, split, optimizer, schedule, evaluation and versions as one paragraph."""
    first = runs[0]
    sentences = [*_model(first, text), *_data(first, text), *_training(first, text)]
    if own is not None and comparison is not None:
        sentences += _evaluation(own, comparison, len(runs) > 1, text)
    known = {name: first.state.versions.get(name, "not installed") for name in _LIBRARIES}
    versions = ", ".join(f"{name} {version}" for name, version in known.items() if version != "not installed")
    return " ".join([*sentences, text.plain("m_versions", versions=versions)])


def _model(run: RunFacts, text: Phrases) -> Iterator[str]:
    base, mask = run.base.config, run.mask
    yield text.plain(
        "m_model", base=base.name_or_path, revision=base.revision or text.plain("m_unpinned"),
        sha=f"{run.base.sha256[:_DIGITS]}…", version=run.state.versions.get("frostline", "?"),
    )  # fmt: skip
    line = "m_line_none" if not mask.boundary else "m_line_head" if mask.tied == "head_only" else "m_line"
    words = {
        "trained": f"{run.trained:,}",
        "mask": _selectors(run),
        "line": text.plain(line, boundary=mask.boundary, blocks=mask.block_count),
    }
    if run.total is None:
        yield text.plain("m_mask_only", **words)
    else:
        yield text.plain("m_mask_share", total=f"{run.total:,}", share=f"{run.trained / run.total:.2%}", **words)
    if (rotation := run.config.mask.rotation) is not None:
        paper = text.plain(f"m_rotation_{rotation.method}")
        yield text.plain("m_rotation", paper=paper, blocks=rotation.blocks, steps=rotation.every_steps)


def _selectors(run: RunFacts) -> str:
    """Return what selected the trained tensors, of each phase that had begun at this checkpoint."""
    mask = run.config.mask
    phases = [phase.train for phase in mask.schedule][: len(run.phases) or None]
    if len(phases) < len(run.phases) or not phases:
        phases.append(mask.train)
    return "; ".join(", ".join(map(str, selectors)) for selectors in phases)


def _data(run: RunFacts, text: Phrases) -> Iterator[str]:
    data, seed = run.config.data, run.config.train.seed
    yield text.plain(
        "m_data", rows=f"{run.rows['train']:,}",
        source=", ".join(_shown(source.path) for source in sources_of(data, "train")),
        task=run.task, length=data.max_length,
    )  # fmt: skip
    if data.folds is not None:
        yield text.plain("m_folds", count=data.folds, seed=seed)
    if isinstance(data.validation, float):
        yield text.plain("m_validation_share", share=f"{data.validation:.1%}", seed=seed)
    elif data.validation is not None:
        yield text.plain("m_validation_set")
    if isinstance(data.test, float):
        yield text.plain("m_test_share", share=f"{data.test:.1%}")
    elif data.test is not None:
        yield text.plain("m_test_set")
    if data.group_by is not None:
        yield text.plain("m_group", group=data.group_by)


def _shown(path: str) -> str:
    """Return a source as a paper names it: a local file without its folder, a Hub data set as it is."""
    return Path(path).name if is_file(path) or is_directory(path) or Path(path).is_absolute() else path


def _training(run: RunFacts, text: Phrases) -> Iterator[str]:
    train, optim = run.config.train, run.config.optim
    norm = train.max_grad_norm
    yield text.plain(
        "m_optimizer", optimizer=_OPTIMIZERS.get(optim.name, optim.name), beta1=f"{optim.betas[0]:g}",
        beta2=f"{optim.betas[1]:g}", eps=f"{optim.eps:g}", decay=f"{train.weight_decay:g}",
        rate=f"{train.learning_rate:g}", warmup=f"{train.warmup_ratio:.0%}",
        schedule=text.plain(f"schedule_{train.scheduler}"),
        clip=text.plain("m_clip", norm=f"{norm:g}") if norm else text.plain("m_no_clip"),
    )  # fmt: skip
    yield text.plain(
        "m_epochs", batch=run.state.global_batch, steps=f"{run.last.step:,}", epochs=train.epochs,
        dtype=run.config.model.dtype, seed=train.seed,
    )  # fmt: skip


def _evaluation(own: ModelScores, comparison: Comparison, has_folds: bool, text: Phrases) -> Iterator[str]:
    against = comparison.against
    yield text.plain(
        "m_evaluation_folds" if has_folds or own.step is None else "m_evaluation", step=own.step,
        rows=f"{comparison.rows:,}", held_out=text.plain("m_held_out") if comparison.held_out else "",
        against=text.plain("m_nothing") if against in (None, own.name) else text.named(against or ""),
        metric=comparison.primary,
    )  # fmt: skip
    yield text.plain("m_bootstrap", resamples=f"{RESAMPLES:,}", least=LEAST_UNITS)

"""Validation loss: the mean cross entropy over the supervised tokens of held-out rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from toolkit.activation_cache.cached_prefix import HiddenStates, read_ahead
from toolkit.activation_cache.packing import choose_packing
from toolkit.activation_cache.read_ahead import HiddenReader
from toolkit.checkpoint.choice import Step
from toolkit.checkpoint.state import read_state
from toolkit.data.batches import BatchPlan, collate, step_batches
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Example
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.data.rows import Rows
from toolkit.data.sources import Source, sources_of, task_of
from toolkit.inference.open_model import OpenedModel, open_model
from toolkit.models.float32_gradients import use_faster_forward
from toolkit.models.load import Dtype
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.paths import is_directory, is_file
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.suffix import Suffix
from toolkit.split.supervised_loss import SuffixLoss, supervised_loss

log = logging.getLogger("frostline")

Part = Literal["validation", "test"]
"""Which rows that a run held out: those to choose by, or those to report on."""


_OF_THE_RUNS_ROWS = (
    "split", "name", "revision", "validation", "validation_split", "test", "test_split", "group_by", "stratify_by",
    "folds", "fold", "limit", "oversample",
)  # fmt: skip
"""Keys of a recipe that say something about its own rows alone."""


@dataclass(frozen=True)
class Evaluation:
    """Validation loss over a set of rows."""

    loss: float
    """Mean cross entropy over all supervised tokens."""
    supervised_tokens: int
    """Number of those tokens."""

    @property
    def perplexity(self) -> float:
        """Perplexity, ``exp(loss)``."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class SourceEvaluation(Evaluation):
    """Validation loss of a run, delta or model, and the rows that it was computed on."""

    step: int | None
    """Step of the checkpoint; None if the source is not a run."""
    rows: int
    """Number of rows."""
    data: str
    """Origin of the rows, as a phrase."""
    held_out: bool | None
    """True if the run held these rows out; False if it trained on rows of their file, None if that is not known."""


@torch.no_grad()
def evaluate_rows(
    forward: SuffixLoss,
    prefix: HiddenStates | None,
    examples: Sequence[Example],
    micro_batch_size: int,
    pad_id: int,
    world: World,
    packed: bool = False,
    may_stop: bool = False,
    micro_batch_tokens: int | None = None,
) -> Evaluation:
    """Compute the validation loss; a collective that divides ``examples`` and returns the same value on every rank.

    The caller must turn dropout off. Without ``prefix``, ``forward`` runs the whole model. With ``packed`` the rows of
    a micro batch are laid end to end, and the model must keep them apart.

    Raises:
        StopRequested: a signal came and ``may_stop`` is set; raised on every rank.
    """
    tokens = int(Rows.of(examples).supervised.sum())
    plan = BatchPlan(len(examples), micro_batch_size, 1, world.rank, world.size, micro_batch_tokens)
    local_loss = torch.zeros((), device=world.device)  # this rank's part of the global mean
    steps = step_batches(examples, range(len(examples)), plan, pad_id, packed=packed)
    with (
        HiddenReader(world.device) as reader, Prefetcher() as ahead,
        ProgressBar("evaluating", len(examples), "row", brief=True) as bar,
    ):  # fmt: skip
        for micro_batches in ahead(on_device(read_ahead(lambda: prefix, steps, reader), world.device)):
            for batch in micro_batches:
                if may_stop:
                    world.raise_if_stopping()
                with explain_out_of_memory("the evaluation", batch.shape_text):
                    hidden = prefix(batch) if prefix else None
                    local_loss += supervised_loss(forward, hidden, batch, tokens)
            bar.advance(plan.global_batch)
    (loss,) = world.sum(float(local_loss))
    return Evaluation(loss, tokens)


@torch.no_grad()
def row_losses(
    forward: SuffixLoss, prefix: HiddenStates | None, examples: Sequence[Example], pad_id: int, world: World
) -> list[float]:
    """Compute the loss of each row by itself, the mean over its supervised tokens; a collective, equal on every rank.

    The caller must turn dropout off. Without ``prefix``, ``forward`` runs the whole model.

    Raises:
        StopRequested: a signal came; raised on every rank.
    """
    own: dict[int, float] = {}
    with ProgressBar("held-out rows", len(examples), "row", brief=True) as bar:
        for start in range(0, len(examples), world.size):
            world.raise_if_stopping()
            row = start + world.rank
            is_filler = row >= len(examples)  # this rank joins in the collectives of the last rows
            batch = collate([examples[start if is_filler else row]], pad_id, is_filler).to(world.device)
            with explain_out_of_memory("the evaluation", batch.shape_text):
                hidden = prefix(batch) if prefix else None
                loss = supervised_loss(forward, hidden, batch, max(batch.supervised_tokens, 1))
            if not is_filler:
                own[row] = float(loss)
            bar.advance(world.size)
    losses: dict[int, float] = {}
    for of_rank in world.all_gather_object(own):
        losses |= of_rank
    return [losses[row] for row in range(len(examples))]


def evaluate_source(
    source: str,
    named: str | Source | None,
    split: str | None,
    batch_size: int,
    step: Step | None,
    base: str | Path | None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
    part: Part = "validation",
) -> SourceEvaluation:
    """Compute the loss of the model behind ``source`` in this one process; see ``toolkit.evaluate``.

    ``named`` are the rows to compute it on, or their path, of which ``split`` is taken; None takes those that the run
    held out.
    """
    if isinstance(named, str):
        named = Source(named, split)
    if named is not None:
        named.check_there()  # before the model loads
    opened = open_model(source, step, base, trust_remote_code, dtype)
    config = opened.config.data
    if named is not None:
        own = {"path": named.path, "task": task_of(config, named.path)}
        config = config.model_copy(update={**dict.fromkeys(_OF_THE_RUNS_ROWS), **own})
    else:
        _require_part(source, opened, part)
    loaded, tokenizer = opened.loaded, opened.loaded.tokenizer
    sources = None if named is None else [named]
    dataset = load_dataset(config, tokenizer, opened.config.train.seed, loaded.ends, opened.rendering, sources)
    if named is None:
        _require_unchanged_rows(dataset, opened, part)
    held_out_rows = dataset.test if part == "test" else dataset.validation
    examples = dataset.train if named is not None else held_out_rows
    data, held_out = _describe_rows(len(examples), named, opened, part)
    log.info("evaluating on %s", data)
    check_fit(examples, loaded.model, "name rows that fit, or shorten these")
    world = World()
    model = loaded.model.to(world.device).eval()
    use_faster_forward(model, world.device)
    suffix = Suffix(model, loaded.anatomy, boundary=None)
    pad_id = padding_id(tokenizer, model)
    suffix.choose_shortcuts(None, collate([examples.shortest()], pad_id).to(world.device))
    packing = choose_packing(config.packing, batch_size, None, suffix, examples, world.device)
    log.info("packing: %s", packing.reason)
    evaluation = evaluate_rows(suffix, None, examples, batch_size, pad_id, world, packing.on)
    checkpoint_step = opened.choice.step if opened.choice else None
    return SourceEvaluation(
        evaluation.loss, evaluation.supervised_tokens, checkpoint_step, len(examples), data, held_out
    )


def _require_part(source: str, opened: OpenedModel, part: Part) -> None:
    """Raise DataError if ``source`` is no run, or held out no rows of that part."""
    config = opened.config.data
    held_out = config.validation if part == "validation" else config.folds or config.test
    if opened.run is None or held_out is None:
        other = {"validation": config.folds or config.test, "test": config.validation}[part]
        hint = f"evaluate the others with --part {'test' if part == 'validation' else 'validation'}, or " if (
            other is not None and opened.run is not None
        ) else ""  # fmt: skip
        rows = "rows" if part == "validation" else "test rows (data.test, data.folds)"
        raise DataError(f"{source} held no {rows} out; {hint}name some with --data.path FILE")


def _describe_rows(rows: int, named: Source | None, opened: OpenedModel, part: Part) -> tuple[str, bool | None]:
    """Return ``SourceEvaluation.data`` and ``held_out`` for this number of rows; see ``evaluate_source``."""
    config, run = opened.config.data, opened.run
    if named is None:
        trained = _names(sources_of(config, "train"))
        if part == "test" and config.folds is not None:
            return f"{rows} rows of {trained} that {run} held out (fold {config.fold} of {config.folds})", True
        share = config.validation if part == "validation" else config.test
        if isinstance(share, float):
            return f"{rows} rows that {run} held out of {trained} (data.{part} {share})", True
        return f"{rows} rows of {_names(sources_of(config, part))}, which {run} held out (data.{part})", True
    path, split = named.path, named.split
    text = f"all {rows} rows of {path}" + (f", split {split}" if split else "")
    if run is None:
        return text, None
    if any(_is_same(path, source) and split in (None, source.split) for source in sources_of(config, "train")):
        return f"{text}: {run} trained on rows of it", False
    held_out_parts: tuple[Part, ...] = ("validation", "test")
    for name in held_out_parts:
        if any(_is_same(path, source) for source in sources_of(config, name)):
            return f"{text}, which {run} held out (data.{name})", True
    return f"{text}; whether {run} trained on some of them is not known", None


def _names(sources: Sequence[Source]) -> str:
    """Return the paths of sources, for messages."""
    return ", ".join(source.path for source in sources)


def _is_same(path: str, source: Source) -> bool:
    """Return whether a path is that of a source, so that two spellings of a local one compare equal."""
    is_local = is_file(path) or is_directory(path)
    return Path(path).resolve() == Path(source.path).resolve() if is_local else path == source.path


def _require_unchanged_rows(dataset: Dataset, opened: OpenedModel, part: Part) -> None:
    """Raise DataError if the run's rows changed since: splitting them anew could hold out rows that it trained on."""
    assert opened.choice is not None
    then = read_state(opened.choice.checkpoint).fingerprints
    is_other_test = part == "test" and then.get("test", dataset.test_fingerprint) != dataset.test_fingerprint
    if is_other_test or then["data"] != dataset.fingerprint:
        raise DataError(
            f"the rows of {opened.run} have changed since it was trained; name rows to evaluate on with --data.path"
        )

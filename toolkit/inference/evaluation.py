"""Validation loss: the mean cross entropy over the supervised tokens of held-out rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.activation_cache.packing import choose_packing
from toolkit.checkpoint.choice import Step
from toolkit.checkpoint.state import read_state
from toolkit.data.batches import BatchPlan, collate, step_batches
from toolkit.data.dataset import Dataset, load_dataset
from toolkit.data.examples import Example
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.data.prefetch import Prefetcher, on_device
from toolkit.data.sources import read_rows
from toolkit.inference.open_model import OpenedModel, open_model
from toolkit.models.load import Dtype
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError
from toolkit.runtime.out_of_memory import explain_out_of_memory
from toolkit.runtime.paths import is_file
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.split.suffix import Suffix
from toolkit.split.supervised_loss import SuffixLoss, supervised_loss

log = logging.getLogger("frostline")


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
) -> Evaluation:
    """Compute the validation loss; a collective that divides ``examples`` and returns the same value on every rank.

    The caller must turn dropout off. Without ``prefix``, ``forward`` runs the whole model. With ``packed`` the rows of
    a micro batch are laid end to end, and the model must keep them apart.

    Raises:
        StopRequested: a signal came and ``may_stop`` is set; raised on every rank.
    """
    tokens = sum(example.supervised_tokens for example in examples)
    plan = BatchPlan(len(examples), micro_batch_size, rank=world.rank, ranks=world.size)
    local_loss = torch.zeros((), device=world.device)  # this rank's part of the global mean
    steps = step_batches(examples, range(len(examples)), plan, pad_id, packed=packed)
    with Prefetcher() as ahead, ProgressBar("evaluating", len(examples), "row", brief=True) as bar:
        for batch in chain.from_iterable(ahead(on_device(steps, world.device))):
            if may_stop:
                world.raise_if_stopping()
            with explain_out_of_memory("the evaluation", batch.shape_text):
                hidden = prefix(batch) if prefix else None
                local_loss += supervised_loss(forward, hidden, batch, tokens)
            bar.advance(plan.global_batch)
    (loss,) = world.sum(float(local_loss))
    return Evaluation(loss, tokens)


def evaluate_source(
    source: str,
    path: str | None,
    split: str | None,
    batch_size: int,
    step: Step | None,
    base: str | Path | None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
) -> SourceEvaluation:
    """Compute the loss of the model behind ``source`` in this one process; see ``toolkit.evaluate``."""
    rows = None if path is None else read_rows(path, split)  # before the model loads, so that a bad file fails at once
    opened = open_model(source, step, base, trust_remote_code, dtype)
    config = opened.config.data
    if path is not None:
        config = config.model_copy(update={"path": path, "split": split, "validation": None, "validation_split": None})
    elif opened.run is None or config.validation is None:
        raise DataError(f"{source} held no rows out; name some with --data.path FILE")
    loaded, tokenizer = opened.loaded, opened.loaded.tokenizer
    dataset = load_dataset(config, tokenizer, opened.config.train.seed, rows, loaded.ends, opened.rendering)
    if path is None:
        _require_unchanged_rows(dataset, opened)
    examples = dataset.train if path is not None else dataset.validation
    data, held_out = _describe_rows(len(examples), path, split, opened)
    log.info("evaluating on %s", data)
    check_fit(examples, loaded.model, "name rows that fit, or shorten these")
    world = World()
    model = loaded.model.to(world.device).eval()
    suffix = Suffix(model, loaded.anatomy, boundary=None)
    pad_id = padding_id(tokenizer, model)
    suffix.choose_shortcuts(None, collate([min(examples, key=len)], pad_id).to(world.device))
    packing = choose_packing(config.packing, batch_size, None, suffix, examples, world.device)
    log.info("packing: %s", packing.reason)
    evaluation = evaluate_rows(suffix, None, examples, batch_size, pad_id, world, packing.on)
    checkpoint_step = opened.choice.step if opened.choice else None
    return SourceEvaluation(
        evaluation.loss, evaluation.supervised_tokens, checkpoint_step, len(examples), data, held_out
    )


def _describe_rows(rows: int, path: str | None, split: str | None, opened: OpenedModel) -> tuple[str, bool | None]:
    """Return ``SourceEvaluation.data`` and ``held_out`` for this number of rows; see ``evaluate_source``."""
    config, run = opened.config.data, opened.run
    if path is None:
        if isinstance(config.validation, float):
            return f"{rows} rows that {run} held out of {config.path} (data.validation {config.validation})", True
        return f"{rows} rows of {config.validation}, which {run} held out (data.validation)", True
    text = f"all {rows} rows of {path}" + (f", split {split}" if split else "")
    if run is None:
        return text, None
    if _resolve_if_file(path) == _resolve_if_file(config.path) and split in (None, config.split):
        return f"{text}: {run} trained on rows of it", False
    if isinstance(config.validation, str) and _resolve_if_file(path) == _resolve_if_file(config.validation):
        return f"{text}, which {run} held out (data.validation)", True
    return f"{text}; whether {run} trained on some of them is not known", None


def _resolve_if_file(path: str) -> str:
    """Return the absolute path of a file, so that two spellings compare equal; a Hub id as it is."""
    return str(Path(path).resolve()) if is_file(path) else path


def _require_unchanged_rows(dataset: Dataset, opened: OpenedModel) -> None:
    """Raise DataError if the run's rows changed since: splitting them anew could hold out rows that it trained on."""
    assert opened.choice is not None
    if read_state(opened.choice.checkpoint).fingerprints["data"] != dataset.fingerprint:
        raise DataError(
            f"the rows of {opened.run} have changed since it was trained; name rows to evaluate on with --data.path"
        )

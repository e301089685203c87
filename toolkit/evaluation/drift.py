"""Drift: how far models moved from their base where no task asked them to, on everyday prompts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolkit.checkpoint.run_directory import fold_runs
from toolkit.data.examples import Encoder, Example
from toolkit.data.model_limits import check_fit
from toolkit.data.rows import Rows
from toolkit.evaluation.base_answers import MAX_LENGTH, base_answers, everyday_prompts
from toolkit.evaluation.comparison import Comparison
from toolkit.evaluation.cut_model import cut_for_evaluation
from toolkit.evaluation.likelihood import answer_losses
from toolkit.evaluation.outputs import Asked
from toolkit.evaluation.running import Runner
from toolkit.evaluation.sources import BASE, BaseModel, ModelName, OpenOptions
from toolkit.evaluation.verdicts import Entry, Resampling, judge
from toolkit.inference.open_model import OpenedModel
from toolkit.metrics.metric import Metric
from toolkit.metrics.perplexity import loss_metrics
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.sample import RowFaultError, ask

log = logging.getLogger("frostline")

MAX_NEW_TOKENS = 64
"""Longest answer in tokens by default."""
_ACROSS_TOKENIZERS = "bits_per_byte"
"""The metric that compares models of different tokenizers."""


def measure_drift(sources: Sequence[str], asked: Asked, options: OpenOptions, seed: int = 42) -> Comparison:
    """Score a base's own greedy answers to everyday prompts by likelihood, under the base and under every source.

    The base is that of the first source. Its own loss is what its answers cost itself; the difference to it is how far
    a model has moved, in nats a token, over the tokens of the answers without what ends one: some are cut. A difference
    has an interval and no verdict, because to move is neither better nor worse.

    Args:
        sources: as in ``compare_models``, which checked them.
        asked: the batch size, and the longest answer.
        options: how models are opened.
        seed: of resampling.

    Raises:
        UsageError: as ``require_base``.
        DataError: the base answers nothing, or a prompt does not fit a model.
    """
    require_base(sources, "--drift")
    names = [name for name in map(ModelName.parse, sources) if not name.is_base]
    base = BaseModel.read(names[0], options)
    assert base is not None  # of what ``require_base`` lets pass
    opened = base.open(options)
    prompts = everyday_prompts()
    answers = base_answers(opened, prompts, asked)
    pairs = [pair for pair in zip(prompts, answers, strict=True) if pair[1]]
    if not pairs:
        raise DataError("the base answers no everyday prompt with a text; drift cannot be measured from it")
    if len(pairs) < len(prompts):
        log.warning("the base has no text for %d everyday prompts; they are left out", len(prompts) - len(pairs))
    of_base = _score(opened, pairs, asked.batch_size)
    entries = [Entry(BASE, of_base.by_name())]
    del opened
    runner = Runner(names, asked, options, 1)
    for name in names:
        gc.collect()  # the model before is not to be in memory beside this one
        opened = runner.open(name)
        found = _score(opened, pairs, asked.batch_size)
        entries.append(Entry(name.text, found.by_name(of_base), opened.choice.step if opened.choice else None))
        del opened
    return _comparison(entries, len(pairs), asked.max_new_tokens, seed)


def require_base(sources: Sequence[str], flag: str) -> None:
    """Raise UsageError if what ``flag`` asks for cannot be had: the base of the first source is not known."""
    names = [name for name in map(ModelName.parse, sources) if not name.is_base]
    if not names:
        raise UsageError(f"{flag} compares sources with their {BASE}; name one beside it, such as a run")
    if any(fold_runs(Path(name.path)) for name in names):
        raise UsageError(f"{flag} takes single models, and folds are several; name one of their runs")
    if not names[0].knows_base:
        raise UsageError(
            f"{flag} compares with the {BASE} that the first source began from, and that of {names[0].text} is not "
            "known; name a run, a checkpoint or a delta first"
        )


@dataclass(frozen=True)
class _Losses:
    """Holds what answers cost a model: [answers] nats, tokens and bytes of each."""

    losses: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray

    def by_name(self, base: _Losses | None = None) -> dict[str, Metric]:
        """Return the metrics, none of them judged; of a model with other tokens than the base those that compare."""
        metrics = loss_metrics(self.losses, self.tokens, self.text_bytes)
        found = {metric.name: replace(metric, higher_is_better=None) for metric in metrics}
        if base is None or np.array_equal(self.tokens, base.tokens):
            return found
        log.info("the tokenizer has other tokens than the base's: only bits per byte compare them")
        return {_ACROSS_TOKENIZERS: found[_ACROSS_TOKENIZERS]}


def _score(opened: OpenedModel, pairs: Sequence[tuple[str, str]], batch_size: int) -> _Losses:
    """Compute what answers to prompts cost a model, by its own chat template."""
    loaded = opened.loaded
    encoder = Encoder(loaded.tokenizer, MAX_LENGTH, loaded.ends, opened.rendering)
    examples = Rows.of([_example(encoder, prompt, answer) for prompt, answer in pairs])
    check_fit(examples, loaded.model, "it is too small for the everyday prompts; leave out --drift")
    model = cut_for_evaluation(opened, None, examples, encoder, 1, World())
    try:
        losses = answer_losses(model, examples, batch_size)
    finally:
        model.close()
    return _Losses(losses, examples.supervised, np.array([len(answer.encode()) for _, answer in pairs]))


def _example(encoder: Encoder, prompt: str, answer: str) -> Example:
    """Encode a prompt and its answer, of which all tokens count but those that would end it."""
    try:
        start, (ids,) = encoder.encode_answers(ask(prompt), [answer])
    except RowFaultError as fault:
        raise DataError(f"the everyday prompt {prompt[:60]!r} {fault}") from None
    return Example.with_answer(start + ids, len(start))


def _comparison(entries: Sequence[Entry], prompts: int, max_new_tokens: int, seed: int) -> Comparison:
    loss = entries[0].metrics["loss"]
    data = f"the base's own greedy answers, of at most {max_new_tokens} tokens, to {prompts} everyday prompts"
    models = judge(entries, BASE, loss.name, Resampling([None] * prompts, seed))
    return Comparison(
        loss.value, entries[0].metrics["perplexity"].value, int(loss.statistics[:, 1].sum()), None, prompts, data,
        None, prompts, 0, "everyday prompts", loss.name, BASE, models,
    )  # fmt: skip

"""Probe every frost line in one pass over some rows: what a readout of the hidden states above it reaches.

Training the blocks from b on can put any function of ``hidden[b]`` into the last hidden state. The probe fits the
simplest of them: the last hidden state, as the model computes it, plus a linear map of the hidden states at the lines b
to n, under the model's own norm and head. That is the direct path by which adapters in these blocks reach the logits,
past the blocks above them.

The fit is one step of natural gradient (Amari 1998) in the space of the last hidden state. The loss's gradient there,
which needs the backward pass of norm and head alone, is regressed on the hidden states by kernel ridge regression, and
multiplied by the inverse of the empirical Fisher matrix. It is fitted to the rows of all folds but one, and scored by
cross entropy on the rows of that one, for each fold in turn. Of a few ridges and dampings of the Fisher matrix, and of
the lengths of the step, each fold takes what the other folds' rows are best served with.

Linear probes of frozen layers are arXiv 1610.01644; an affine map of a hidden state under the frozen norm and head is
the tuned lens (2303.08112); a linear readout of all layers as a stand-in for fine-tuning them is Head2Toe (2201.03529).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.data.model_limits import check_fit, padding_id
from toolkit.models.load import LoadedModel
from toolkit.planning.readout_fit import (
    DAMPINGS,
    FOLDS,
    best_step,
    fisher_factors,
    mean_with_error,
    readout_kernels,
    step_sizes,
)
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, ModelError
from toolkit.split.exactness import split_is_exact
from toolkit.split.module_tree import hidden_of
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split
from toolkit.split.supervised_rows import SupervisedRows

POSITIONS = 24
"""Most supervised positions of a row that are looked at, spread evenly over it."""
LEAST_ROWS = 2 * FOLDS
"""Fewest rows of a sample, two for each fold."""
MOST_POSITIONS = 24_000
"""Most positions of a sample: the fit has several matrices of positions x positions, of 2.3 GB each for so many."""


@dataclass(frozen=True)
class LineGain:
    """Expected gain of training from a frost line up."""

    boundary: int
    gain: float
    """By how much the readout lowers the loss on rows that it was not fitted to, nats a token; below 0 it raises it."""
    error: float
    """Standard error of it over rows."""


@dataclass(frozen=True)
class LineProbe:
    """Expected gains of all frost lines, and what they were found on."""

    base_loss: float
    """Loss of the model as it is, nats a token."""
    rows: int
    positions: int
    gains: tuple[LineGain, ...]
    """In the order of the lines, from 0 to the number of blocks - 1."""


@dataclass(frozen=True)
class ProbedStates:
    """Hidden states of N supervised positions of some rows at every frost line."""

    hidden: torch.Tensor
    """[blocks + 1, N, hidden_size] in the model's precision: what enters each block, and what leaves the last."""
    batch: Batch
    """A row of R for each example: the N positions alone, all supervised, for a suffix without blocks."""
    row: torch.Tensor
    """[N] the row of each position."""


def probe_lines(loaded: LoadedModel, examples: Sequence[Example]) -> LineProbe:
    """Return the expected gain of every frost line, from one pass over ``examples``.

    The same rows give the same numbers. The model's weights are not changed.

    Raises:
        DataError: there are fewer than two rows for each fold, or too many positions, or a row is too long for the
            model.
        ModelError: the architecture cannot be cut above its last block, or the model's loss is not finite.
    """
    require_sample(examples, loaded.model)
    model, device = loaded.model.to(World().device).eval(), World().device
    prefix, top = split(model.requires_grad_(False), loaded.anatomy, loaded.anatomy.block_count)
    assert prefix is not None
    pad_id = padding_id(loaded.tokenizer, model)
    exact = split_is_exact(model, prefix, top, collate([min(examples, key=len)], pad_id).to(device))
    states = collect_states(prefix.eval(), top.eval(), examples, pad_id, device) if exact else None
    if states is None:
        _require_finite(all(bool(tensor.isfinite().all()) for tensor in model.parameters()))
        raise ModelError(
            f"the blocks of {type(model).__name__} do not hand one hidden state a token from one to the next, up to "
            "norm and head; there is nothing to probe, compare runs instead"
        )
    top.choose_shortcuts(_laid_out(states, states.hidden[-1]), states.batch)
    return readout_gains(states, top)


def require_sample(examples: Sequence[Example], model: nn.Module) -> None:
    """Raise DataError if a sample is too small or too large to be probed, or has a row too long for the model."""
    if len(examples) < LEAST_ROWS:
        raise DataError(
            f"--suggest probe found {len(examples)} distinct training rows; expected at least {LEAST_ROWS}, to fit a "
            "readout to some and score it on others"
        )
    if (positions := sum(min(POSITIONS, example.supervised_tokens) for example in examples)) > MOST_POSITIONS:
        raise DataError(
            f"--suggest probe found {positions:,} positions in {len(examples):,} rows; expected at most "
            f"{MOST_POSITIONS:,}: name fewer with --rows"
        )
    check_fit(examples, model)


@torch.no_grad()
def collect_states(
    prefix: Prefix, top: Suffix, examples: Sequence[Example], pad_id: int, device: torch.device
) -> ProbedStates | None:
    """Run each row once through all blocks, and keep what enters each, at up to ``POSITIONS`` supervised positions.

    Returns None if what enters some block is not [1, T, hidden_size], or a block runs twice.
    """
    anatomy = top.anatomy
    blocks = list(prefix.model.get_submodule(anatomy.blocks).children())
    taken: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for example in examples:
        batch = collate([example], pad_id).to(device)
        rows, count = SupervisedRows.of(batch), min(POSITIONS, len(batch.targets))
        picked = torch.arange(count, device=device) * len(batch.targets) // count

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: SupervisedRows = rows,
                 picked: torch.Tensor = picked) -> None:  # fmt: skip
            kept.append(rows.take(hidden_of(args, kwargs))[0, picked])

        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        try:
            kept.append(rows.take(prefix(batch))[0, picked])
        except TypeError:  # of other positions than the row's
            return None
        finally:
            for hook in hooks:
                hook.remove()
        if len(kept) != len(blocks) + 1:
            return None
        taken.append(torch.stack(kept))
        targets.append(batch.targets[picked])
        kept.clear()
    answers = [Example((0, *ids), ((1, len(ids) + 1),)) for ids in (target.tolist() for target in targets)]
    counts = torch.tensor([len(target) for target in targets])
    row = torch.repeat_interleave(torch.arange(len(targets)), counts)
    return ProbedStates(torch.cat(taken, dim=1), collate(answers, pad_id).to(device), row.to(device))


def _require_finite(is_finite: bool) -> None:
    if not is_finite:
        raise ModelError(
            "the model's weights, or its loss or hidden states on the sample, are not finite, so that nothing can be "
            "fitted to them; check its weights, or compute in another precision with --model.dtype"
        )


def readout_gains(states: ProbedStates, top: Suffix) -> LineProbe:
    """Fit and score the readout of every frost line; ``top`` is norm, head and loss, a suffix without blocks."""
    last = states.hidden[-1].float()
    base, slope = _losses_and_gradient(top, states, last)
    _require_finite(all(bool(values.isfinite().all()) for values in (base, slope, last)))
    fold = states.row % FOLDS
    factors = [fisher_factors(slope, fold, damping) for damping in DAMPINGS]
    found: list[LineGain] = []
    for boundary, kernel in readout_kernels(states.hidden):
        direction = best_step(kernel, slope, fold, factors)
        found.append(LineGain(boundary, *_score(top, states, base, slope, direction)))
    positions = len(states.row)
    return LineProbe(float(base.sum()) / positions, len(base), positions, tuple(reversed(found)))


def _score(
    top: Suffix, states: ProbedStates, base: torch.Tensor, slope: torch.Tensor, direction: torch.Tensor,
) -> tuple[float, float]:  # fmt: skip
    """Return the mean gain a token along ``direction`` [N, H], at the steps of the other folds, and its error."""
    last = states.hidden[-1].float()
    counts = torch.bincount(states.row, minlength=len(base))
    along = torch.zeros_like(base).index_add_(0, states.row, (slope * direction).sum(-1))
    trial = _row_losses(top, states, last + direction)
    steps = step_sizes(base, along, trial, torch.arange(len(base), device=base.device) % FOLDS)
    reached = _row_losses(top, states, last + steps[states.row, None] * direction)
    return mean_with_error(base - reached, counts)


def _laid_out(states: ProbedStates, last: torch.Tensor) -> torch.Tensor:
    """Lay last hidden states [N, H] out as those of ``states.batch``, [R, T, H] in the model's precision."""
    return SupervisedRows.of(states.batch).put_back(last.to(states.hidden.dtype)[None])


@torch.no_grad()
def _row_losses(top: Suffix, states: ProbedStates, last: torch.Tensor) -> torch.Tensor:
    """Return [R] the loss of each row, summed over its positions, with ``last`` [N, H] as last hidden states."""
    return top.losses_by_row(_laid_out(states, last), states.batch)


def _losses_and_gradient(top: Suffix, states: ProbedStates, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``_row_losses`` does, and the gradient [N, H] of its sum."""
    leaf = last.clone().requires_grad_()
    losses = top.losses_by_row(_laid_out(states, leaf), states.batch)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient

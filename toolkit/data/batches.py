"""Make micro batches of examples: the same rows in the same optimizer step on any number of ranks."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from toolkit.config.policy import global_batch
from toolkit.config.schema import TrainConfig
from toolkit.data.dealing import deal_by_length, deal_by_tokens
from toolkit.data.examples import Example
from toolkit.data.rows import Rows
from toolkit.runtime.page_locked import pin


@dataclass(frozen=True)
class Batch:
    """A micro batch with S supervised tokens: B rows padded on the right to T tokens, or B samples packed into one row.

    The packed row is [1, T] with T the sum of the samples' lengths; positions restart with each sample.
    """

    input_ids: torch.Tensor
    """[B, T] token ids."""
    attention_mask: torch.Tensor | None
    """[B, T], 1 on tokens and 0 on padding; None if nothing is padded, which lets attention take its fast path."""
    supervised: torch.Tensor
    """[B, T] bool: positions whose next token is supervised."""
    targets: torch.Tensor
    """[S] the next tokens at these positions, in the order of ``supervised``."""
    tokens: int
    """Number of tokens without padding."""
    is_filler: bool = False
    """True if this rank has no row left in a short last step: the batch joins in collectives, and its loss is 0."""
    examples: tuple[Example, ...] = ()
    """The B samples in order, as rows or one after the other in the packed row."""
    position_ids: torch.Tensor | None = None
    """[1, T], each token's position in its own sample, if several are packed into one row; else None."""
    cu_seqlens: torch.Tensor | None = None
    """[B + 1] int32 cumulative lengths of the samples of a packed row, from 0; None without packing."""
    of_step: tuple[int, int] | None = None
    """Supervised tokens and all tokens of the optimizer step over all ranks; None for a batch made by itself."""
    hidden: object | None = None
    """Hidden states that are on their way to the device, for the prefix that has them read ahead; else None."""

    @property
    def is_packed(self) -> bool:
        """Return whether several samples share one row."""
        return self.position_ids is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of tokens of each sample."""
        return tuple(map(len, self.examples))

    @property
    def shape_text(self) -> str:
        """Describe rows x tokens, for messages."""
        rows, tokens = self.input_ids.shape
        packed = f"{len(self.examples)} rows packed into " if self.is_packed else ""
        return f"{packed}{rows} {'row' if rows == 1 else 'rows'} x {tokens} tokens"

    def forward_inputs(self, with_position_ids: bool = False) -> dict[str, Any]:
        """Return the arguments, beside the token ids, of a transformers model's forward pass on this batch.

        For a packed row they say where samples begin in each form that some layer reads: positions (rotary or learned,
        masks), flash attention's cumulative lengths, a recurrence's sample numbers, and ``sample_lengths`` for
        ``toolkit.models.varlen``. ``with_position_ids`` gives them for a padded batch too; padding repeats the last
        position of its row.
        """
        if self.position_ids is None:
            if with_position_ids and self.attention_mask is not None:
                return {"attention_mask": self.attention_mask, "position_ids": self.attention_mask.cumsum(-1) - 1}
            return {"attention_mask": self.attention_mask}
        return {
            "attention_mask": None,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
            "seq_idx": (self.position_ids == 0).cumsum(-1, dtype=torch.int32) - 1,
            "sample_lengths": self.lengths,
        }

    @property
    def supervised_tokens(self) -> int:
        """Return the number of tokens that count in the loss."""
        return 0 if self.is_filler else len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which ``to`` copies to a GPU without waiting."""
        return self._map_tensors(pin)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with ``change`` applied to each of its tensors."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchPlan:
    """Deals rows to optimizer steps, micro batches and ranks.

    The rows of a step depend on the order and on the size of a step alone, not on ranks, lengths or micro batches.
    """

    rows: int
    micro_batch_size: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1
    micro_batch_tokens: int | None = None
    """Most tokens of a micro batch, which then has as many rows as fit; None gives it ``micro_batch_size`` rows."""

    @classmethod
    def of_recipe(cls, train: TrainConfig, rows: int, ranks: int, rank: int = 0) -> BatchPlan:
        """Make the plan of a run with ``rows`` training rows on ``ranks`` ranks."""
        accumulation, tokens = train.gradient_accumulation_steps, train.micro_batch_tokens
        return cls(rows, train.micro_batch_size, accumulation, rank, ranks, tokens)

    @property
    def global_batch(self) -> int:
        """Return the rows of one optimizer step over all ranks."""
        return global_batch(self.micro_batch_size, self.accumulation, self.ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch; the last may be short, no row is dropped or repeated."""
        return math.ceil(self.rows / self.global_batch)

    def steps(self, epochs: int, max_steps: int | None) -> int:
        """Return the optimizer steps of a run of ``epochs`` epochs; None sets no limit to them."""
        return min(self.steps_per_epoch * epochs, max_steps or self.steps_per_epoch * epochs)

    def passes(self, end: int, start: int = 0) -> float:
        """Return how many epochs the steps after ``start`` up to ``end`` make up; 0.5 is half an epoch."""
        return (self._rows_before(end) - self._rows_before(start)) / self.rows

    def _rows_before(self, step: int) -> int:
        """Return the rows that the first ``step`` optimizer steps take, over all epochs."""
        epochs, steps_in_epoch = divmod(step, self.steps_per_epoch)
        return epochs * self.rows + steps_in_epoch * self.global_batch

    def text(self, steps: int, epochs: int) -> str:
        """Describe a run of ``steps`` steps, whose recipe asks for ``epochs`` epochs, for the log."""
        stops_early = steps < self.steps(epochs, None)
        return (
            f"{steps} steps{' (train.max_steps)' if stops_early else ''} of {self.global_batch} row(s), "
            f"{f'{self.passes(steps):.2g} of ' if stops_early else ''}{epochs} epoch(s) "
            f"(micro batch {self.micro_batch_size} x accumulation {self.accumulation} x ranks {self.ranks}"
            f"{f', cut into micro batches of {self.micro_batch_tokens} tokens' if self.micro_batch_tokens else ''})"
        )

    def rows_of_step(self, order: Sequence[int], step: int) -> Sequence[int]:
        """Return the row indices of a step over all ranks; ``order`` and ``step`` as for ``micro_batches``."""
        return order[step * self.global_batch : (step + 1) * self.global_batch]

    def micro_batches(
        self, order: Sequence[int], step: int, lengths: np.ndarray | None = None, packed: bool = False
    ) -> list[tuple[list[int], bool]]:
        """Return this rank's rows of one step, as (row indices, is filler) for each micro batch.

        Every rank gets the same number of micro batches, because collectives must match; a rank that is left without
        rows in one gets a filler, the shortest row of the step.

        Args:
            order: row indices of the epoch.
            step: step of the epoch, from 0.
            lengths: tokens of each row of the data; None if they do not matter, which deals by position.
            packed: whether rows are packed, for ``micro_batch_tokens``.
        """
        rows = self.rows_of_step(order, step)
        of_step = np.ones(len(rows), np.int64) if lengths is None else lengths[np.asarray(rows)]
        if self.micro_batch_tokens is not None and lengths is not None:
            dealt = deal_by_tokens(of_step, self.micro_batch_tokens, self.ranks, packed)
        else:
            dealt = deal_by_length(of_step, self.micro_batch_size, self.ranks)
        filler = [rows[int(np.argmin(of_step))]]
        own = [[rows[position] for position in micro_batch[self.rank]] for micro_batch in dealt]
        return [(indices or filler, not indices) for indices in own]


def epoch_order(rows: int, seed: int, epoch: int) -> array[int]:
    """Return the permutation of row indices for epoch ``epoch``, counted from 0; the same on every rank."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return array("q", torch.randperm(rows, generator=generator).numpy().tobytes())


def collate(examples: Sequence[Example], pad_id: int, is_filler: bool = False) -> Batch:
    """Pad examples on the right to the longest, and mark the supervised positions."""
    shape = len(examples), max(map(len, examples))
    input_ids = torch.full(shape, pad_id)
    attention = torch.zeros(shape, dtype=torch.long)
    supervised = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.token_ids)
        attention[row, : len(example)] = 1
        for start, end in example.spans:
            supervised[row, start - 1 : end - 1] = True
    return Batch(
        input_ids=input_ids,
        attention_mask=None if bool(attention.all()) else attention,
        supervised=supervised,
        targets=input_ids.roll(-1, dims=1)[supervised],
        tokens=int(attention.sum()),
        is_filler=is_filler,
        examples=tuple(examples),
    )


def pack(examples: Sequence[Example], is_filler: bool = False) -> Batch:
    """Lay examples one after the other into a single row without padding; the loss is that of ``collate``'s rows.

    Examples of one length need no padding: they stay rows, as ``collate`` lays them out.
    """
    lengths = [len(example) for example in examples]
    if len(set(lengths)) == 1:
        return collate(examples, pad_id=0, is_filler=is_filler)
    input_ids = torch.tensor([[token for example in examples for token in example.token_ids]])
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    offset = 0
    for example in examples:  # the last position of a sample has no next token of its own
        for start, end in example.spans:
            supervised[0, offset + start - 1 : offset + end - 1] = True
        offset += len(example)
    return Batch(
        input_ids=input_ids,
        attention_mask=None,
        supervised=supervised,
        targets=input_ids.roll(-1, dims=1)[supervised],
        tokens=offset,
        is_filler=is_filler,
        examples=tuple(examples),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
    )


def step_batches(
    examples: Sequence[Example],
    order: Sequence[int],
    plan: BatchPlan,
    pad_id: int,
    first_step: int = 0,
    packed: bool = False,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro batches, one list per optimizer step, from ``first_step`` to the end of the epoch.

    ``order`` is the epoch's permutation of row indices, as ``epoch_order`` returns it; steps are counted from 0.
    """
    if isinstance(examples, Rows):
        lengths, supervised = examples.lengths, examples.supervised
    else:
        lengths = np.array(list(map(len, examples)))
        supervised = np.array([example.supervised_tokens for example in examples])
    for step in range(first_step, plan.steps_per_epoch):
        of_all_ranks = np.asarray(plan.rows_of_step(order, step))
        of_step = int(supervised[of_all_ranks].sum()), int(lengths[of_all_ranks].sum())
        micro_batches = []
        for rows, is_filler in plan.micro_batches(order, step, lengths, packed):
            row_examples = [examples[index] for index in rows]
            batch = pack(row_examples, is_filler) if packed else collate(row_examples, pad_id, is_filler)
            micro_batches.append(replace(batch, of_step=of_step))
        yield micro_batches

"""Examples become micro batches: the same rows in the same optimizer step on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from toolkit.data.examples import Example


@dataclass(frozen=True)
class Batch:
    """A micro batch of B rows padded on the right to T tokens, with S supervised tokens."""

    input_ids: torch.Tensor
    """[B, T] token ids."""
    attention_mask: torch.Tensor | None
    """[B, T], 1 on tokens and 0 on padding; none where nothing is padded, which lets attention take its fast path."""
    supervised: torch.Tensor
    """[B, T] bool: positions whose next token is supervised."""
    targets: torch.Tensor
    """[S] those next tokens, in the order of ``supervised``."""
    tokens: int
    """Tokens without padding."""
    is_filler: bool = False
    """Takes part in every collective but counts for nothing: this rank had no row left in a short last step."""

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens that count in the loss."""
        return 0 if self.is_filler else len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=mask,
            supervised=self.supervised.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class BatchPlan:
    """How rows are dealt to steps, micro batches and ranks."""

    rows: int
    micro_batch_size: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step over all ranks."""
        return self.micro_batch_size * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may be short, no row is dropped or repeated."""
        return math.ceil(self.rows / self.global_batch)

    def steps(self, epochs: int, most: int | None) -> int:
        """Optimizer steps of a run of ``epochs`` passes, at most ``most``."""
        return min(self.steps_per_epoch * epochs, most or self.steps_per_epoch * epochs)

    def micro_batches(self, order: Sequence[int], step: int) -> list[tuple[list[int], bool]]:
        """This rank's rows of one step: a list of (row indices, is filler) per micro batch.

        Every rank gets the same number of micro batches, because collectives must match; a rank that a short last
        step leaves without rows gets a filler.
        """
        rows = order[step * self.global_batch : (step + 1) * self.global_batch]
        width = self.micro_batch_size * self.ranks
        micro = []
        for start in range(0, len(rows), width):
            across_ranks = rows[start : start + width]
            own = list(across_ranks[self.rank :: self.ranks])
            micro.append((own, False) if own else ([across_ranks[0]], True))
        return micro


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The permutation of row indices that epoch ``epoch`` (from 0) follows; the same on every rank."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(rows, generator=generator).tolist()


def collate(examples: Sequence[Example], pad_id: int, is_filler: bool = False) -> Batch:
    """Pad examples to the longest and mark the supervised positions."""
    longest = max(len(example.token_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    attention = torch.zeros(len(examples), longest, dtype=torch.long)
    supervised = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.token_ids)
        input_ids[row, :length] = torch.tensor(example.token_ids)
        attention[row, :length] = 1
        supervised[row, example.answer_start - 1 : length - 1] = True
    return Batch(
        input_ids=input_ids,
        attention_mask=None if bool(attention.all()) else attention,
        supervised=supervised,
        targets=input_ids.roll(-1, dims=1)[supervised],
        tokens=int(attention.sum()),
        is_filler=is_filler,
    )


def step_batches(
    examples: Sequence[Example], order: Sequence[int], plan: BatchPlan, pad_id: int, first_step: int = 0
) -> Iterator[list[Batch]]:
    """This rank's micro batches, one list per optimizer step, from ``first_step`` to the end of the epoch."""
    for step in range(first_step, plan.steps_per_epoch):
        yield [
            collate([examples[index] for index in rows], pad_id, is_filler)
            for rows, is_filler in plan.micro_batches(order, step)
        ]

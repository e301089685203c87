"""Steps on fake CUDA tensors, of the tiny model as a run sets it up. Not a test itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from fake_cuda import Count, fake_cuda
from fake_gpu import one_gpu
from helpers import invocation, tiny_flags
from step_counts import watch_phases
from torch._subclasses.fake_tensor import unset_fake_temporarily

from toolkit.activation_cache.packing import set_attention
from toolkit.config.policy import Decision
from toolkit.data.batches import Batch, epoch_order, step_batches
from toolkit.data.prefetch import Prefetcher
from toolkit.frozen import offload_unit, weight_offload
from toolkit.models import quantization
from toolkit.models.disk_offload import OnDisk, offload_to_disk
from toolkit.models.varlen import VARLEN
from toolkit.optim.gradients import Clipping
from toolkit.runtime.distributed import World
from toolkit.split.suffix import Suffix
from toolkit.training import phase_cut
from toolkit.training.context import prepare
from toolkit.training.step import train_step
from toolkit.training.trainer import Trainer


@dataclass
class FakeRun:
    """A run of the tiny model whose model, engine and batches are fake tensors on one GPU."""

    trainer: Trainer
    count: Count
    steps: list[list[Batch]]

    def step(self) -> None:
        """Take two steps, and count the second: the first one also makes what all find, such as where to sample."""
        state, world = self.trainer.state, self.trainer.context.world
        first, second = self.steps[:2]
        for micro_batches in (first[:1], second):
            batches = [batch.pin_memory().to(world.device) for batch in micro_batches]
            self.count.clear()
            train_step(batches, state.prefix, state.engine, world)


@contextlib.contextmanager
def fake_run(model: Path, folder: Path, *flags: object) -> Iterator[FakeRun]:
    """Prepare a run on the host, and build its first phase on fake tensors. It has no plan, which holds no tensors."""
    with one_gpu(), mock.patch("toolkit.training.context.planners_of", return_value=()):
        given = invocation(*tiny_flags(model, folder, "--prefix.cache", "off", "--train.max_steps", 8, *flags))
        trainer = Trainer(*prepare(given, World()), Path("unused"))
    with contextlib.ExitStack() as stack:
        count = stack.enter_context(fake_cuda())
        stack.enter_context(_finite_gradients(count))
        stack.enter_context(mock.patch.object(phase_cut, "choose_packing", _packing))
        stack.enter_context(mock.patch.object(offload_unit, "offload_to_disk", _zeros_on_disk))
        # tables that are made once: later tests would meet fake ones
        codebooks = cache(quantization._nf4_codebooks.__wrapped__)
        stack.enter_context(mock.patch.object(quantization, "_nf4_codebooks", codebooks))
        stack.enter_context(mock.patch.dict(quantization.import_bitsandbytes().name2qmap))
        # a thread of its own has no fake tensors: blocks are copied when they are entered (tests/test_block_stream.py)
        stack.enter_context(mock.patch.object(weight_offload, "block_stream", return_value=None))
        stack.enter_context(mock.patch.object(Prefetcher, "__call__", lambda self, source: iter(source)))
        trainer.begin(None)
        watch_phases(trainer.state.engine, count)
        yield FakeRun(trainer, count, list(_steps(trainer)))


def _packing(mode: str, rows: int, prefix: object, suffix: Suffix, *others: object) -> Decision:
    """Decide as the recipe says: what the decision compares has no values here."""
    if mode == "on":
        set_attention(suffix.model, VARLEN)
    return Decision(mode == "on", mode)


def _zeros_on_disk(tensors: Mapping[str, torch.Tensor]) -> dict[str, OnDisk]:
    """Offload zeros of the same shapes: fake tensors have no content."""
    with unset_fake_temporarily():
        return offload_to_disk({name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()})


def _steps(trainer: Trainer) -> Iterator[list[Batch]]:
    """Yield the micro batches of the first epoch's steps, made on the host of real tensors."""
    context = trainer.context
    with unset_fake_temporarily():
        order = epoch_order(len(context.dataset.train), context.config.train.seed, 0)
        yield from step_batches(
            context.dataset.train, order, context.batch_plan, context.pad_id, packed=trainer.state.packing.on
        )


@contextlib.contextmanager
def _finite_gradients(count: Count) -> Iterator[None]:
    """Let the 8-bit optimizers, which read it, find a finite norm; that is a wait."""

    def factor(self: Clipping) -> float:
        count.wait("the gradient's norm")
        return 0.5

    original = vars(Clipping)["factor"]
    Clipping.factor = property(factor)  # type: ignore[assignment]
    try:
        yield
    finally:
        Clipping.factor = original  # type: ignore[method-assign]

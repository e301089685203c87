"""Count what a step of EXAONE-2.4B's shape does on a GPU, on fake CUDA tensors: kernels, waits, copies. Not a test.

    PYTHONPATH=. python tests/step_counts.py [--no-triton]

Prints a table of four batches: its last 4 blocks and head train, on hidden states that are at hand.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from fake_cuda import Count, fake_cuda
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import LlamaForCausalLM

from benchmarks.report import table
from benchmarks.shapes import EXAONE_2_4B
from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.split.loss_head import Shortcuts
from toolkit.split.suffix import split
from toolkit.training.step import train_step

PHASES = ("forward_loss", "backward", "update")
"""Methods of an engine, whose kernels are counted apart."""
SHAPES = ((1, 700, 60), (1, 700, 699), (8, 2048, 256), (8, 2048, 2047))
"""Rows, tokens and supervised tokens of a row."""


def watch_phases(engine: Any, count: Count) -> None:
    """Let the engine's methods say what the step is at."""

    def run(name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        before, count.phase = count.phase, name
        try:
            return method(*args, **kwargs)
        finally:
            count.phase = before

    for name in PHASES:
        setattr(engine, name, partial(run, name, getattr(engine, name)))


def batch_of(rows: int, tokens: int, supervised: int) -> Batch:
    """Rows of one length whose last tokens are supervised, made on the host of real tensors."""
    with unset_fake_temporarily():
        return collate([Example.with_answer((1,) * tokens, tokens - supervised)] * rows, 0)


@contextlib.contextmanager
def triton_kernels(count: Count) -> Iterator[None]:
    """Take our Triton kernels, as a GPU does. Those of the update are operators; those of the loss only count here."""

    def launch(name: str) -> Callable[..., None]:
        def launched(*args: object) -> None:
            count.launches[count.phase, name] += 1

        return launched

    own = {name: launch(name) for name in ("add_statistics", "replace_by_gradient")}
    with contextlib.ExitStack() as stack:
        for module in ("optim.kernel_choice", "split.logit_tiles"):
            stack.enter_context(mock.patch(f"toolkit.{module}.triton_trouble", return_value=""))
        stack.enter_context(mock.patch("toolkit.split.logit_tiles._kernels", return_value=SimpleNamespace(**own)))
        yield


@contextlib.contextmanager
def large_step(triton: bool = True) -> Iterator[tuple[Callable[[int, int, int], None], Count]]:
    """Yield what takes a step of EXAONE-2.4B's shape, last 4 blocks and head, on hidden states that are at hand.

    Of the 26 frozen blocks, which such a step does not run, it has one.
    """
    with fake_cuda() as count, triton_kernels(count) if triton else contextlib.nullcontext():
        with torch.device("cuda"):
            model = LlamaForCausalLM._from_config(replace(EXAONE_2_4B, blocks=5).config(), dtype=torch.bfloat16)
        anatomy = detect_anatomy(model.train())
        mask = build_mask(MaskConfig(train=["last:4", "head"]), anatomy)
        apply_mask(model, mask, anatomy)
        _, suffix = split(model, anatomy, mask.boundary)
        suffix.shortcuts = Shortcuts(tiled=True, norm=True, mlp=True)
        weights = trainable_parameters(suffix.model, mask)
        engine = LocalEngine(suffix, weights, mask.groups, TrainConfig(), OptimConfig(), 100, World())
        watch_phases(engine, count)

        def step(rows: int, tokens: int, supervised: int) -> None:
            batch = batch_of(rows, tokens, supervised).pin_memory().to(World().device)
            hidden = torch.empty(rows, tokens, EXAONE_2_4B.hidden, dtype=torch.bfloat16, device="cuda")
            count.clear()
            train_step([batch], cast(HiddenStates, lambda batch: hidden), engine, World())

        step(1, 8, 4)  # the first one also makes what later ones find, such as the places of the sample
        yield step, count


def main() -> None:
    """Print the table."""
    rows = []
    with large_step(triton="--no-triton" not in sys.argv) as (step, count):
        for shape in SHAPES:
            step(*shape)
            parts = [count.launched(phase) for phase in (*PHASES, "")]
            numbers = *parts, count.launched(), count.waits.total(), count.copies.total()
            rows.append([f"{shape[0]} x {shape[1]}, {shape[2]} supervised", *map(str, numbers)])
    columns = ["rows x tokens, of each row", "forward", "backward", "update", "rest", "kernels", "waits", "copies"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()

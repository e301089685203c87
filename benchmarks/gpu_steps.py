"""The part of ``benchmarks/gpu.py`` that times steps beside a plain loop, and what all parts with steps share."""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from benchmarks.floors import synchronise
from benchmarks.gpu_parts import VARIANTS
from benchmarks.gpu_table import Case, Row, Sizes, median_ms
from benchmarks.shapes import Shape
from benchmarks.update import by_hand
from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.engine.base import Engine, Update
from toolkit.engine.local import LocalEngine
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import ParameterGroup, build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.split.prefix import Prefix
from toolkit.split.suffix import Suffix, split
from toolkit.training.step import train_step

TRAINED = MaskConfig(train=["last:4", "head"])
EPOCHS = 3
"""Passes over the rows, for the time from an empty cache."""
LONGEST, NAME_LENGTH = 5, 60
"""Kernels of a step that are named, and the characters of a name."""


@dataclass
class Top:
    """What trains of a model, cut off its frozen blocks, and batches with hidden states that are there."""

    prefix: Prefix | None
    suffix: Suffix
    weights: dict[str, nn.Parameter]
    groups: Sequence[ParameterGroup]
    batches: dict[Case, Batch]
    hidden: dict[Case, torch.Tensor | None]
    """Hidden states at the frost line; None where the suffix is the whole model."""

    def engine(self, train: TrainConfig | None = None, optim: OptimConfig | None = None) -> LocalEngine:
        """Return an engine of torch alone, with the recipe's defaults for what is not given."""
        settings = train or TrainConfig(), optim or OptimConfig()
        return LocalEngine(self.suffix, self.weights, self.groups, *settings, 100, World())

    def step(self, engine: Engine, case: Case) -> None:
        """Take a step on the batch of a case, as a run does."""
        hidden = self.hidden[case]
        states = None if hidden is None else cast(HiddenStates, lambda batch: hidden)
        train_step([self.batches[case]], states, engine, engine.world)


def random_model(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """Return a model of random weights on the device, ready to train."""
    with device:
        model = LlamaForCausalLM._from_config(shape.config(), dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.train()


def top_of(
    model: LlamaForCausalLM, config: MaskConfig, batches: Mapping[Case, Batch], frozen: FrozenWeights | None = None
) -> Top:
    """Apply a mask to a model and cut it where its frozen blocks end."""
    anatomy = detect_anatomy(model)
    mask = build_mask(config, anatomy)
    apply_mask(model, mask, anatomy)
    prefix, suffix = split(model, anatomy, mask.boundary if mask.boundary else None, frozen)
    hidden = {case: prefix(batch) if prefix else None for case, batch in batches.items()}
    first = next(iter(batches))
    suffix.choose_shortcuts(hidden[first], batches[first])
    return Top(prefix, suffix, trainable_parameters(suffix.model, mask), mask.groups, dict(batches), hidden)


def batches_of(cases: Sequence[Case], shape: Shape, device: torch.device) -> dict[Case, Batch]:
    """Return a batch of random token ids for each case, on the device."""
    return {case: random_batch(*case, shape.vocabulary).to(device) for case in cases}


def random_batch(rows: int, tokens: int, supervised: int, vocabulary: int) -> Batch:
    """Return rows of random token ids whose last ones are supervised, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator).tolist()
    return collate([Example.with_answer(tuple(row), tokens - supervised) for row in ids], 0)


def steps(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time steps of the large shape on cached hidden states beside a plain loop; count kernels and waits."""
    model = random_model(sizes.shape, device)
    batches = batches_of(sizes.batches, sizes.shape, device)
    top = top_of(model, TRAINED, batches)
    yield Row("the loss", top.suffix.loss_text)
    plain: dict[Case, tuple[float, float]] = {}
    for fused in (False, True):
        step = by_hand(list(top.weights.values()), partial(torch.optim.AdamW, lr=1e-5, fused=fused))
        for case, batch in batches.items():
            what = f"plain loop{', fused AdamW' if fused else ''}, B T S = {case}"
            if found := (yield from measured(partial(plain_step, model, batch, step), what, device)):
                plain[case] = found
        del step
    largest = max(batches, key=lambda case: case[0] * case[1])
    assert top.prefix is not None
    filling = median_ms(partial(top.prefix, batches[largest]), device) / (largest[0] * largest[1])
    yield Row("frozen blocks of 1,000 tokens, ms", f"{1e3 * filling:.2f}")
    top.prefix = None
    del model
    for title, variant in VARIANTS.items():
        with variant():
            engine = top.engine()
            for case in batches:
                what = f"step{title}, B T S = {case}"
                work = partial(top.step, engine, case)
                found = yield from measured(work, what, device, name_kernels=case == sizes.batches[0])
                if found and not title and case in plain:
                    yield from _aims(case, plain[case], found, case[0] * case[1] * filling, sizes)
            issued = issued_ms(top, engine, sizes.batches[0], device)
            yield Row(f"step{title}, B T S = {sizes.batches[0]}: ms until the host has issued it", f"{issued:.1f}")
            if device.type == "cuda":
                yield waits(partial(top.step, engine, sizes.batches[0]), f"step{title}: waits for the device")
            del engine, work


def _aims(
    case: Case, plain: tuple[float, float], own: tuple[float, float], filling: float, sizes: Sizes
) -> Iterator[Row]:
    """Compare times in ms and peaks with those of the plain loop with fused AdamW; ``filling`` is the first pass's."""
    held = sizes.has_aims and case == sizes.batches[0]
    cold = EPOCHS * plain[0] / (filling + EPOCHS * own[0])
    for what, value, aim, holds in (
        ("a later epoch, times faster", plain[0] / own[0], "at least 3", plain[0] >= 3 * own[0]),
        (f"{EPOCHS} epochs from an empty cache, times faster", cold, "at least 1.8", cold >= 1.8),
        ("peak memory, of the plain loop's", own[1] / max(plain[1], 1e-9), "at most 0.5", 2 * own[1] <= plain[1]),
    ):
        if held or "memory" not in what:
            yield Row(f"{what}, B T S = {case}", f"{value:.2f}", aim if held else "", holds if held else None)


def measured(
    work: Callable[[], object], what: str, device: torch.device, name_kernels: bool = False
) -> Generator[Row, None, tuple[float, float] | None]:
    """Time a step, and on a GPU take its peak memory and count its kernels.

    Returns:
        Its ms and GiB, or None if it does not fit.
    """
    peak = 0.0
    try:
        work()  # makes what all steps share, such as moments
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = median_ms(work, device)
        yield Row(f"{what}: ms", f"{taken:.1f}")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            yield Row(f"{what}: peak GiB", f"{peak:.2f}")
            if name_kernels:
                yield from kernels(work, what, device)
    except torch.OutOfMemoryError:
        yield Row(f"{what}: ms", "does not fit")
        return None
    return taken, peak


def issued_ms(top: Top, engine: Engine, case: Case, device: torch.device, repeats: int = 7) -> float:
    """Return the median milliseconds that the host takes to issue a step; only then does it wait for the device."""
    update, times = engine.update, list[float]()

    def update_and_note() -> Update:
        result = update()
        times.append(time.perf_counter() - started)
        return result

    with mock.patch.object(engine, "update", update_and_note):
        for _ in range(repeats):
            synchronise(device)
            started = time.perf_counter()
            top.step(engine, case)
    return statistics.median(times) * 1e3


def plain_step(model: Any, batch: Batch, update: Callable[[], object]) -> None:
    """Take a step as a plain loop does: the whole model, whole logits, float32 masters."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[batch.supervised].float()
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits, batch.targets))
    update()


def kernels(work: Callable[[], object], what: str, device: torch.device) -> Iterator[Row]:
    """Count the kernels of a step and add up their time, then that of those which take longest."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        synchronise(device)
    events = [event for event in profiled.events() or [] if event.device_type.name == "CUDA"]
    launched = [event for event in events if not event.is_user_annotation and "#" not in event.name]  # Optimizer.step#…
    taken: Counter[str] = Counter()
    for event in launched:
        name = re.sub(r"void |at::native::|\(anonymous namespace\)::", "", event.name)[:NAME_LENGTH].replace("|", " ")
        taken[name] += event.time_range.elapsed_us()
    yield Row(f"{what}: kernels and their ms", f"{len(launched)}, {sum(taken.values()) / 1e3:.2f}")
    for name, spent in taken.most_common(LONGEST):
        yield Row(f"{what}: ms of {name}", f"{spent / 1e3:.2f}")


def waits(work: Callable[[], object], what: str) -> Row:
    """List the lines at which a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return Row(what, ", ".join(f"{line} x {count}" for line, count in lines.items()) or "none")

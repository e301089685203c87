"""The parts of ``benchmarks/gpu.py`` with peers: transformers' Trainer, and our own step under DeepSpeed."""

from __future__ import annotations

import gc
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from benchmarks.gpu_steps import TRAINED, batches_of, measured, random_batch, random_model, top_of
from benchmarks.gpu_table import Case, Row, Sizes
from benchmarks.peers.common import Clock, labelled_rows, trainer_settings
from benchmarks.plain_loop import train_top
from benchmarks.workload import ROOT, Workload
from toolkit.config.schema import OptimConfig, RunConfig, TrainConfig
from toolkit.engine.deepspeed.config import load_ds_config
from toolkit.runtime.distributed import join_process_group, leave_process_group

WARM_UP, COUNTED = 2, 5
MOST = 1.1
"""Times the step of torch alone that one rank under ZeRO-2 may take."""


def trainer(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time transformers' Trainer on the rows of the plain loop: bfloat16 weights, which AdamW updates directly."""
    model = random_model(sizes.shape, device)
    for case in sizes.batches:
        what = f"Trainer, B T S = {case}"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield Row(f"{what}: ms", f"{_trainer_ms(model, case, sizes.shape.vocabulary):.1f}")
        except torch.OutOfMemoryError:
            yield Row(f"{what}: ms", "does not fit")
            continue
        if device.type == "cuda":
            yield Row(f"{what}: peak GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")


def _trainer_ms(model: Any, case: Case, vocabulary: int) -> float:
    """Return the median time of a step of the Trainer in milliseconds."""
    rows = [(list(example.token_ids), example.answer_start) for example in random_batch(*case, vocabulary).examples]
    workload = Workload("", "", rows, [list(range(len(rows)))] * (WARM_UP + COUNTED), seed=0)
    train_top(model, workload)
    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        settings = trainer_settings(workload, Path(name)) | {
            "per_device_train_batch_size": case[0], "logging_strategy": "no",
            "dataloader_pin_memory": model.device.type == "cuda",
        }  # fmt: skip
        Trainer(
            model=model, args=TrainingArguments(**settings), train_dataset=labelled_rows(workload),
            data_collator=default_data_collator, callbacks=[clock],
        ).train()  # fmt: skip
    times = [end - start for start, end in zip(clock.record.starts, clock.record.ends, strict=True)]
    return statistics.median(times[WARM_UP:]) * 1e3


def zero(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time steps under ZeRO-2 on one rank beside those of torch alone."""
    if importlib.util.find_spec("deepspeed") is None:
        remedy = "`pip install -c constraints.txt deepspeed`"
        yield Row("ZeRO-2 on one rank", f"left out: deepspeed is not installed; run {remedy}")
        return
    from toolkit.engine.deepspeed.engine import ZeroEngine

    top = top_of(random_model(sizes.shape, device), TRAINED, batches_of(sizes.batches, sizes.shape, device))
    top.prefix = None
    engine = top.engine()
    alone = {}
    for case in top.batches:
        alone[case] = yield from measured(partial(top.step, engine, case), f"torch alone, B T S = {case}", device)
    del engine
    ds_config = load_ds_config(ROOT / "ds_configs" / "zero2.json", RunConfig(), 1, sizes.shape.hidden)
    assert ds_config is not None
    with mock.patch.dict(os.environ):
        world = join_process_group(engine_needs_group=True)
        under_zero = ZeroEngine(
            top.suffix, top.weights, top.groups, TrainConfig(), OptimConfig(), 100, world, {}, ds_config
        )
        for case, before in alone.items():
            work = partial(top.step, under_zero, case)
            found = yield from measured(work, f"ZeRO-2 on one rank, B T S = {case}", device, case == sizes.batches[0])
            if found and before:
                times = found[0] / before[0]
                bound, holds = (f"at most {MOST}", times <= MOST) if sizes.has_aims else ("", None)
                yield Row(f"ZeRO-2 on one rank, times torch alone, B T S = {case}", f"{times:.2f}", bound, holds)
        under_zero.release()
        leave_process_group()

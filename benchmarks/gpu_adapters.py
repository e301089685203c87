"""The part of ``benchmarks/gpu.py`` that times steps with adapters, beside peft's under a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.gpu_steps import batches_of, measured, random_model, top_of
from benchmarks.gpu_table import Case, Row, Sizes
from toolkit.config.schema import MaskConfig, TrainConfig
from toolkit.data.batches import Batch

BLOCKS, RANK, RATE = 8, 16, 5e-4
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Step = Callable[[Case], object]


def adapters(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time steps with LoRA of rank 16 beside every linear layer of the last eight blocks, and of all blocks."""
    batches = batches_of(sizes.batches[::2], sizes.shape, device)
    blocks = min(BLOCKS, sizes.shape.blocks // 2)
    for where, count in ((f"the last {blocks} blocks", blocks), ("all blocks", sizes.shape.blocks)):
        for who, make in (("peft, plain loop", peft_step), ("frostline", own_step)):
            step = make(random_model(sizes.shape, device), count, batches)
            for case in batches:
                what = f"{who}, LoRA in {where}, B T S = {case}"
                yield from measured(partial(step, case), what, device, name_kernels=case == sizes.batches[0])
            del step


def peft_step(model: LlamaForCausalLM, count: int, batches: dict[Case, Batch]) -> Step:
    """Return a step of peft's adapters in the last ``count`` blocks: float32 adapters, torch's fused AdamW."""
    total = int(model.config.num_hidden_layers)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEAR), task_type="CAUSAL_LM",
        layers_to_transform=list(range(total - count, total)),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads an attribute that transformers has renamed
        adapted: Any = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def step(case: Case) -> None:
        batch = batches[case]
        labels = torch.where(batch.supervised, batch.input_ids.roll(-1, 1), -100).roll(1, 1)
        adapted(input_ids=batch.input_ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(model: LlamaForCausalLM, count: int, batches: dict[Case, Batch]) -> Step:
    """Return a step of the toolkit's adapters on hidden states that are there; the frozen prefix is freed."""
    entry = {"lora": {"select": f"last:{count}", "rank": RANK, "alpha": 2 * RANK}}
    top = top_of(model, MaskConfig.model_validate({"train": [entry]}), batches)
    top.prefix = None
    return partial(top.step, top.engine(TrainConfig(learning_rate=RATE)))

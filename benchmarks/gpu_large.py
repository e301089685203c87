"""The part of ``benchmarks/gpu.py`` that trains the top of a model which is larger than a card may hold."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.floors import synchronise
from benchmarks.gpu_steps import Top, batches_of, measured, random_batch, top_of
from benchmarks.gpu_table import Row, Sizes, has_bitsandbytes
from benchmarks.shapes import Shape
from toolkit.config.schema import MaskConfig, OptimConfig
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.disk_offload import OnDisk
from toolkit.runtime.host_memory import available_host_bytes
from toolkit.runtime.safetensors_io import SafetensorsFile

CARD_GIB = 24
TRAINED = 4
HOST_SHARE = 0.8
"""Of the host's free memory, at most so much is page-locked for frozen blocks."""


def large(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Fill the cache of a 32B shape from streamed blocks and train its top, on a card of which 24 GiB may be used."""
    if not has_bitsandbytes():
        yield Row("32B shape", "left out: bitsandbytes is not installed, whose 8-bit moments fit beside 4 blocks")
        return
    with tempfile.TemporaryDirectory() as name, _capped(device):
        top, frozen = _top_with_streamed_blocks(sizes, device, Path(name))
        yield from _first_pass(top, frozen, sizes, device)
        top.prefix = None
        del frozen
        case = (1, *sizes.filled[1:])
        top.batches = batches_of([case], sizes.large, device)
        hidden = top.hidden[sizes.filled]
        assert hidden is not None
        top.hidden = {case: hidden[:1].clone()}
        engine = top.engine(optim=OptimConfig(name="adamw_8bit"))
        found = yield from measured(partial(top.step, engine, case), f"32B shape, step, B T S = {case}", device)
        if device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved() / 2**30
            holds = found is not None and reserved <= CARD_GIB
            yield Row("32B shape, step: most GiB that torch reserved", f"{reserved:.2f}", f"at most {CARD_GIB}", holds)


@contextmanager
def _capped(device: torch.device) -> Iterator[None]:
    """Let torch's allocator take no more than such a card has."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_GIB * 2**30 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _first_pass(top: Top, frozen: FrozenWeights, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Time the frozen blocks over a batch that fills the cache, streamed from disk and from page-locked memory."""
    rows, tokens, _ = sizes.filled
    batch = top.batches[sizes.filled]
    assert top.prefix is not None
    placements: tuple[tuple[Literal["disk", "cpu"], str], ...] = (("disk", "disk"), ("cpu", "the host"))
    for placement, text in placements:
        what = f"32B shape, first pass of {rows} x {tokens} tokens from {text}"
        size = sum(frozen.nbytes().values())
        if placement == "cpu" and size > HOST_SHARE * available_host_bytes():
            yield Row(f"{what}: s a row", f"left out: the blocks take {size / 2**30:.0f} GiB of the host")
            continue
        with torch.no_grad():
            frozen.place_weights(top.prefix.model, "model", placement)
        if placement == "cpu" and frozen.is_streamed and (there := frozen.nbytes().get("cpu", 0)) < size:
            share = f"{there / 2**30:.0f} of {size / 2**30:.0f} GiB"
            yield Row(f"{what}: s a row", f"left out: page-locked memory was refused beyond {share}")
            continue
        taken = _seconds(partial(top.prefix, batch), device)
        yield Row(f"{what}: s a row", f"{taken / rows:.3f}")
        yield Row(f"{what}: GB/s of weights", f"{size / taken / 1e9:.1f}")
    if device.type == "cuda":
        yield Row("32B shape, first pass: peak GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def _top_with_streamed_blocks(sizes: Sizes, device: torch.device, folder: Path) -> tuple[Top, FrozenWeights]:
    """Return the cut model; all its frozen blocks have the weights of one file, so that neither disk nor host fills."""
    shape = sizes.large
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(shape.config(), dtype=torch.bfloat16)
    model.config.use_cache = False
    frozen_blocks = [f"model.layers.{index}" for index in range(shape.blocks - TRAINED)]
    stored = _stored_block(shape, device, folder)
    on_disk = {f"{block}.{name}": tensor for block in frozen_blocks for name, tensor in stored.items()}
    for name, parameter in list(model.named_parameters()):
        if name not in on_disk:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(_random(parameter.shape, device))
    model.model.rotary_emb.to(device)
    model.requires_grad_(False)  # what trains is left where it is
    frozen = FrozenWeights(model, frozen_blocks, (), device, on_disk)
    batches = {sizes.filled: random_batch(*sizes.filled, shape.vocabulary).to(device)}
    return top_of(model.train(), MaskConfig(train=[f"last:{TRAINED}"]), batches, frozen), frozen


def _stored_block(shape: Shape, device: torch.device, folder: Path) -> dict[str, OnDisk]:
    """Write the weights of one block into a file; return its tensors by their names in a block."""
    path = folder / "block.safetensors"
    tensors = {f"{name}.weight": _random(size, device).cpu() for name, size in shape.block().items()}
    save_file(tensors, path)
    file = SafetensorsFile(path)
    return {name: OnDisk(file, name, tensor.dtype) for name, tensor in tensors.items()}


def _random(size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return weights as Llama starts: matrices normally distributed, norms of ones."""
    tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
    return tensor if len(size) == 1 else tensor.normal_(std=0.02)

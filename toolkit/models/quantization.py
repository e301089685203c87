"""Quantise frozen weights to 8 or 4 bits (bitsandbytes), and dequantise them for the moment they compute.

Only storage is quantised, products are not: activations stay as they are. Dettmers et al. (LLM.int8(), arXiv
2208.07339) also quantise activations, with outlier columns that depend on the whole batch; then hidden[b] of a row
would depend on the rows beside it, and could not be cached. NormalFloat and the double quantisation of its scales are
of Dettmers et al. (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.runtime.errors import ModelError

Precision = Literal["int8", "nf4"]

PARTS: dict[Precision, dict[str, torch.dtype]] = {
    "int8": {"codes": torch.int8, "scales": torch.float32},
    "nf4": {"codes": torch.uint8, "scales": torch.uint8, "scales_of_scales": torch.float32, "offset": torch.float32},
}
"""Names and dtypes of the tensors that a quantised weight consists of."""

_BLOCK, _OUTER = 64, 256
"""nf4: number of weights that share a scale, and of scales that share a scale of their own."""


@dataclass(frozen=True)
class QuantizationSpec:
    """Describes how a weight is quantised, and the shape, dtype and layout that it is dequantised to."""

    precision: Precision
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    """True if the weight is inputs × outputs (GPT-2's Conv1D); scales belong to outputs."""

    @property
    def inputs(self) -> int:
        """Return the number of elements of the weight that belong to one output."""
        return self.shape[0] if self.transposed else self.shape[-1]


def quantisable(block: nn.Module, precision: Precision) -> dict[str, QuantizationSpec]:
    """Describe the weights of a block that can be quantised, by name within the block.

    They are the matrices of ``nn.Linear`` and of GPT-2's ``Conv1D``, and the stacked matrices of a mixture's experts.
    Norms, biases, routers that are no Linear, convolutions and the recurrences of state-space models stay.
    """
    specs = {}
    for path, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight"
            stacked = parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if (linear or stacked) and parameter.is_floating_point() and parameter.numel() % 2 == 0:
                specs[f"{path}.{leaf}" if path else leaf] = QuantizationSpec(
                    precision, tuple(parameter.shape), parameter.dtype, isinstance(module, Conv1D)
                )
    return specs


def quantised_bytes(spec: QuantizationSpec) -> int:
    """Return the bytes of all parts of a quantised weight.

    int8 takes 1 byte for a weight and 4 for an output. nf4 takes half a byte for a weight, 1 for each ``_BLOCK``
    weights, 4 for each ``_OUTER`` such blocks, and 4 for the offset.
    """
    dtypes = PARTS[spec.precision]
    return sum(math.prod(shape) * dtypes[part].itemsize for part, shape in _part_shapes(spec).items())


def _part_shapes(spec: QuantizationSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that ``quantise`` makes, by name."""
    size = math.prod(spec.shape)
    if spec.precision == "int8":
        return {"codes": (size // spec.inputs, spec.inputs), "scales": (size // spec.inputs,)}
    scales = math.ceil(size / _BLOCK)
    return {
        "codes": (size // 2, 1), "scales": (scales,), "scales_of_scales": (math.ceil(scales / _OUTER),), "offset": (1,),
    }  # fmt: skip


def quantise(weight: torch.Tensor, spec: QuantizationSpec) -> dict[str, torch.Tensor]:
    """Quantise ``weight`` into the tensors that ``PARTS`` names, on its device.

    int8 [N, K]: codes = round(127 · w / scales), scales [N] = max |w| of each output. nf4: the nearest of 16 quantiles
    of a normal distribution, times the largest magnitude of 64 weights, which is kept in 8 bits itself. On the meta
    device the parts have no content.
    """
    if weight.is_meta:
        dtypes = PARTS[spec.precision]
        return {name: weight.new_empty(shape, dtype=dtypes[name]) for name, shape in _part_shapes(spec).items()}
    functional = import_bitsandbytes()
    matrix = (weight.t() if spec.transposed else weight).reshape(-1, spec.inputs).contiguous()
    if spec.precision == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        return {"codes": codes, "scales": scales}
    codes, state = functional.quantize_4bit(matrix, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return {
        "codes": codes, "scales": state.absmax, "scales_of_scales": state.state2.absmax,
        "offset": state.offset.reshape(1),
    }  # fmt: skip


def dequantise(parts: Mapping[str, torch.Tensor], spec: QuantizationSpec) -> torch.Tensor:
    """Return the weight that ``quantise`` made ``parts`` of, in its original shape and dtype."""
    if spec.precision == "int8":
        scales = parts["scales"].mul(1 / 127).unsqueeze(1)
        matrix = parts["codes"].to(spec.dtype).mul_(scales)
    elif parts["codes"].is_meta:  # allocates what bitsandbytes does
        scales = parts["scales"].to(torch.float32)
        matrix = scales.new_empty(spec.shape[::-1] if spec.transposed else spec.shape, dtype=spec.dtype)
    else:
        size = math.prod(spec.shape)
        # bitsandbytes' CPU kernel takes the wrong scales where a row is not a whole number of blocks (0.50.2)
        rows = (size // _BLOCK, _BLOCK) if size % _BLOCK == 0 else (1, size)
        functional = import_bitsandbytes()
        codebook, scale_codebook = _nf4_codebooks(parts["codes"].device)
        scale_state = functional.QuantState(
            absmax=parts["scales_of_scales"], code=scale_codebook, blocksize=_OUTER, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=parts["scales"], shape=torch.Size(rows), code=codebook, blocksize=_BLOCK, quant_type="nf4",
            dtype=spec.dtype, offset=parts["offset"][0], state2=scale_state,
        )  # fmt: skip
        matrix = functional.dequantize_4bit(parts["codes"], state)
    if spec.transposed:
        return matrix.view(spec.shape[::-1]).t().contiguous()
    return matrix.view(spec.shape)


def check_quantisable(blocks: Iterable[nn.Module], precision: Precision) -> str:
    """Return, as a sentence for the log, how many parameters of ``blocks`` can be quantised.

    Raises:
        ModelError: fewer than half can; names the modules that hold the rest.
    """
    quantised, rest = 0, Counter[str]()
    for block in blocks:
        specs = quantisable(block, precision)
        quantised += sum(math.prod(spec.shape) for spec in specs.values())
        for name, parameter in block.named_parameters():
            if name not in specs:
                rest[type(block.get_submodule(name.rpartition(".")[0])).__name__] += parameter.numel()
    total = quantised + rest.total()
    left = ", ".join(f"{name} {size:,}" for name, size in rest.most_common(5)) or "nothing"
    if 2 * quantised < total:
        raise ModelError(
            f"prefix.precision: {precision} can quantise {quantised:,} of the {total:,} parameters of the frozen "
            f"blocks; the rest is in {left}. Expected nn.Linear, Conv1D or stacked experts; write prefix.precision: "
            "model, and prefix.placement: cpu if memory is short"
        )
    return f"prefix in {precision}: {quantised:,} of {total:,} parameters of the frozen blocks, all but those in {left}"


@cache
def _nf4_codebooks(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the [16] values of nf4's codes, and the [256] values of the codes of its scales."""
    functional = import_bitsandbytes()
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)


@cache
def import_bitsandbytes() -> ModuleType:
    """Import and return bitsandbytes.functional, which only quantised weights and 8-bit optimizers need."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.ERROR)  # it warns of a missing package for 4-bit products, which are not used here
    import bitsandbytes.functional

    return bitsandbytes.functional

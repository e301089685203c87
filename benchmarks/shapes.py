"""Models of random weights: directories that ``from_pretrained`` loads, written a block at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama in bfloat16 with a head of its own."""

    hidden: int
    blocks: int
    heads: int
    key_heads: int
    feed_forward: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        """Return the configuration of transformers."""
        return LlamaConfig(
            hidden_size=self.hidden, num_hidden_layers=self.blocks, num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads, intermediate_size=self.feed_forward, vocab_size=self.vocabulary,
            max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip

    def block(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of each tensor of a block."""
        keys, wide, narrow = self.key_heads * self.hidden // self.heads, self.feed_forward, self.hidden
        return {
            "input_layernorm": (narrow,), "post_attention_layernorm": (narrow,),
            "self_attn.q_proj": (narrow, narrow), "self_attn.k_proj": (keys, narrow),
            "self_attn.v_proj": (keys, narrow), "self_attn.o_proj": (narrow, narrow),
            "mlp.gate_proj": (wide, narrow), "mlp.up_proj": (wide, narrow), "mlp.down_proj": (narrow, wide),
        }  # fmt: skip

    @property
    def bytes(self) -> int:
        """Return the bytes of all weights."""
        block = sum(torch.Size(shape).numel() for shape in self.block().values())
        return 2 * (self.blocks * block + 2 * self.vocabulary * self.hidden + self.hidden)


TINY = Shape(32, 6, 4, 2, 64, 49_152)
SMOLLM2_135M = Shape(576, 30, 9, 3, 1536, 49_152)
EXAONE_2_4B = Shape(2560, 30, 32, 8, 7168, 102_400)
EXAONE_32B = Shape(5120, 64, 40, 8, 27_392, 102_400)


def named_shape(name: str) -> Shape:
    """Return the shape that ``--shape`` names.

    Raises:
        SystemExit: ``larger-than-gpu`` without a GPU.
    """
    if name != "larger-than-gpu":
        return {"tiny": TINY, "smollm2-135m": SMOLLM2_135M, "exaone-2.4b": EXAONE_2_4B}[name]
    if not torch.cuda.is_available():
        raise SystemExit("--shape larger-than-gpu is made from the memory of a GPU; this machine has none")
    return larger_than(EXAONE_2_4B, torch.cuda.get_device_properties(0).total_memory)


def larger_than(shape: Shape, memory: int) -> Shape:
    """Return ``shape`` with so many blocks that its weights are a tenth larger than ``memory`` bytes."""
    one_more = replace(shape, blocks=shape.blocks + 1).bytes - shape.bytes
    ends = shape.bytes - shape.blocks * one_more
    return replace(shape, blocks=max(shape.blocks, -(-(memory * 11 // 10 - ends) // one_more)))


def write_model(shape: Shape, directory: Path, hollow: int = 0) -> None:
    """Write a model of ``shape``, normally distributed as Llama starts, into ``directory``, without its tokenizer.

    Args:
        shape: its sizes.
        directory: is created.
        hollow: the matrices of so many blocks from the bottom are zeros that take no room on the disk, for models
            larger than it; such a block passes its input on, and costs as much to run as any other.
    """
    directory.mkdir(parents=True)
    shape.config().save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for number, (names, empty) in enumerate(_parts(shape, hollow)):
        path = directory / f"model-{number:05}.safetensors"
        if empty:
            _write_zeros(names, path)
        else:
            save_file({name: _values(size, generator) for name, size in names.items()}, path, {"format": "pt"})
        files |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _parts(shape: Shape, hollow: int) -> Iterator[tuple[dict[str, tuple[int, ...]], bool]]:
    """Yield the tensors of each file, and whether it is hollow."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    ends: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (shape.vocabulary, shape.hidden))
    norms = {"model.norm.weight": (shape.hidden,)}
    for block in range(shape.blocks):
        tensors = {f"model.layers.{block}.{name}.weight": size for name, size in shape.block().items()}
        norms |= {name: size for name, size in tensors.items() if len(size) == 1}
        yield {name: size for name, size in tensors.items() if len(size) > 1}, block < hollow
    yield {**ends, **norms}, False


def _values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def _write_zeros(tensors: dict[str, tuple[int, ...]], path: Path) -> None:
    """Write a safetensors file whose data is a hole: 8 bytes of header length, header, and nothing up to its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

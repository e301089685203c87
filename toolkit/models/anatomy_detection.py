"""Find the parts of a causal language model by structure, not by a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from toolkit.models.anatomy import Anatomy, Component, Part, TensorInfo
from toolkit.models.probe import probe_blocks
from toolkit.runtime.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CANONICAL_ORDER: dict[Part, int] = {"embeddings": 0, "block": 1, "norm": 2, "head": 3, "other": 4}
"""Rank by which the canonical name of a tied tensor is chosen: training it changes all parts from there on."""


def detect_anatomy(model: PreTrainedModel) -> Anatomy:
    """Describe the parts of ``model``.

    The head is what the model calls its output embeddings. The blocks are the outermost module list that holds most
    parameters. The final norm is what follows the blocks in their parent and holds vectors only. Every embedding table
    beside the blocks (tokens, learned positions) belongs to the embeddings.

    Raises:
        ModelError: the model has no head or no list of blocks, so it is not a causal language model.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head; "
            "expected a causal language model such as LlamaForCausalLM"
        )
    names = {module: name for name, module in model.named_modules()}
    blocks = _find_blocks(model)
    if blocks is None:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks; expected a decoder-only model")
    norm = _find_norm(model, names[blocks], head)
    in_blocks_or_head = tuple(f"{names[part]}." for part in (blocks, head))
    embeddings = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not f"{name}.".startswith(in_blocks_or_head)
    )
    parts: list[tuple[str, Part]] = [(names[blocks], "block"), (names[head], "head")]
    parts += [(name, "embeddings") for name in embeddings]
    if norm is not None:
        parts.append((names[norm], "norm"))
    return Anatomy(
        embeddings=embeddings,
        blocks=names[blocks],
        block_count=len(blocks),
        norm=names[norm] if norm is not None else None,
        head=names[head],
        tensors=_describe_tensors(model, names[blocks], parts),
    )


def _find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """Return the outermost module list with most parameters (experts of a mixture are lists inside a block)."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    ]
    return max(outermost, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def _find_norm(model: nn.Module, blocks: str, head: nn.Module) -> nn.Module | None:
    """Find the module beside the blocks that follows the last of them and holds vectors only.

    If there is one such module and it is registered after the blocks, it is the final norm. If there are several (one
    may be for the embeddings), or the one is registered before the blocks (OPT), a forward pass over two tokens
    decides. A norm without parameters gives None: nothing of it can train, and the model may call it in several places.
    """
    parent, _, list_name = blocks.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    list_index = [name for name, _ in children].index(list_name)
    norms = {index: child for index, (_, child) in enumerate(children) if child is not head and _holds_vectors(child)}
    if len(norms) == 1 and max(norms) > list_index:
        return norms[max(norms)]
    if not norms:
        return None
    last_block = list(model.get_submodule(blocks).children())[-1]
    calls = [module for module, _ in probe_blocks(model, [last_block, *norms.values()])]
    last_call = max((index for index, module in enumerate(calls) if module is last_block), default=len(calls))
    return next(iter(calls[last_call + 1 :]), None)


def _holds_vectors(module: nn.Module) -> bool:
    """Return True if the module has parameters, and no matrix among them."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim <= 1 for parameter in parameters)


def _describe_tensors(model: nn.Module, blocks: str, parts: list[tuple[str, Part]]) -> tuple[TensorInfo, ...]:
    """Describe every parameter name; ``_CANONICAL_ORDER`` decides which name of a tied tensor is canonical."""
    named = list(model.named_parameters(remove_duplicate=False))
    part_of: dict[str, Part] = {
        name: next((part for module, part in parts if name.startswith(f"{module}.")), "other") for name, _ in named
    }
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    canonical = {key: min(shared, key=lambda name: _CANONICAL_ORDER[part_of[name]]) for key, shared in names.items()}
    block_of = {name: int(name[len(blocks) + 1 :].split(".")[0]) for name, part in part_of.items() if part == "block"}
    return tuple(
        TensorInfo(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            part=part_of[name],
            block=block_of.get(name),
            component=_component_of(model, blocks, block_of[name], name) if name in block_of else None,
            alias_of=None if canonical[id(parameter)] == name else canonical[id(parameter)],
        )
        for name, parameter in named
    )


def _component_of(model: nn.Module, blocks: str, block: int, name: str) -> Component | None:
    """Return the part of its block that a tensor belongs to.

    A vector in a module whose class is called a norm is one of the norms, those within attention (of queries and keys)
    included. All else goes by the block's child that holds it. None is for a parameter of the block itself, and for a
    child that mixes tokens by other means than attention (Mamba, convolutions).
    """
    holder = model.get_submodule(name.rpartition(".")[0])
    if "norm" in type(holder).__name__.lower() and all(p.ndim <= 1 for p in holder.parameters()):
        return "norms"
    child = name[len(f"{blocks}.{block}.") :].split(".")[0]
    if "attn" in child or "attention" in child:
        return "attention"
    module = model.get_submodule(f"{blocks}.{block}")._modules.get(child)
    if module is None:  # the tensor stands in the block itself
        return None
    mixes_tokens = any(
        word in type(module).__name__.lower() for word in ("mamba", "conv", "mixer", "recurrent", "rwkv")
    )
    return None if mixes_tokens else "mlp"

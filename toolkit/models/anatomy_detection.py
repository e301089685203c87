"""Find the parts of a causal language model by structure, not by a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

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
    names = {module: name for name, module in model.named_modules()}
    head_module, blocks_module = model.get_output_embeddings(), _find_blocks(model)
    if head_module is None:
        raise ModelError(
            f"{type(model).__name__} has no language-model head; "
            "expected a causal language model such as LlamaForCausalLM"
        )
    if blocks_module is None:
        raise ModelError(f"{type(model).__name__} has no list of transformer blocks; expected a decoder-only model")
    head, blocks = names[head_module], names[blocks_module]
    norm_module = _find_norm(model, blocks, head_module)
    norm = None if norm_module is None else names[norm_module]
    embeddings = tuple(
        name
        for module, name in names.items()
        if isinstance(module, nn.Embedding) and not f"{name}.".startswith((f"{blocks}.", f"{head}."))
    )
    parts: list[tuple[str, Part]] = [(blocks, "block"), (head, "head"), *((name, "embeddings") for name in embeddings)]
    if norm is not None:
        parts.append((norm, "norm"))
    tensors = _describe_tensors(model, blocks, parts)
    table = names.get(model.get_input_embeddings())
    return Anatomy(embeddings, blocks, len(blocks_module), norm, head, tensors, token_table=table)


def _find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """Return the outermost module list with most parameters (experts of a mixture are lists inside a block)."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outermost, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def _find_norm(model: nn.Module, blocks: str, head: nn.Module) -> nn.Module | None:
    """Find the module beside the blocks that follows the last of them and holds vectors only.

    If there is one such module and it is registered after the blocks, it is the final norm. A forward pass over two
    tokens decides if there are several, or the one is registered before the blocks (OPT) or named after the embeddings
    (BART's ``layernorm_embedding``). A norm without parameters gives None: nothing of it can train, and the model may
    call it in several places.
    """
    parent, _, blocks_name = blocks.rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    norms = {name: child for name, child in children.items() if child is not head and _holds_vectors(child)}
    if not norms:
        return None
    *others, last = norms
    if not others and "emb" not in last and list(children).index(last) > list(children).index(blocks_name):
        return norms[last]
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
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named:
        names.setdefault(parameter, []).append(name)
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
            linear=_linear_features(model, name),
            alias_of=None if canonical[parameter] == name else canonical[parameter],
        )
        for name, parameter in named
    )


def _linear_features(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return input and output features if ``name`` is the weight of a linear layer (GPT-2's Conv1D is one)."""
    module, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module)
    is_router = "router" in type(layer).__name__.lower()  # a Linear by class that returns a tuple (Llama 4, PhiMoE)
    if leaf != "weight" or not isinstance(layer, (nn.Linear, Conv1D)) or is_router:
        return None
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


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
    if module is None:  # a parameter of the block itself
        return None
    class_name = type(module).__name__.lower()
    mixes_tokens = any(word in class_name for word in ("mamba", "conv", "mixer", "recurrent", "rwkv"))
    return None if mixes_tokens else "mlp"

"""Find the parts of a causal language model by structure, not by a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from toolkit.models.anatomy import Anatomy, Component, Part, TensorInfo
from toolkit.models.probe import probe_blocks
from toolkit.runtime.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RANK: dict[Part, int] = {"embeddings": 0, "block": 1, "norm": 2, "head": 3, "other": 4}
"""Which name of a shared tensor is its own: the lowest part decides what training it changes."""


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
    inside = tuple(f"{names[part]}." for part in (blocks, head))
    embeddings = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not f"{name}.".startswith(inside)
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

    One that is registered after the blocks and alone of its kind is taken at its word. Where there are several (one may
    be for the embeddings), or one before the blocks (OPT), a pass over two tokens decides. A norm without parameters is
    none: nothing of it can train, and it may serve in several places.
    """
    parent, _, own = blocks.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    place = [name for name, _ in children].index(own)
    norms = {index: child for index, (_, child) in enumerate(children) if child is not head and _holds_vectors(child)}
    if len(norms) == 1 and max(norms) > place:
        return norms[max(norms)]
    if not norms:
        return None
    last_block = list(model.get_submodule(blocks).children())[-1]
    calls = [module for module, _ in probe_blocks(model, [last_block, *norms.values()])]
    last_call = max((index for index, module in enumerate(calls) if module is last_block), default=len(calls))
    return next(iter(calls[last_call + 1 :]), None)


def _holds_vectors(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim <= 1 for parameter in parameters)


def _describe_tensors(model: nn.Module, blocks: str, parts: list[tuple[str, Part]]) -> tuple[TensorInfo, ...]:
    """Describe every parameter; a tensor's own name is the first one in the embeddings, else the blocks, and so on."""
    named = list(model.named_parameters(remove_duplicate=False))
    part_of: dict[str, Part] = {
        name: next((part for module, part in parts if name.startswith(f"{module}.")), "other") for name, _ in named
    }
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    own = {key: min(shared, key=lambda name: _RANK[part_of[name]]) for key, shared in names.items()}
    index = {name: int(name[len(blocks) + 1 :].split(".")[0]) for name, part in part_of.items() if part == "block"}
    return tuple(
        TensorInfo(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            part=part_of[name],
            block=index.get(name),
            component=_component(model, blocks, index[name], name) if name in index else None,
            alias_of=None if own[id(parameter)] == name else own[id(parameter)],
        )
        for name, parameter in named
    )


def _component(model: nn.Module, blocks: str, block: int, name: str) -> Component | None:
    """Return the part of its block that a tensor is in: a norm in a module without matrices, else by its name.

    A norm within the attention, as of queries and keys, is one of the norms.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    if "norm" in type(owner).__name__.lower() and all(p.ndim <= 1 for p in owner.parameters()):
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

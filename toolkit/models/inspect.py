"""Find the parts of a causal language model by structure, not by a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from toolkit.errors import ModelError
from toolkit.models.anatomy import Anatomy, Component, Part, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inspect(model: PreTrainedModel) -> Anatomy:
    """Describe the parts of ``model``.

    The head is what the model calls its output embeddings. The blocks are the outermost module list that holds most
    parameters. The final norm is what follows the blocks in their parent and holds no matrix. Every embedding table
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
    """The outermost module list with most parameters (experts of a mixture are lists inside a block)."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    ]
    return max(outermost, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def _find_norm(model: nn.Module, blocks: str, head: nn.Module) -> nn.Module | None:
    parent = model.get_submodule(blocks.rpartition(".")[0])
    children = list(parent.named_children())
    own = blocks.rpartition(".")[2]
    after = [child for _, child in children[[name for name, _ in children].index(own) + 1 :] if child is not head]
    for child in after:
        parameters = list(child.parameters())
        if parameters and all(parameter.ndim <= 1 for parameter in parameters):
            return child
    for child in after:  # a norm without parameters, as in the first OLMo
        if not any(True for _ in child.parameters()) and not any(True for _ in child.buffers()):
            return child
    return None


def _describe_tensors(model: nn.Module, blocks: str, parts: list[tuple[str, Part]]) -> tuple[TensorInfo, ...]:
    first_name: dict[int, str] = {}
    described = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part: Part = next((part for prefix, part in parts if name.startswith(f"{prefix}.")), "other")
        canonical = first_name.setdefault(id(parameter), name)
        block = int(name[len(blocks) + 1 :].split(".")[0]) if part == "block" else None
        described.append(
            TensorInfo(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                part=part,
                block=block,
                component=None if block is None else _component(model, blocks, block, name),
                alias_of=None if canonical == name else canonical,
            )
        )
    return tuple(described)


def _component(model: nn.Module, blocks: str, block: int, name: str) -> Component | None:
    """The part of its block that a tensor is in: in a module without matrices a norm, else by what the block calls it.

    A norm within the attention, as of queries and keys, is one of the norms.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    if "norm" in type(owner).__name__.lower() and all(p.ndim <= 1 for p in owner.parameters()):
        return "norms"
    child = name[len(f"{blocks}.{block}.") :].split(".")[0]
    if "attn" in child or "attention" in child:
        return "attention"
    module = model.get_submodule(f"{blocks}.{block}").get_submodule(child)
    mixes_tokens = any(
        word in type(module).__name__.lower() for word in ("mamba", "conv", "mixer", "recurrent", "rwkv")
    )
    return None if mixes_tokens else "mlp"

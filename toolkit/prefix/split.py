"""Cut a model at the frost line into a frozen prefix and a trained suffix.

Both halves are copies of the model's skeleton that share its parameters. In the prefix, what lies above the line is
gone; in the suffix, the blocks below it are pass-throughs without parameters and the embeddings are a stub, so
autograd, the optimizer, ZeRO and a checkpoint never see them. ``suffix(prefix(batch), batch)`` computes what the whole
model computes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.models.anatomy import Anatomy


class Prefix(nn.Module):
    """Embeddings and blocks 0 … b-1: token ids to ``hidden[b]``, without gradients."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, boundary: int) -> None:
        """
        Args:
            model: the whole model, its mask already applied.
            anatomy: its parts.
            boundary: b, from 0 to the number of blocks; at 0 it is the embeddings alone.
        """  # noqa: D205, D212
        super().__init__()
        blocks = list(model.get_submodule(anatomy.blocks).children())
        entry = _entry(model, anatomy, boundary)
        replaced: dict[nn.Module, nn.Module] = {block: _Absent(block) for block in blocks[boundary:]}
        for above in filter(None, (anatomy.norm, anatomy.head)):
            replaced[model.get_submodule(above)] = _Absent()
        replaced[entry] = _Arrival(entry)
        self.skeleton = _skeleton(model, replaced, own_parameters=True)

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, T, hidden_size] that enter block b (or the final norm, where b is the block count)."""
        try:
            self.skeleton(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        except _Arrived as arrived:
            return arrived.hidden
        raise RuntimeError("the prefix never reached the frost line")


class Suffix(nn.Module):
    """Blocks b … n-1, norm and head: ``hidden[b]`` to logits at the supervised positions.

    With no prefix it is the whole model and starts from token ids.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None) -> None:
        """
        Args:
            model: the whole model, its mask already applied.
            anatomy: its parts.
            boundary: b, from 0 to the number of blocks; none keeps the model whole.
        """  # noqa: D205, D212
        super().__init__()
        replaced: dict[nn.Module, nn.Module] = {}
        if boundary is not None:
            head = model.get_submodule(anatomy.head)
            for block in list(model.get_submodule(anatomy.blocks).children())[:boundary]:
                replaced[block] = _PassThrough(block)
            for name in anatomy.embeddings:
                table = model.get_submodule(name)
                if getattr(table, "weight", None) is not head.weight:
                    replaced[table] = _EmbeddingStub(table)
        self.model = _skeleton(model, replaced)
        self._blocks = anatomy.blocks
        self._embedding_size = int(model.get_input_embeddings().weight.shape[1])
        self._hidden: torch.Tensor | None = None
        self._supervised: torch.Tensor | None = None
        if boundary is not None:
            _entry(self.model, anatomy, boundary).register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.get_submodule(anatomy.head).register_forward_pre_hook(self._keep_supervised)

    def blocks(self, first: int) -> list[nn.Module]:
        """The blocks from index ``first`` on, counted in the whole model."""
        return list(self.model.get_submodule(self._blocks).children())[first:]

    def detach_embeddings(self, anatomy: Anatomy) -> None:
        """Let no gradient through the embeddings of a model that was kept whole."""
        for name in anatomy.embeddings:
            self.model.get_submodule(name).register_forward_hook(lambda module, args, output: output.detach())

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Logits of the S supervised positions.

        Args:
            hidden: [B, T, hidden_size] from the prefix; none where there is no prefix.
            batch: token ids, attention mask and supervised positions.

        Returns:
            [S, vocabulary] in the model's dtype.
        """
        self._hidden, self._supervised = hidden, batch.supervised
        if hidden is None:
            inputs = {"input_ids": batch.input_ids}
        else:  # only the shape counts: _enter puts hidden in at the frost line
            inputs = {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], self._embedding_size)}
        try:
            output = self.model(**inputs, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            self._hidden = self._supervised = None
        logits: torch.Tensor = output.logits
        return logits.squeeze(0)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Put ``hidden[b]`` in; what came before it was only a carrier of the right shape."""
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}

    def _keep_supervised(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let the head see the supervised positions alone: [B, T, hidden_size] to [1, S, hidden_size]."""
        return (args[0][self._supervised].unsqueeze(0), *args[1:])


def split(model: PreTrainedModel, anatomy: Anatomy, boundary: int | None) -> tuple[Prefix | None, Suffix]:
    """Cut ``model`` below block ``boundary``; none keeps it whole, in a suffix without a prefix."""
    prefix = Prefix(model, anatomy, boundary) if boundary is not None else None
    return prefix, Suffix(model, anatomy, boundary)


@torch.no_grad()
def split_is_exact(model: PreTrainedModel, prefix: Prefix, suffix: Suffix, batch: Batch) -> bool:
    """True if the split model gives the whole model's logits on ``batch`` as exactly as the whole model repeats them.

    Some architectures read the token ids, or the first block's output, again above the line; they cannot be cut.
    """
    parts = (model, prefix, suffix)
    modes = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        whole, again = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            .logits[batch.supervised]
            .float()
            for _ in range(2)
        )
        cut = suffix(prefix(batch), batch).float()
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return False  # the architecture looked for something that the cut removed
    finally:
        for module, mode in modes.items():
            module.training = mode
    noise = (whole - again).abs().max()  # 0, but for kernels that add up in no fixed order
    return whole.shape == cut.shape and bool(((whole - cut).abs() <= noise).all())


def _entry(model: nn.Module, anatomy: Anatomy, boundary: int) -> nn.Module:
    """The first module above the line."""
    if boundary < anatomy.block_count:
        return model.get_submodule(f"{anatomy.blocks}.{boundary}")
    return model.get_submodule(anatomy.norm or anatomy.head)


def _skeleton(
    model: PreTrainedModel, replaced: dict[nn.Module, nn.Module], own_parameters: bool = False
) -> PreTrainedModel:
    """A copy of ``model`` with other modules in some places, which shares the model's storage but no module.

    Args:
        model: is not changed.
        replaced: modules of ``model`` and what stands in their places in the copy.
        own_parameters: parameter objects of its own on the same storage, out of reach of ZeRO-3, which empties those
            it is given (a frozen tied table is in both halves).
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if own_parameters:
        shared |= {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    shared[id(model.config)] = model.config
    shared |= {id(old): new for old, new in replaced.items()}
    return copy.deepcopy(model, shared)


class _Arrived(Exception):
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class _Stand(nn.Module):
    """Stands where a module was and lends its plain attributes (attention_type, layer_idx), without its parameters."""

    def __init__(self, original: nn.Module | None = None) -> None:
        super().__init__()
        own = set(vars(self))
        for name, value in vars(original).items() if original is not None else ():
            if name not in own and not isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value)


class _Absent(_Stand):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the prefix ran past the frost line")


class _Arrival(_Stand):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Arrived(hidden_states)


class _PassThrough(_Stand):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class _EmbeddingStub(_Stand):
    """In place of an embedding table; what it gives is replaced at the frost line."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__(table)
        self.register_buffer("weight", torch.empty(0, dtype=next(table.parameters()).dtype), persistent=False)

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=ids.device)

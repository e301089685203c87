"""The trained suffix, and the cut of a model at the frost line into a frozen prefix and a trained suffix.

Both halves are copies of the model's module tree that share its parameters. In the prefix, what lies above the line is
gone; in the suffix, the blocks below it are pass-throughs without parameters and the embeddings are a stub, so
autograd, the optimizer, ZeRO and a checkpoint never see them. ``suffix(prefix(batch), batch)`` computes what the whole
model computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.frozen.weight_offload import FrozenWeights
from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import evaluating
from toolkit.models.rotary import needs_lengths
from toolkit.split.logit_processing import FAILURES
from toolkit.split.loss_head import LossHead, Shortcuts
from toolkit.split.module_tree import EmbeddingStub, PassThrough, copy_module_tree, entry_module
from toolkit.split.prefix import Prefix
from toolkit.split.supervised_loss import cross_entropy


class Suffix(nn.Module):
    """Blocks b … n-1, norm, head and loss: ``hidden[b]`` to the cross entropy of the supervised positions.

    With no prefix it is the whole model and starts from token ids. It computes logits and their loss plainly until
    ``choose_shortcuts`` has found on a batch which short cuts hold.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None, returned: Sequence[int | None] = ()
    ) -> None:
        """
        Args:
            model: the whole model, its mask already applied.
            anatomy: its parts.
            boundary: b, from 0 to the number of blocks; none keeps the model whole.
            returned: what ``Prefix.returned`` found for the b blocks below the line.
        """  # noqa: D205, D212
        super().__init__()
        replaced: dict[nn.Module, nn.Module] = {}
        if boundary is not None:
            head = model.get_submodule(anatomy.head)
            below = list(model.get_submodule(anatomy.blocks).children())[:boundary]
            replaced |= {block: PassThrough(block, form) for block, form in zip(below, returned, strict=True)}
            for name in anatomy.embeddings:
                table = model.get_submodule(name)
                if getattr(table, "weight", None) is not head.weight:
                    replaced[table] = EmbeddingStub(table)
        self.model = copy_module_tree(model, replaced)
        self.anatomy = anatomy
        self._embedding_size = int(model.get_input_embeddings().weight.shape[1])
        self._with_lengths = needs_lengths(model)
        self._hidden: torch.Tensor | None = None
        if boundary is not None:
            entry_module(self.model, anatomy, boundary).register_forward_pre_hook(self._enter, with_kwargs=True)
        self._top = LossHead(model, self.model, anatomy, boundary or 0)

    @property
    def shortcuts(self) -> Shortcuts:
        """What is saved of the work above the last attention; see ``choose_shortcuts``."""
        return self._top.shortcuts

    def blocks(self, first: int) -> list[nn.Module]:
        """The blocks from index ``first`` on, counted in the whole model."""
        return list(self.model.get_submodule(self.anatomy.blocks).children())[first:]

    def detach_embeddings(self, anatomy: Anatomy) -> None:
        """Let no gradient through the embeddings of a model that was kept whole."""
        for name in anatomy.embeddings:
            self.model.get_submodule(name).register_forward_hook(lambda module, args, output: output.detach())

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Cross entropy summed over the S supervised positions, a float32 scalar.

        Args:
            hidden: [B, T, hidden_size] from the prefix; none where there is no prefix.
            batch: token ids, attention mask, supervised positions and their targets.
        """
        with self._top.loss_of(batch) as found:
            output = self._run(hidden, batch)
        if found:
            return found[0].view(())
        return cross_entropy(output.logits.squeeze(0), batch.targets)

    def logits(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Logits [S, vocabulary] of the supervised positions in the model's dtype, without any short cut."""
        with self._top.logits_of(batch):
            logits: torch.Tensor = self._run(hidden, batch).logits
        return logits.squeeze(0)

    def choose_shortcuts(self, hidden: torch.Tensor | None, batch: Batch) -> Shortcuts:
        """Take those short cuts, one after the other, that give the loss of plain logits on ``batch`` up to rounding.

        Args:
            hidden: as for ``forward``.
            batch: one short row does; an MLP that looked at other positions would miss them there too.

        Returns:
            What is taken from now on.
        """
        tokens = len(batch.targets)
        self._top.shortcuts = chosen = Shortcuts()
        with evaluating(self):
            plain = float(self(hidden, batch)) / tokens
            allowed = max(10 * torch.finfo(next(self.parameters()).dtype).eps, 1e-5) * max(1.0, plain)
            for name in (field.name for field in fields(chosen) if getattr(self._top.possible, field.name)):
                self._top.shortcuts = replace(chosen, **{name: True})
                with contextlib.suppress(*FAILURES):
                    if abs(float(self(hidden, batch)) / tokens - plain) <= allowed:
                        chosen = self.shortcuts
        self._top.shortcuts = chosen
        return chosen

    def take(self, chosen: Shortcuts) -> None:
        """Take of ``chosen`` what the structure allows; for a rehearsal without weights, where none can be tried."""
        possible = self._top.possible
        self._top.shortcuts = Shortcuts(
            *(getattr(chosen, field.name) and getattr(possible, field.name) for field in fields(chosen))
        )

    def _run(self, hidden: torch.Tensor | None, batch: Batch) -> Any:
        self._hidden = hidden
        if hidden is None:
            inputs = {"input_ids": batch.input_ids}
        else:  # only the shape counts: _enter puts hidden in at the frost line
            inputs = {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], self._embedding_size)}
        try:
            return self.model(**inputs, **batch.layout(self._with_lengths), use_cache=False)
        finally:
            self._hidden = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Put ``hidden[b]`` in; what came before it was only a carrier of the right shape."""
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}


def split(
    model: PreTrainedModel, anatomy: Anatomy, boundary: int | None, frozen: FrozenWeights | None = None
) -> tuple[Prefix | None, Suffix]:
    """Cut ``model`` below block ``boundary``; none keeps it whole, in a suffix without a prefix.

    ``frozen`` are weights that were taken out of the model for the prefix to borrow.
    """
    if boundary is None:
        return None, Suffix(model, anatomy, None)
    prefix = Prefix(model, anatomy, boundary, frozen)
    return prefix, Suffix(model, anatomy, boundary, prefix.returned())


def split_is_exact(model: PreTrainedModel, prefix: Prefix, suffix: Suffix, batch: Batch) -> bool:
    """True if the split model gives the whole model's logits on ``batch`` as exactly as the whole model repeats them.

    Some architectures read the token ids, or the first block's output, again above the line; they cannot be cut.
    """
    uncut = Suffix(model, suffix.anatomy, None)  # gives its head the same positions: other shapes may round otherwise
    for unit in prefix.frozen.units if prefix.frozen is not None else ():  # the whole model borrows the same weights
        uncut.model.set_submodule(unit.module, prefix.skeleton.get_submodule(unit.module))
    with evaluating(model, prefix, suffix, uncut):
        try:
            whole, again = (uncut.logits(None, batch).float() for _ in range(2))
            cut = suffix.logits(prefix(batch), batch).float()
        except FAILURES:
            return False  # the architecture looked for something that the cut removed
        noise = (whole - again).abs().max()  # 0, but for kernels that add up in no fixed order
        return whole.shape == cut.shape and bool(((whole - cut).abs() <= noise).all())

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
from toolkit.models.float32_gradients import uses_float32_gradients
from toolkit.models.probe import evaluating
from toolkit.models.rotary import needs_lengths
from toolkit.runtime.errors import ModelError
from toolkit.split.logit_processing import FAILURES, find_logit_processing
from toolkit.split.loss_head import LossHead, Shortcuts
from toolkit.split.module_tree import (
    Arrived,
    DetachedOutput,
    EndOfPass,
    copy_module_tree,
    entry_name,
    extend_class,
    final_norm,
    stand_ins_below,
    with_hidden,
)
from toolkit.split.prefix import Prefix
from toolkit.split.supervised_loss import cross_entropy
from toolkit.split.supervised_rows import RowsBlock, RowsMLP, SupervisedRows, dense_mlp

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a module's call."""

_BELOW_HEAD = {"norm": False, "mlp": False}


class Suffix(nn.Module):
    """Blocks b … n-1, norm, head and loss: ``hidden[b]`` to the cross entropy of the supervised positions.

    With no prefix it is the whole model and starts from token ids. It computes logits and their loss plainly until
    ``choose_shortcuts`` has found on a batch which short cuts hold.

    The model's own code runs the blocks, with the masks and positions that it makes. It calls its modules with
    arguments of its own, and its output is what it makes of the head's; rows, targets and a loss cannot be handed
    through it. So a pass through it ends, by an exception, at the call of the head, or of the last block where a short
    cut begins there. From that call on the modules are called from here, with rows and targets as arguments. Their
    classes are extended for this; a module around them would give their parameters other names.

    Args:
        model: the whole model, its mask already applied.
        anatomy: its parts.
        boundary: b, from 0 to the number of blocks; none keeps the model whole.
        returned: what ``Prefix.returned`` found for the b blocks below the line.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None, returned: Sequence[int | None] = ()
    ) -> None:
        super().__init__()
        replaced = {} if boundary is None else stand_ins_below(model, anatomy, boundary, returned)
        self.model = copy_module_tree(model, replaced)
        self.anatomy = anatomy
        self.shortcuts = Shortcuts()
        """What is saved of the work above the last attention; see ``choose_shortcuts``."""
        self._embedding_size = int(model.get_input_embeddings().weight.shape[1])
        self._with_lengths = needs_lengths(model)
        self._in_float32 = uses_float32_gradients(self.model)
        self._processing = find_logit_processing(model, anatomy)
        self._has_last_block = (boundary or 0) < anatomy.block_count
        self._norm = final_norm(self.model, anatomy) if self._has_last_block else anatomy.norm
        self._possible = self._extend_top()
        self._hidden: torch.Tensor | None = None
        self._entry = None if boundary is None else entry_name(anatomy, boundary)
        if self._entry is not None:
            self.model.get_submodule(self._entry).register_forward_pre_hook(self._enter, with_kwargs=True)

    def _extend_top(self) -> Shortcuts:
        """Extend the classes of the modules that are called from here, and return which short cuts that allows."""
        head, mlp = self._head, None
        tiled = (
            type(head).forward is nn.Linear.forward and self._processing is not None and self._processing.elementwise
        )
        extend_class(head, LossHead)
        if self._has_last_block:
            block = self._last_block
            mlp = dense_mlp(block, self.anatomy)
            extend_class(block, EndOfPass if mlp is None else RowsBlock)
            if mlp is not None:
                extend_class(block.get_submodule(mlp), RowsMLP)
                block.mlp_name = mlp
        if self._processing is None:
            return Shortcuts()
        return Shortcuts(tiled, norm=self._norm is not None, mlp=mlp is not None)

    @property
    def _head(self) -> Any:
        return self.model.get_submodule(self.anatomy.head)

    @property
    def _last_block(self) -> Any:
        return self.model.get_submodule(f"{self.anatomy.blocks}.{self.anatomy.block_count - 1}")

    def blocks(self, first: int) -> list[nn.Module]:
        """Return the blocks from index ``first`` on, counted in the whole model."""
        return list(self.model.get_submodule(self.anatomy.blocks).children())[first:]

    def detach_embeddings(self, anatomy: Anatomy) -> None:
        """Let no gradient through the embeddings of a model that was kept whole."""
        for name in anatomy.embeddings:
            extend_class(self.model.get_submodule(name), DetachedOutput)

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return the cross entropy summed over the S supervised positions, a float32 scalar.

        Args:
            hidden: [B, T, hidden_size] from the prefix; none where there is no prefix.
            batch: token ids, attention mask, supervised positions and their targets.
        """
        if not self.shortcuts.tiled or self._processing is None:
            return cross_entropy(self._logits(hidden, batch, self.shortcuts), batch.targets)
        args, kwargs = self._head_input(hidden, batch, self.shortcuts)
        loss: torch.Tensor = self._head(
            *args, **kwargs,
            targets=batch.targets, processing=self._processing.function, in_float32=self._in_float32,
        )  # fmt: skip
        return loss

    def logits(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return logits [S, vocabulary] of the supervised positions in the model's dtype, without any short cut."""
        return self._logits(hidden, batch, Shortcuts())

    def choose_shortcuts(self, hidden: torch.Tensor | None, batch: Batch) -> Shortcuts:
        """Take those short cuts, one after the other, that give the loss of plain logits on ``batch`` up to rounding.

        Args:
            hidden: as for ``forward``.
            batch: one short row does; an MLP that looked at other positions would miss them there too.

        Returns:
            What is taken from now on.
        """
        tokens = len(batch.targets)
        self.shortcuts = chosen = Shortcuts()
        with evaluating(self):
            plain = float(self(hidden, batch)) / tokens
            allowed = max(10 * torch.finfo(next(self.parameters()).dtype).eps, 1e-5) * max(1.0, plain)
            possible = replace(self._possible, **({} if self._norm_leads_to_head(hidden, batch) else _BELOW_HEAD))
            for name in (field.name for field in fields(chosen) if getattr(possible, field.name)):
                self.shortcuts = replace(chosen, **{name: True})
                with contextlib.suppress(*FAILURES):
                    if abs(float(self(hidden, batch)) / tokens - plain) <= allowed:
                        chosen = self.shortcuts
        self.shortcuts = chosen
        return chosen

    def take(self, chosen: Shortcuts) -> None:
        """Take of ``chosen`` what the structure allows; for a model without weights, where none can be tried."""
        self.shortcuts = Shortcuts(
            *(getattr(chosen, field.name) and getattr(self._possible, field.name) for field in fields(chosen))
        )

    def _norm_leads_to_head(self, hidden: torch.Tensor | None, batch: Batch) -> bool:
        """Return whether the head reads just what the final norm makes of the last block's output, bit for bit.

        OPT projects it, MiniCPM 3 scales it; a norm that stands elsewhere can look like the final one (BART's).
        """
        try:
            whole = Arrived(*self._run_to(self.anatomy.head, hidden, batch)).hidden
            return torch.equal(whole, self._normed(self._run_last_block(hidden, batch, None)))
        except FAILURES:
            return False

    def _logits(self, hidden: torch.Tensor | None, batch: Batch, shortcuts: Shortcuts) -> torch.Tensor:
        """Compute logits [S, vocabulary]; of all positions, where the model's code after its head is not known."""
        if self._processing is None:
            return _supervised(self._run(hidden, batch).logits, SupervisedRows.of(batch)).squeeze(0)
        args, kwargs = self._head_input(hidden, batch, shortcuts)
        output: torch.Tensor = self._head(*args, **kwargs).squeeze(0)
        return output if self._processing.function is None else self._processing.function(output)

    def _head_input(self, hidden: torch.Tensor | None, batch: Batch, shortcuts: Shortcuts) -> Call:
        """Compute the arguments of the head, with hidden states [1, S, hidden_size] of the supervised rows.

        Raises:
            ModelError: other positions enter the head than the batch has.
        """
        rows = SupervisedRows.of(batch)
        if not (shortcuts.norm or shortcuts.mlp):
            call = self._run_to(self.anatomy.head, hidden, batch)
            return with_hidden(_supervised(Arrived(*call).hidden, rows), *call)
        states = self._run_last_block(hidden, batch, rows if shortcuts.mlp else None)
        return (self._normed(rows.take(states)) if shortcuts.norm else rows.take(self._normed(states)),), {}

    def _run_last_block(
        self, hidden: torch.Tensor | None, batch: Batch, mlp_rows: SupervisedRows | None
    ) -> torch.Tensor:
        """Compute what leaves the last block, [B, T, hidden_size]; its MLP computes ``mlp_rows``, or all of them."""
        if not self._has_last_block:
            assert hidden is not None
            return hidden
        args, kwargs = self._run_to(f"{self.anatomy.blocks}.{self.anatomy.block_count - 1}", hidden, batch)
        given = {} if mlp_rows is None else {"supervised_rows": mlp_rows}
        output = self._last_block(*args, **kwargs, **given)
        states: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return states

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the final norm, if there is one; Mamba's is in float32 and rounded for the head."""
        if self._norm:
            states = self.model.get_submodule(self._norm)(states)
        return states.to(next(self._head.parameters()).dtype)

    def _run_to(self, end: str, hidden: torch.Tensor | None, batch: Batch) -> Call:
        """Run the model's own code until it calls the module named ``end``, and return the arguments of that call."""
        module: Any = self.model.get_submodule(end)
        module.ends_pass = True
        try:
            self._run(hidden, batch)
        except Arrived as arrived:
            if hidden is not None and end == self._entry:  # its hook has not run
                return with_hidden(hidden, *arrived.call)
            return arrived.call
        finally:
            module.ends_pass = False
        raise RuntimeError(f"the pass never reached {end}")

    def _run(self, hidden: torch.Tensor | None, batch: Batch) -> Any:
        """Run the model's own code, which puts ``hidden`` in at the frost line."""
        self._hidden = hidden
        if hidden is None:
            inputs = {"input_ids": batch.input_ids}
        else:  # only the shape counts: _enter puts hidden in at the frost line
            inputs = {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], self._embedding_size)}
        try:
            return self.model(**inputs, **batch.layout(self._with_lengths), use_cache=False)
        finally:
            self._hidden = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Put ``hidden[b]`` in; what came before it was only a carrier of the right shape.

        This is a hook with an attribute, because between the model's call and the block lies the model's code, which
        has no argument for hidden states at the frost line. A module that is called from here has its hidden states.
        """
        return None if self._hidden is None else with_hidden(self._hidden, args, kwargs)


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


def _supervised(states: torch.Tensor, rows: SupervisedRows) -> torch.Tensor:
    try:
        return rows.take(states)
    except TypeError as error:
        raise ModelError(f"this architecture cannot be trained: at its head, {error}") from None


def split_is_exact(model: PreTrainedModel, prefix: Prefix, suffix: Suffix, batch: Batch) -> bool:
    """Return whether the split model gives the whole model's logits on ``batch`` as exactly as that repeats them.

    Some architectures read the token ids, or the first block's output, again above the line; they cannot be cut.
    """
    uncut = Suffix(model, suffix.anatomy, None)  # gives its head the same positions: other shapes may round otherwise
    for unit in prefix.frozen.units if prefix.frozen is not None else ():  # the whole model borrows the same weights
        uncut.model.set_submodule(unit.module, prefix.model.get_submodule(unit.module))
    with evaluating(model, prefix, suffix, uncut):
        try:
            whole, again = (uncut.logits(None, batch).float() for _ in range(2))
            cut = suffix.logits(prefix(batch), batch).float()
        except FAILURES:
            return False  # the architecture looked for something that the cut removed
        noise = (whole - again).abs().max()  # 0, but for kernels that add up in no fixed order
        return whole.shape == cut.shape and bool(((whole - cut).abs() <= noise).all())

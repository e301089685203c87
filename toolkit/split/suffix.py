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
from toolkit.mask.row_layers import HeadWithRows
from toolkit.models.anatomy import Anatomy
from toolkit.models.float32_gradients import uses_float32_gradients
from toolkit.models.mask_checks import masks_without_checks
from toolkit.models.module_class import extend_class, extended_class
from toolkit.models.probe import evaluation_mode
from toolkit.models.rotary import needs_position_ids
from toolkit.runtime.errors import ModelError
from toolkit.split.logit_processing import MODEL_CODE_ERRORS, find_logit_processing
from toolkit.split.logit_tiles import kernel_text
from toolkit.split.loss_head import LossHead, Shortcuts
from toolkit.split.module_tree import (
    BlockList,
    Call,
    EndOfPass,
    StopForward,
    copy_module_tree,
    entry_name,
    final_norm,
    hidden_of,
    placeholders_below,
    with_hidden,
)
from toolkit.split.prefix import Prefix
from toolkit.split.same_computation import same_computation
from toolkit.split.supervised_loss import cross_entropy
from toolkit.split.supervised_rows import RowsBlock, RowsMLP, SupervisedRows, dense_mlp


class Suffix(nn.Module):
    """Blocks b … n-1, norm, head and loss: ``hidden[b]`` to the cross entropy of the supervised positions.

    With no prefix it is the whole model and starts from token ids. It takes no shortcut until ``choose_shortcuts`` has
    found on a batch which of them give the same loss.

    The model's own code runs the blocks, with the masks and positions that it makes. It calls its modules with
    arguments of its own, and its output is what it makes of the head's; rows, targets and a loss cannot be handed
    through it. So a pass through it ends, by an exception, at the call of the head, or of the last block where a
    shortcut begins there. From that call on the modules are called from here, with rows and targets as arguments. Their
    classes are extended for this; a module around them would give their parameters other names.

    ``boundary`` is b, from 0 to the number of blocks; None keeps the model whole. ``output_counts`` are
    ``Prefix.block_output_counts`` of the b blocks below the line.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, boundary: int | None, output_counts: Sequence[int | None] = ()
    ) -> None:
        super().__init__()
        placeholders = {} if boundary is None else placeholders_below(model, anatomy, boundary, output_counts)
        self.model = copy_module_tree(model, placeholders)
        extend_class(self.model.get_submodule(anatomy.blocks), BlockList)
        self.anatomy = anatomy
        self.cut_at = boundary, tuple(output_counts)
        """Arguments of a suffix with the same cut."""
        self.shortcuts = Shortcuts()
        """Shortcuts that are taken above the last attention; see ``choose_shortcuts``."""
        self._embedding_size = int(model.get_input_embeddings().weight.shape[1])
        self._with_position_ids = needs_position_ids(model)
        self._in_float32 = uses_float32_gradients(self.model)
        self._processing = find_logit_processing(model, anatomy)
        self._has_last_block = (boundary or 0) < anatomy.block_count
        self._norm = final_norm(self.model, anatomy) if self._has_last_block else anatomy.norm
        self._available = self._extend_top()
        self._hidden: torch.Tensor | None = None
        self._entry = None if boundary is None else entry_name(anatomy, boundary)
        if self._entry is not None:
            self.model.get_submodule(self._entry).register_forward_pre_hook(self._inject, with_kwargs=True)

    def _extend_top(self) -> Shortcuts:
        """Extend the classes of the modules that this class calls itself; return the shortcuts that this allows."""
        head, mlp = self._head, None
        plain = extended_class(head, HeadWithRows).forward is nn.Linear.forward
        tiled = plain and self._processing is not None and self._processing.elementwise
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

    def detach_embeddings(self) -> None:
        """Let no gradient into the embeddings of a model that was kept whole."""
        for name in self.anatomy.embeddings:
            embedding = self.model.get_submodule(name)
            embedding.register_forward_hook(lambda module, args, output: output.detach())

    def forward(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return the cross entropy summed over the S supervised positions, a float32 scalar.

        ``hidden`` is the prefix's [B, T, hidden_size]; None without a prefix.
        """
        if not self.shortcuts.tiled or self._processing is None:
            return cross_entropy(self.logits(hidden, batch, self.shortcuts), batch.targets)
        args, kwargs = self._head_input(hidden, batch, self.shortcuts)
        loss: torch.Tensor = self._head(
            *args, **kwargs,
            targets=batch.targets, processing=self._processing.function, in_float32=self._in_float32,
        )  # fmt: skip
        return loss

    def losses_by_row(self, hidden: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return [B] float32, the cross entropy summed over the supervised positions of each sample of ``batch``."""
        counts = [example.supervised_tokens for example in batch.examples]
        targets = torch.split(batch.targets, counts)
        if not self.shortcuts.tiled or self._processing is None:
            of_rows = torch.split(self.logits(hidden, batch, self.shortcuts), counts)
            return torch.stack([cross_entropy(*row) for row in zip(of_rows, targets, strict=True)])
        (states, *args), kwargs = self._head_input(hidden, batch, self.shortcuts)
        own = {"processing": self._processing.function, "in_float32": self._in_float32}
        of_rows = torch.split(states, counts, dim=1)
        losses = [
            self._head(row, *args, **kwargs, targets=of_row, **own)
            for row, of_row in zip(of_rows, targets, strict=True)
        ]  # fmt: skip
        return torch.stack(losses)

    @property
    def loss_text(self) -> str:
        """Describe for the log how the loss is computed: the shortcuts that are taken, and on a GPU by what."""
        tiled, device = self.shortcuts.tiled and self._processing, next(self.parameters()).device
        return self.shortcuts.text + (kernel_text(device, tiled.function) if tiled else "")

    def logits(self, hidden: torch.Tensor | None, batch: Batch, shortcuts: Shortcuts = Shortcuts()) -> torch.Tensor:
        """Return logits [S, vocabulary] of the supervised positions, in the model's dtype."""
        if self._processing is None:  # the model's code after its head is unknown: take the logits of all positions
            return _take_supervised(self._run_model(hidden, batch).logits, SupervisedRows.of(batch)).squeeze(0)
        args, kwargs = self._head_input(hidden, batch, shortcuts)
        output: torch.Tensor = self._head(*args, **kwargs).squeeze(0)
        return output if self._processing.function is None else self._processing.function(output)

    def choose_shortcuts(self, hidden: torch.Tensor | None, batch: Batch) -> Shortcuts:
        """Take from now on, and return, the shortcuts that give the loss of plain logits on ``batch`` up to rounding.

        One short row will do: an MLP that reads other positions too differs there as well. On the meta device, where a
        loss has no value, those are taken that the model's code runs with.
        """

        def mean_loss() -> float:
            loss = self(hidden, batch)
            return 0.0 if loss.is_meta else float(loss) / len(batch.targets)

        self.shortcuts = exact = Shortcuts()
        with evaluation_mode(self):
            plain_loss = mean_loss()
            tolerance = max(10 * torch.finfo(next(self.parameters()).dtype).eps, 1e-5) * max(1.0, plain_loss)
            candidates = self._available
            if not self._norm_leads_to_head(hidden, batch):
                candidates = Shortcuts(tiled=candidates.tiled)
            for name in (field.name for field in fields(exact) if getattr(candidates, field.name)):
                self.shortcuts = replace(exact, **{name: True})
                with contextlib.suppress(*MODEL_CODE_ERRORS):
                    if abs(mean_loss() - plain_loss) <= tolerance:
                        exact = self.shortcuts
        self.shortcuts = exact
        return exact

    def _norm_leads_to_head(self, hidden: torch.Tensor | None, batch: Batch) -> bool:
        """Return whether the head's input is the final norm of the last block's output, bit for bit.

        OPT projects it, MiniCPM 3 scales it; a norm elsewhere can look like the final one (BART's).
        """
        on_meta = batch.input_ids.is_meta
        if on_meta and not self._has_last_block:  # no pass of the model's own code ends at a norm, to compare with
            return True
        try:
            return same_computation(
                lambda: hidden_of(*self._run_until(self.anatomy.head, hidden, batch)),
                lambda: self._apply_norm(self._run_last_block(hidden, batch, None)),
                on_meta,
            )
        except MODEL_CODE_ERRORS:
            return False

    def _head_input(self, hidden: torch.Tensor | None, batch: Batch, shortcuts: Shortcuts) -> Call:
        """Compute the head's arguments, with hidden states [1, S, hidden_size] of the supervised positions."""
        rows = SupervisedRows.of(batch)
        if not (shortcuts.norm or shortcuts.mlp):
            call = self._run_until(self.anatomy.head, hidden, batch)
            return with_hidden(_take_supervised(hidden_of(*call), rows), *call)
        states = self._run_last_block(hidden, batch, rows if shortcuts.mlp else None)
        return (self._apply_norm(rows.take(states)) if shortcuts.norm else rows.take(self._apply_norm(states)),), {}

    def _run_last_block(
        self, hidden: torch.Tensor | None, batch: Batch, mlp_rows: SupervisedRows | None
    ) -> torch.Tensor:
        """Return the last block's output [B, T, hidden_size]; its MLP computes ``mlp_rows``, or all if None."""
        if not self._has_last_block:
            assert hidden is not None
            return hidden
        args, kwargs = self._run_until(f"{self.anatomy.blocks}.{self.anatomy.block_count - 1}", hidden, batch)
        if mlp_rows is not None:
            kwargs = {**kwargs, "supervised_rows": mlp_rows}
        output = self._last_block(*args, **kwargs)
        states: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return states

    def _apply_norm(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the final norm, if there is one, and cast to the head's dtype (Mamba's norm gives float32)."""
        if self._norm:
            states = self.model.get_submodule(self._norm)(states)
        return states.to(next(self._head.parameters()).dtype)

    def _run_until(self, end: str, hidden: torch.Tensor | None, batch: Batch) -> Call:
        """Run the model's own code until it calls the module named ``end``, and return the arguments of that call."""
        module: Any = self.model.get_submodule(end)
        module.ends_pass = True
        try:
            self._run_model(hidden, batch)
        except StopForward as stop:
            if hidden is not None and end == self._entry:  # the hook that injects hidden has not run
                return with_hidden(hidden, *stop.call)
            return stop.call
        finally:
            module.ends_pass = False
        raise RuntimeError(f"the pass never reached {end}")

    def _run_model(self, hidden: torch.Tensor | None, batch: Batch) -> Any:
        """Run the model's own code on ``batch``, with ``hidden`` as the hidden states at the frost line."""
        self._hidden = hidden
        if hidden is None:
            inputs = {"input_ids": batch.input_ids}
        else:  # only the shape counts: _inject replaces it at the frost line
            inputs = {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], self._embedding_size)}
        try:
            with masks_without_checks(batch.is_packed):
                return self.model(**inputs, **batch.forward_inputs(self._with_position_ids), use_cache=False)
        finally:
            self._hidden = None

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Forward pre-hook of the first module above the line: replace the zeros that came this far by ``hidden[b]``.

        It reads an attribute, because the model's code between ``self.model`` and the block has no argument for hidden
        states at the frost line. A module that this class calls itself is given its hidden states as an argument.
        """
        return None if self._hidden is None else with_hidden(self._hidden, args, kwargs)


def split(
    model: PreTrainedModel, anatomy: Anatomy, boundary: int | None, frozen: FrozenWeights | None = None
) -> tuple[Prefix | None, Suffix]:
    """Cut ``model`` below block ``boundary``; None keeps it whole, in a suffix without a prefix."""
    if boundary is None:
        return None, Suffix(model, anatomy, None)
    prefix = Prefix(model, anatomy, boundary, frozen)
    return prefix, Suffix(model, anatomy, boundary, prefix.block_output_counts())


def _take_supervised(states: torch.Tensor, rows: SupervisedRows) -> torch.Tensor:
    """Take the supervised rows of the head's states; raise ModelError if those have other positions than the batch."""
    try:
        return rows.take(states)
    except TypeError as error:
        raise ModelError(f"this architecture cannot be trained: at its head, {error}") from None

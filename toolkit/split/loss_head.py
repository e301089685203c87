"""The top of the suffix: last MLP, final norm, head and loss, computed where a label is supervised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.data.batches import Batch
from toolkit.models.anatomy import Anatomy
from toolkit.models.float32_gradients import uses_float32_gradients
from toolkit.runtime.errors import ModelError
from toolkit.split.logit_processing import find_logit_processing
from toolkit.split.supervised_loss import linear_cross_entropy
from toolkit.split.supervised_rows import MLPOnSupervisedRows, OnSupervisedRows, Rows, dense_mlp, take_rows


@dataclass(frozen=True)
class Shortcuts:
    """What is saved at the top of the suffix, beside a head that sees supervised positions alone."""

    tiled: bool = False
    """Head and cross entropy are one step over tiles of the vocabulary, instead of logits and their loss."""
    norm: bool = False
    """The final norm runs on the supervised positions alone."""
    mlp: bool = False
    """The last block's MLP runs on the supervised positions alone."""

    @property
    def text(self) -> str:
        """For the log."""
        parts = [name for name, on in (("the last MLP", self.mlp), ("the final norm", self.norm), ("head", True)) if on]
        loss = "in tiles of the vocabulary" if self.tiled else "from their whole logits, for this architecture's head"
        return f"{', '.join(parts)}; loss {loss}"


class LossHead:
    """Steers the top of a suffix's copy of the model. It is no module, so that no engine looks into it."""

    def __init__(self, model: PreTrainedModel, copied: PreTrainedModel, anatomy: Anatomy, boundary: int) -> None:
        """
        Args:
            model: the whole model.
            copied: the suffix's copy of it, whose modules are given hooks.
            anatomy: its parts.
            boundary: the first block that the copy has.
        """  # noqa: D205, D212
        self.shortcuts = Shortcuts()
        self._head = copied.get_submodule(anatomy.head)
        self._logits = self._head.forward
        self._in_float32 = uses_float32_gradients(copied)
        self._rows: Rows | None = None
        self._targets: torch.Tensor | None = None
        follows, self._post = find_logit_processing(model, anatomy)
        tiled = follows and type(self._head).forward is nn.Linear.forward
        self._norm = OnSupervisedRows(copied.get_submodule(anatomy.norm)) if anatomy.norm else None
        self._mlp = None
        last = anatomy.block_count - 1
        if boundary <= last:
            block = copied.get_submodule(f"{anatomy.blocks}.{last}")
            mlp = dense_mlp(block, last, anatomy)
            self._mlp = MLPOnSupervisedRows(block, mlp) if mlp is not None else None
        self.possible = Shortcuts(tiled, self._norm is not None, self._mlp is not None)
        self._head.register_forward_pre_hook(self._keep_supervised)
        self._head.forward = self._run_head

    @contextmanager
    def logits_of(self, batch: Batch) -> Iterator[None]:
        """A pass inside gives the model's logits at the supervised positions of ``batch``."""
        self._rows = Rows(_rows(batch), batch.input_ids.shape)
        try:
            yield
        finally:
            self._rows = self._targets = None

    @contextmanager
    def loss_of(self, batch: Batch) -> Iterator[list[torch.Tensor]]:
        """As ``logits_of``, with the short cuts that were taken.

        Yields:
            A list that is filled with the summed loss, [1, 1, 1], if it is computed in tiles.
        """
        found: list[torch.Tensor] = []
        with self.logits_of(batch), ExitStack() as stack:
            if self.shortcuts.norm and self._norm is not None:
                stack.enter_context(self._norm.on(self._rows))
            if self.shortcuts.mlp and self._mlp is not None:
                stack.enter_context(self._mlp.on(self._rows))
            if self.shortcuts.tiled:
                self._targets = batch.targets
                # made anew each time, so that it comes after the hooks of DeepSpeed, which wrap what the head returns;
                # the model's own code goes on with the loss in place of logits, and its output is not used
                hook = self._head.register_forward_hook(lambda module, args, output: found.append(output))
                stack.callback(hook.remove)
            yield found

    def _keep_supervised(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let the head see the supervised positions alone: [B, T, hidden_size] to [1, S, hidden_size].

        Raises:
            ModelError: other positions enter the head than the batch has.
        """
        assert self._rows is not None
        try:
            return (take_rows(args[0], self._rows), *args[1:])
        except TypeError as error:
            raise ModelError(f"this architecture cannot be trained: at its head, {error}") from None

    def _run_head(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits [1, S, vocabulary], or their summed loss [1, 1, 1] if targets are set.

        In the head's own forward, because ZeRO-3 gathers its weight just there and in the backward of what it returns.
        """
        if self._targets is None:
            logits: torch.Tensor = self._logits(hidden, *args, **kwargs)
            return logits
        weight: torch.Tensor = self._head.weight
        bias: torch.Tensor | None = self._head.bias
        return linear_cross_entropy(
            hidden.squeeze(0), weight, bias, self._targets, self._post, in_float32=self._in_float32
        ).view(1, 1, 1)


def _rows(batch: Batch) -> torch.Tensor:
    """[S] indices of the supervised positions, counted through the batch; their number is known, so nothing waits."""
    return torch.nonzero_static(batch.supervised.flatten(), size=len(batch.targets)).squeeze(1)

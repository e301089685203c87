"""Find what a model does to its head's output, by running the model's own code around the head."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import evaluation_mode
from toolkit.split.logit_tiles import LogitFunction
from toolkit.split.module_tree import Placeholder, copy_module_tree

MODEL_CODE_ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
"""Exceptions that a model's own code raises if it needs something that a placeholder does not have."""


@dataclass(frozen=True)
class LogitProcessing:
    """The model's own computation between its head and its logits."""

    function: LogitFunction | None
    """Maps the head's output [rows, V'] to the logits; None if the model returns it unchanged."""
    elementwise: bool
    """True if each logit depends on the same element of the head's output alone."""


class _BodyStub(Placeholder):
    """Takes the place of everything below the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states in the form of a transformers output; ``_HeadStub`` ignores them."""
        return _BodyOutput(kwargs["inputs_embeds"])


class _BodyOutput:
    """A transformers output with hidden states, and None for every other attribute that the model reads."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _HeadStub(Placeholder):
    """Takes the place of the head and returns the logits that it holds."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        parameter = next(head.parameters())  # models read the dtype of the head's weight
        self.register_buffer("weight", parameter.new_empty(0), persistent=False)
        self.logits: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits that ``_AfterHead`` has put here."""
        return self.logits


class _AfterHead(nn.Module):
    """Runs the model's code after its head, as a function of the head's output."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, body: nn.Module) -> None:
        super().__init__()
        head = model.get_submodule(anatomy.head)
        self._output = _HeadStub(head)
        self._model = copy_module_tree(model, {body: _BodyStub(body), head: self._output})
        weight = next(head.parameters())
        self._width, self.dtype, self.device = weight.shape[-1], weight.dtype, weight.device

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits for any head output [rows, V']."""
        self._output.logits = logits.unsqueeze(0)
        hidden = logits.new_zeros(1, len(logits), self._width)
        try:
            output: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._output.logits = None
        return output.squeeze(0)


def find_logit_processing(model: PreTrainedModel, anatomy: Anatomy) -> LogitProcessing | None:
    """Find what ``model`` does to its head's output; None if its code does not run without the modules below the head.

    Gemma caps the logits (``tanh``), Cohere and Granite scale them. What the model's code does is run, not guessed. On
    the meta device, where values cannot be compared, it is taken to be elementwise if the shapes allow that.
    """
    base_name = anatomy.blocks.rpartition(".")[0]
    for body in (model.get_submodule(base_name), model.base_model):
        if body is not model and not any(module is model.get_submodule(anatomy.head) for module in body.modules()):
            with contextlib.suppress(*MODEL_CODE_ERRORS):
                return _classify(_AfterHead(model, anatomy, body))
    return None


def _classify(after_head: _AfterHead) -> LogitProcessing:
    """Run the function on numbers, to see if it changes them and if each depends on its own element alone."""
    probe = torch.linspace(-40, 40, 99, device=after_head.device, dtype=after_head.dtype).view(3, 33)
    with evaluation_mode(after_head):
        whole = after_head(probe)
        if whole.shape == probe.shape and whole.untyped_storage()._cdata == probe.untyped_storage()._cdata:
            unchanged = probe._version == 0  # else in place
            return LogitProcessing(None if unchanged else after_head, elementwise=unchanged)
        part = after_head(probe[1:, 1:-1])
    same_shape = part.shape == probe[1:, 1:-1].shape
    return LogitProcessing(after_head, same_shape and (probe.is_meta or torch.equal(whole[1:, 1:-1], part)))

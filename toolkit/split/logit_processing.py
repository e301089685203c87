"""Find what a model does to its head's output, by running the model's own code around the head."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import evaluating
from toolkit.split.module_tree import StandIn, copy_module_tree
from toolkit.split.supervised_loss import LogitFunction

FAILURES = (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
"""What a model raises that looks for something which a stand-in has not."""


@dataclass(frozen=True)
class LogitProcessing:
    """The model's own computation between its head and its logits."""

    function: LogitFunction | None
    """[rows, V'] of the head's output to the logits; none where the model changes nothing."""
    elementwise: bool
    """True if a slice of the head's output becomes the same slice of the logits."""


class _Body(StandIn):
    """Takes the place of everything below the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states that nobody looks at, in the form of a transformers output."""
        return _BodyOutput(kwargs["inputs_embeds"])


class _BodyOutput:
    """Imitates a transformers output: hidden states, and none for whatever else a model asks its body for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Output(StandIn):
    """Takes the place of the head and returns what it was given."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        own = next(head.parameters())  # models ask for its dtype
        self.register_buffer("weight", own.new_empty(0), persistent=False)
        self.logits: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits that are to be looked at."""
        return self.logits


class _After(nn.Module):
    """Runs the model's code after its head, as a function of the head's output."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, body: nn.Module) -> None:
        super().__init__()
        head = model.get_submodule(anatomy.head)
        self._output = _Output(head)
        self._model = copy_module_tree(model, {body: _Body(body), head: self._output})
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
    """Find what ``model`` does to its head's output; none where its code does not run without what lies below.

    Gemma caps the logits (``tanh``), Cohere and Granite scale them. What the model's code does is run, not guessed. On
    the meta device, where values cannot be compared, it is taken to be elementwise if the shapes allow that.
    """
    own = anatomy.blocks.rpartition(".")[0]
    for body in (model.get_submodule(own), model.base_model):
        if body is not model and not any(module is model.get_submodule(anatomy.head) for module in body.modules()):
            with contextlib.suppress(*FAILURES):
                return _examine(_After(model, anatomy, body))
    return None


def _examine(after: _After) -> LogitProcessing:
    probe = torch.linspace(-40, 40, 99, device=after.device, dtype=after.dtype).view(3, 33)
    with evaluating(after):
        whole = after(probe)
        if whole.shape == probe.shape and whole.untyped_storage()._cdata == probe.untyped_storage()._cdata:
            unchanged = probe._version == 0  # else in place
            return LogitProcessing(None if unchanged else after, elementwise=unchanged)
        part = after(probe[1:, 1:-1])
    same_shape = part.shape == probe[1:, 1:-1].shape
    return LogitProcessing(after, same_shape and (probe.is_meta or torch.equal(whole[1:, 1:-1], part)))

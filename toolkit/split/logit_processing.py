"""What a model does to its head's output: found by running the model's own code around the head."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.anatomy import Anatomy
from toolkit.models.probe import evaluating
from toolkit.split.module_tree import Stand, copy_module_tree
from toolkit.split.supervised_loss import Post

FAILURES = (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
"""What a model raises that looks for something which a stand-in has not."""


class _Body(Stand):
    """In place of everything below the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states that nobody looks at, in the form of a transformers output."""
        return _BodyOutput(kwargs["inputs_embeds"])


class _BodyOutput:
    """As a transformers output: hidden states, and none for whatever else a model asks its body for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Output(Stand):
    """In place of the head: gives what it is told to."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        own = next(head.parameters())  # models ask for its dtype
        self.register_buffer("weight", own.new_empty(0), persistent=False)
        self.logits: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The logits that are to be looked at."""
        return self.logits


class _After(nn.Module):
    """The model's code after its head, as a function of the head's output."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, body: nn.Module) -> None:
        super().__init__()
        head = model.get_submodule(anatomy.head)
        self._output = _Output(head)
        self._model = copy_module_tree(model, {body: _Body(body), head: self._output})
        weight = next(head.parameters())
        self._width, self.dtype, self.device = weight.shape[-1], weight.dtype, weight.device

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Any [rows, V'] to the same shape."""
        self._output.logits = logits.unsqueeze(0)
        hidden = logits.new_zeros(1, len(logits), self._width)
        try:
            output: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._output.logits = None
        return output.squeeze(0)


def find_logit_processing(model: PreTrainedModel, anatomy: Anatomy) -> tuple[bool, Post | None]:
    """Whether the logits follow from the head's output element by element, and how; none is not at all changed.

    Gemma caps them (``tanh``), Cohere and Granite scale them. What the model's code does is run, not guessed. On the
    meta device, where values cannot be compared, it is taken to be element by element if the shapes allow that.
    """
    own = anatomy.blocks.rpartition(".")[0]
    for body in (model.get_submodule(own), model.base_model):
        if body is not model and not any(module is model.get_submodule(anatomy.head) for module in body.modules()):
            with contextlib.suppress(*FAILURES):
                return _examine(_After(model, anatomy, body))
    return False, None


def _examine(after: _After) -> tuple[bool, Post | None]:
    probe = torch.linspace(-40, 40, 99, device=after.device, dtype=after.dtype).view(3, 33)
    with evaluating(after):
        whole = after(probe)
        if whole.shape == probe.shape and whole.untyped_storage()._cdata == probe.untyped_storage()._cdata:
            return probe._version == 0, None
        part = after(probe[1:, 1:-1])
    if part.shape != probe[1:, 1:-1].shape:
        return False, None
    return probe.is_meta or torch.equal(whole[1:, 1:-1], part), after

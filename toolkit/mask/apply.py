"""Apply a mask to a model: untie the head if the mask does, and set ``requires_grad``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.mask.layer_mask import LayerMask
from toolkit.models.anatomy import Anatomy


def untie_head(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Give the head its own copy of the tensor that it shares with the embeddings, and update the model's config.

    Does nothing if the head has its own tensor already.
    """
    head, tied = model.get_submodule(anatomy.head), anatomy.tied_head
    if tied is None or head.weight is not model.get_parameter(tied.alias_of or ""):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    # transformers records the tie in two more attributes, from which save_pretrained() and to() would restore it
    model.all_tied_weights_keys = {}
    model._tied_weights_keys = None


def apply_mask(model: PreTrainedModel, mask: LayerMask, anatomy: Anatomy) -> None:
    """Set ``requires_grad`` on exactly the mask's tensors, after untying the head if the mask does."""
    if mask.tied == "untie":
        untie_head(model, anatomy)
    model.requires_grad_(False)
    for parameter in trainable_parameters(model, mask).values():
        parameter.requires_grad_(True)


def replace_parameters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters by new frozen ones that hold ``tensors``; a tied one is replaced under all of its names."""
    old = dict(model.named_parameters(remove_duplicate=False))
    new = {id(old[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                module._parameters[key] = new[id(parameter)]


def trainable_parameters(model: nn.Module, mask: LayerMask) -> dict[str, nn.Parameter]:
    """Return the mask's parameters by name, in the mask's order; ``model`` may also be a suffix of it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in mask.names}

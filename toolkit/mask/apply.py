"""Lay a mask onto a model: untie the head if asked, and let exactly the mask's tensors require gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.mask.layer_mask import LayerMask
from toolkit.models.anatomy import Anatomy


def untie_head(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Give the head its own copy of the tensor it shares with the embeddings, and say so in the model's config.

    A head that has its own copy already is left as it is.
    """
    head, tied = model.get_submodule(anatomy.head), anatomy.tied_head
    if tied is None or head.weight is not model.get_parameter(tied.alias_of or ""):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    text_config = model.config.get_text_config()
    text_config.tie_word_embeddings = False
    # transformers keeps the tie in two more places and would restore it when saving or moving the model
    model.all_tied_weights_keys = {}
    model._tied_weights_keys = None


def apply_mask(model: PreTrainedModel, mask: LayerMask, anatomy: Anatomy) -> None:
    """Freeze everything but the mask's tensors; after this ``requires_grad`` and the mask agree exactly."""
    if mask.tied == "untie":
        untie_head(model, anatomy)
    model.requires_grad_(False)
    for parameter in trainable_parameters(model, mask).values():
        parameter.requires_grad_(True)


def put_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model new frozen parameters on ``tensors``; one that has several names is replaced under all of them.

    Args:
        model: its modules stay, the named parameters become other objects.
        tensors: by the names of the parameters they replace.
    """
    old = dict(model.named_parameters(remove_duplicate=False))
    new = {id(old[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                module._parameters[key] = new[id(parameter)]


def trainable_parameters(model: nn.Module, mask: LayerMask) -> dict[str, nn.Parameter]:
    """Return the mask's tensors in its order, by name, as parameters of ``model`` or of a suffix cut from it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in mask.names}

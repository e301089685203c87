"""Lay a mask onto a model: untie the head if asked, and let exactly the mask's tensors require gradients."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from toolkit.mask.layer_mask import LayerMask
from toolkit.models.anatomy import Anatomy


def untie_head(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Give the head its own copy of the tensor it shares with the embeddings, and say so in the model's config."""
    head = model.get_submodule(anatomy.head)
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


def trainable_parameters(model: nn.Module, mask: LayerMask) -> dict[str, nn.Parameter]:
    """The mask's tensors in the mask's order: name to parameter of ``model`` or of a suffix cut from it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in mask.names}

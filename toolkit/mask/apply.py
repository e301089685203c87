"""Apply a mask to a model: untie the head and add adapters if the mask does, and set ``requires_grad``."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.mask.adapters import Adapter
from toolkit.mask.layer_mask import LayerMask
from toolkit.mask.row_layers import add_rows
from toolkit.models.anatomy import Anatomy
from toolkit.models.float32_gradients import Float32Linear, use_float32_gradients
from toolkit.models.padded_rows import PaddedLinear, pad_rows
from toolkit.models.quantised_linear import dequantise_layers, quantise_layer


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


def apply_mask(model: PreTrainedModel, mask: LayerMask, anatomy: Anatomy, seed: int = 0) -> None:
    """Set ``requires_grad`` on exactly the mask's tensors; before that, untie, quantise, add adapters and rows.

    Args:
        model: model to change in place.
        mask: mask to apply.
        anatomy: parts of ``model``, found before any mask was applied.
        seed: seed of new adapters' random start.
    """
    if mask.tied == "untie":
        untie_head(model, anatomy)
    _quantise_layers(model, mask)
    add_adapters(model, mask.adapters, seed)
    add_rows(model, mask.rows)
    model.requires_grad_(False)
    for parameter in trainable_parameters(model, mask).values():
        parameter.requires_grad_(True)
    rates = {module: adapter.dropout for adapter in mask.adapters for module in adapter.modules}
    for name, module in model.named_modules():
        layer, is_dropout, _ = name.partition(".lora_dropout.")
        if is_dropout and isinstance(module, nn.Dropout):
            module.p = rates.get(layer, 0.0)  # an adapter that trained in an earlier phase is frozen, and draws nothing


def _quantise_layers(model: nn.Module, mask: LayerMask) -> None:
    """Quantise the weights of the mask's layers, one by one, where it was not done before.

    A run does so before it moves the model to its device: codes made on a CPU are the same wherever it trains.
    """
    modules = dict(model.named_modules())
    for layers in mask.quantised:
        for name in layers.modules:
            quantise_layer(modules.get(f"{name}.base_layer") or modules[name], layers.precision)


def add_adapters(model: PreTrainedModel, adapters: Sequence[Adapter], seed: int) -> None:
    """Put peft's low-rank adapters beside those of the layers that have none yet, in the layers' precision.

    Names of the layers' own tensors get ``base_layer`` in them, which ``parameters_by_name`` takes out again. Each
    layer is wrapped by itself: peft's way through the whole model exchanges the targets of some mixtures of experts.
    """
    present = dict(model.named_modules())
    for adapter in adapters:
        new = [module for module in adapter.modules if f"{module}.base_layer" not in present]
        if not new:
            continue
        from peft import LoraConfig  # takes seconds to import
        from peft.tuners.lora import Linear

        with torch.random.fork_rng(devices=[]):
            for name in new:
                torch.manual_seed((seed << 32) + zlib.crc32(name.encode()))  # of its own, whatever is adapted beside it
                layer = present[name]
                transposed = isinstance(layer, Conv1D)
                config = LoraConfig(
                    lora_dropout=adapter.dropout, use_rslora=adapter.rslora, use_dora=adapter.dora,
                    init_lora_weights=True if adapter.init == "kaiming" else adapter.init, fan_in_fan_out=transposed,
                )  # fmt: skip
                wrapped: nn.Module = Linear(
                    layer, "default", config, r=adapter.rank, lora_alpha=cast(int, adapter.alpha),
                    is_target_conv_1d_layer=transposed,
                )  # fmt: skip
                if isinstance(layer, Float32Linear) and layer.forward_in_float32:
                    use_float32_gradients(wrapped, forward_too=True)
                elif isinstance(layer, (Float32Linear, PaddedLinear)):
                    pad_rows(wrapped)
                model.set_submodule(name, wrapped.train(layer.training))


def unused_adapters(model: nn.Module, called: Collection[nn.Module]) -> list[str]:
    """Return the adapted layers that are not among those ``called`` (see ``toolkit.models.probe.called_modules``).

    Such a model computes with the layer's weight itself (Mamba's time steps, fused kernels), past the adapter, or not
    at all (the attention to an encoder that is not there). Experts, of which a router chooses some, are left out.
    """
    layers = _adapted_layers(model)
    return [name for name, layer in layers.items() if layer not in called and "expert" not in name]


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that an adapter stands beside, as peft wraps them, by name."""
    modules = dict(model.named_modules())
    names = [name.removesuffix(".base_layer") for name in modules if name.endswith(".base_layer")]
    return {name: modules[name] for name in names}


Rounding = Callable[[torch.Tensor, torch.Tensor], object]
"""Copies a float32 tensor into one of another precision."""


def round_to_nearest(exact: torch.Tensor, out: torch.Tensor) -> None:
    """Copy ``exact`` into ``out``, rounded to the nearest value of its precision."""
    out.copy_(exact)


@torch.no_grad()
def merge_adapters(
    model: PreTrainedModel, masters: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None,
    rounding: Rounding = round_to_nearest,
) -> None:  # fmt: skip
    """Add the adapters' updates to their layers' weights, and take the adapters out; dequantise what is quantised.

    The sum is computed in float32, from the masters and the weights that trained, and rounded once. Those of a
    quantised layer are the dequantised ones.

    Args:
        model: model with adapters, changed in place.
        masters: float32 values of trained tensors by name; an adapter without them keeps its rounded ones.
        dtype: precision of merged weights that have the model's; None keeps it.
        rounding: rounds a sum.
    """
    dequantise_layers(model)
    stored_as = model.dtype
    for name, layer in _adapted_layers(model).items():
        exact: Any = copy.deepcopy(layer)
        exact.float()
        for inner, parameter in parameters_by_name(exact).items():
            if f"{name}.{inner}" in masters:
                parameter.copy_(masters[f"{name}.{inner}"])
        if exact.lora_magnitude_vector:  # divided in training by the norm as it is rounded there, not by the exact one
            exact.lora_magnitude_vector["default"].weight.mul_(_dora_norm(exact) / _dora_norm(layer))
        exact.merge()
        plain: Any = layer.get_base_layer()
        own = plain.weight.dtype
        merged = torch.empty_like(plain.weight, dtype=dtype if dtype is not None and own == stored_as else own)
        rounding(exact.get_base_layer().weight, merged)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, plain)


def _dora_norm(layer: Any) -> torch.Tensor:
    """Return the norm [out] by which DoRA divides each output of a layer, in the precision of its weights."""
    weight = layer.get_base_layer().weight
    update = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    norm: torch.Tensor = torch.linalg.norm((weight.T if layer.fan_in_fan_out else weight) + update, dim=1)
    return norm.to(weight.dtype).float()


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by the names that they have without adapters beside them; a tied one under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}


def plain_name(name: str) -> str:
    """Return the name that a parameter has without an adapter beside its layer."""
    return name.replace("base_layer.", "")


def replace_parameters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters by new frozen ones that hold ``tensors``; a tied one is replaced under all of its names."""
    old = parameters_by_name(model)
    new = {id(old[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                module._parameters[key] = new[id(parameter)]


def trainable_parameters(model: nn.Module, mask: LayerMask) -> dict[str, nn.Parameter]:
    """Return the mask's parameters by name, in the mask's order; ``model`` may also be a suffix of it."""
    parameters = parameters_by_name(model)
    return {name: parameters[name] for name in mask.names}

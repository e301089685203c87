"""Compare what a checkpoint holds with what its model uses: nothing is left out, rounded or unpacked without a word."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from toolkit.models.weight_files import StoredTensors, join_names
from toolkit.runtime.errors import ModelError
from toolkit.runtime.safetensors_io import FLOATS

log = logging.getLogger("frostline")


def check_contents(model: PreTrainedModel, stored: StoredTensors, model_names: dict[str, str], source: str) -> None:
    """Refuse quantised weights; log which stored tensors the model does not use, and which were rounded on loading.

    ``model_names`` maps each stored name to the model's name of that tensor; messages name the checkpoint ``source``.

    Raises:
        ModelError: the weights are quantised.
    """
    _refuse_quantised(model, stored, model_names, source)
    state = model.state_dict()
    unused = [name for name in sorted(stored.entries) if model_names[name] not in state]
    if unused:
        log.warning(
            "%s: %d tensors of the checkpoint are not used by %s: %s. An export carries them as they are%s",
            source, len(unused), type(model).__name__, join_names(unused),
            _describe_unregistered(model, [model_names[name] for name in unused]),
        )  # fmt: skip
    rounded = [
        name
        for name, model_name in model_names.items()
        if model_name in state and _loses_precision(FLOATS.get(stored.entries[name]["dtype"]), state[model_name].dtype)
    ]
    if rounded:
        kinds = sorted({str(FLOATS[stored.entries[name]["dtype"]]).removeprefix("torch.") for name in rounded})
        log.info(
            "%s: %d of %d tensors are stored in %s and rounded to %s (model.dtype), frozen ones too",
            source, len(rounded), len(stored.entries), " and ".join(kinds),
            str(state[model_names[rounded[0]]].dtype).removeprefix("torch."),
        )  # fmt: skip


def _refuse_quantised(model: PreTrainedModel, stored: StoredTensors, model_names: dict[str, str], source: str) -> None:
    """Raise ModelError for quantised weights, naming the first.

    Integer tensors pass if the network itself has integers there, and no quantiser of transformers has put them there.
    """
    by_quantiser = getattr(model, "hf_quantizer", None) is not None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    packed = [
        name
        for name, parameter in parameters.items()
        if (parameter.itemsize == 1 if parameter.is_floating_point() else by_quantiser)
    ]
    if not by_quantiser:
        packed += [
            model_name
            for name, model_name in model_names.items()
            if model_name in parameters
            and parameters[model_name].is_floating_point()
            and stored.entries[name]["dtype"] not in FLOATS
        ]
    if packed:
        raise ModelError(
            f"{source} holds quantised weights ({packed[0]} and {len(packed) - 1} more); "
            "expected floating point weights: name the unquantised model"
        )


def _loses_precision(stored: torch.dtype | None, loaded: torch.dtype) -> bool:
    """Return True if dtype ``loaded`` cannot hold every value of dtype ``stored``."""
    return stored is not None and torch.promote_types(stored, loaded) != loaded


def _describe_unregistered(model: PreTrainedModel, unused: list[str]) -> str:
    """Return a clause for the log on those unused tensors whose module the model does have; empty if there are none."""
    leaves = {name for name, module in model.named_modules() if module._parameters and not module._modules}
    unregistered = [name for name in unused if name.rpartition(".")[0] in leaves]
    if not unregistered:
        return ""
    return (
        f". Of these, {join_names(unregistered, 4)}: the model has the module but, as config.json describes it, no "
        "such tensor, so it computes without it, as transformers does"
    )

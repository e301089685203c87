"""Compare what a checkpoint holds with what its model uses: nothing is left out, rounded or unpacked without a word."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from toolkit.models.weight_files import StoredTensors, join_names
from toolkit.runtime.errors import ModelError
from toolkit.runtime.safetensors_io import FLOATS

log = logging.getLogger("frostline")


def check_contents(model: PreTrainedModel, stored: StoredTensors, targets: dict[str, str], source: str) -> None:
    """Refuse quantised weights; log which stored tensors the model does not use, and which were rounded on loading.

    Args:
        model: the loaded model.
        stored: the tensors of its checkpoint.
        targets: each stored name, mapped to the model's name of that tensor.
        source: name of the checkpoint, for messages.

    Raises:
        ModelError: the weights are quantised.
    """
    _refuse_quantised(model, stored, targets, source)
    state = model.state_dict()
    unused = [name for name in sorted(stored.entries) if targets[name] not in state]
    if unused:
        log.warning(
            "%s: %d tensors of the checkpoint are not used by %s: %s. An export carries them as they are%s",
            source, len(unused), type(model).__name__, join_names(unused),
            _describe_unregistered(model, [targets[name] for name in unused]),
        )  # fmt: skip
    rounded = [
        name
        for name, target in targets.items()
        if target in state and _loses_precision(FLOATS.get(stored.entries[name]["dtype"]), state[target].dtype)
    ]
    if rounded:
        kinds = sorted({str(FLOATS[stored.entries[name]["dtype"]]).removeprefix("torch.") for name in rounded})
        log.info(
            "%s: %d of %d tensors are stored in %s and rounded to %s (model.dtype), frozen ones too",
            source, len(rounded), len(stored.entries), " and ".join(kinds),
            str(state[targets[rounded[0]]].dtype).removeprefix("torch."),
        )  # fmt: skip


def _refuse_quantised(model: PreTrainedModel, stored: StoredTensors, targets: dict[str, str], source: str) -> None:
    """Refuse quantised weights.

    Integer tensors pass if the network itself has integers there, and no quantiser of transformers has put them there.

    Raises:
        ModelError: there are quantised weights; names the first.
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
            target
            for name, target in targets.items()
            if target in parameters
            and parameters[target].is_floating_point()
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
    modules = dict(model.named_modules())
    odd = []  # tensors that the config leaves out of a module that the model has
    for name in unused:
        module = modules.get(name.rpartition(".")[0])
        if module is not None and module._parameters and not module._modules:
            odd.append(name)
    if not odd:
        return ""
    return (
        f". Of these, {join_names(odd, 4)}: the model has the module but, as config.json describes it, no such tensor, "
        "so it computes without it, as transformers does"
    )

"""Compare what a checkpoint holds with what its model uses: nothing is left out, rounded or unpacked without a word."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from toolkit.models.weight_files import StoredTensors, listed
from toolkit.runtime.errors import ModelError
from toolkit.runtime.safetensors_io import FLOATS

log = logging.getLogger("frostline")


def examine(model: PreTrainedModel, stored: StoredTensors, targets: dict[str, str], source: str) -> None:
    """Refuse quantised weights; say which stored tensors the model does not use, and which were rounded.

    Args:
        model: as loaded.
        stored: its checkpoint.
        targets: each stored name to the model's own.
        source: the checkpoint's name, for messages.

    Raises:
        ModelError: the weights are quantised.
    """
    _refuse_quantised(model, stored, targets, source)
    state = model.state_dict()
    unused = [name for name in sorted(stored.entries) if targets[name] not in state]
    if unused:
        log.warning(
            "%s: %d tensors of the checkpoint are not used by %s: %s. An export carries them as they are%s",
            source, len(unused), type(model).__name__, listed(unused), _hint(model, [targets[name] for name in unused]),
        )  # fmt: skip
    rounded = [
        name
        for name, target in targets.items()
        if target in state and _loses(FLOATS.get(stored.entries[name]["dtype"]), state[target].dtype)
    ]
    if rounded:
        kinds = sorted({str(FLOATS[stored.entries[name]["dtype"]]).removeprefix("torch.") for name in rounded})
        log.info(
            "%s: %d of %d tensors are stored in %s and rounded to %s (model.dtype), frozen ones too",
            source, len(rounded), len(stored.entries), " and ".join(kinds),
            str(state[targets[rounded[0]]].dtype).removeprefix("torch."),
        )  # fmt: skip


def _refuse_quantised(model: PreTrainedModel, stored: StoredTensors, targets: dict[str, str], source: str) -> None:
    """Refuse quantised weights; integer tables are fine where the network has integers too, put there by no library."""
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


def _loses(stored: torch.dtype | None, loaded: torch.dtype) -> bool:
    """Return True if a precision cannot hold all values of another."""
    return stored is not None and torch.promote_types(stored, loaded) != loaded


def _hint(model: PreTrainedModel, unused: list[str]) -> str:
    """Return what is odd about unused tensors of modules that the model does have, as a clause for the log."""
    modules = dict(model.named_modules())
    odd = []
    for name in unused:
        owner = modules.get(name.rpartition(".")[0])
        if owner is not None and owner._parameters and not owner._modules:
            odd.append(name)
    if not odd:
        return ""
    return (
        f". Of these, {listed(odd, 4)}: the model has the module but, as config.json describes it, no such tensor, so "
        "it computes without it, as transformers does"
    )

"""Open several runs over one base model: what is frozen is loaded once, what each trained is beside it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from toolkit.checkpoint import manifest
from toolkit.checkpoint.base_identity import TO_READ, differences
from toolkit.checkpoint.choice import ChosenCheckpoint, Step
from toolkit.checkpoint.delta import Delta, is_delta
from toolkit.config.recipe import read_saved
from toolkit.config.schema import RunConfig
from toolkit.data.chat_rendering import read_rendering
from toolkit.inference.base_check import require_same_base, require_same_template, require_trust
from toolkit.inference.open_model import OpenedModel, all_added_tokens, is_run, load_base, read_run, read_trained
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.models.load import LoadedModel
from toolkit.runtime.errors import UsageError
from toolkit.split.module_tree import copy_module_tree

log = logging.getLogger("frostline")


def open_together(
    sources: Sequence[str], device: torch.device, steps: Sequence[Step | None], base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> list[OpenedModel]:  # fmt: skip
    """Load the base of several runs, checkpoints or deltas once, on ``device``, and each one's trained tensors.

    The models share the storage of all that they did not train. ``steps`` are those of each source, ``base`` and
    ``trust_remote_code`` as ``open_model`` has them.

    Raises:
        UsageError: a source has no base of its own, or another one than the first, or adds tokens.
        CheckpointError: a checkpoint is damaged, or the base model has changed since the training.
    """
    read = [_read(source, step) for source, step in zip(sources, steps, strict=True)]
    first = read[0][1]
    for source, (_, delta) in zip(sources, read, strict=True):
        _require_shared(source, delta, sources[0], first)
    config = first.base.config.model_copy(update={"name_or_path": str(base)} if base else {})
    require_trust(config, trust_remote_code)
    loaded = load_base(config)
    require_same_base(loaded, first.base, config)
    loaded.model.to(device)
    log.info("%s is loaded once for %d runs", config.name_or_path, len(sources))
    return [_over(loaded, source, choice, delta) for source, (choice, delta) in zip(sources, read, strict=True)]


def _read(source: str, step: Step | None) -> tuple[ChosenCheckpoint | None, Delta]:
    path = Path(source)
    if is_run(path):
        return read_run(path, step)
    if step is not None:
        raise UsageError(f"--step {step} names a checkpoint of a run directory, and {source} is none; leave it out")
    if (path / manifest.MANIFEST_FILE).is_file() or is_delta(path):
        return None, read_trained(path)
    raise UsageError(
        f"{source} is no run, checkpoint or delta; several sources answer together where each is one over the same "
        "base model. Ask this one by itself"
    )


def _require_shared(source: str, delta: Delta, first_source: str, first: Delta) -> None:
    """Raise UsageError if a source does not stand on the base of the first one."""
    if tokens := all_added_tokens(delta.base.config):
        raise UsageError(
            f"{source} added tokens ({', '.join(tokens[:3])}), so that its tables are not those of the base; ask it by "
            "itself"
        )
    settings = [one.base.config.model_dump(exclude={"name_or_path", "revision"}) for one in (first, delta)]
    changes = differences(first.base.identity, delta.base.identity or {}, TO_READ)
    changes += [f"model.{key} is {settings[1][key]}, not {value}" for key, value in settings[0].items()
                if settings[1][key] != value]  # fmt: skip
    if delta.base.sha256 != first.base.sha256:
        changes.insert(0, "its weights are others (SHA-256 differs)")
    if changes:
        raise UsageError(
            f"{source} and {first_source} were trained on different base models: {'; '.join(changes)}. Several sources "
            "answer together over one base; ask this one by itself"
        )


@torch.no_grad()
def _over(loaded: LoadedModel, source: str, choice: ChosenCheckpoint | None, delta: Delta) -> OpenedModel:
    """Return a model of the base's tensors and a source's own; the base stays as it is."""
    path = Path(source)
    model = copy_module_tree(loaded.model, {}, own_parameters=True)
    model.config = copy.deepcopy(model.config)  # which untying changes
    own = replace(loaded, model=model, tokenizer=copy.deepcopy(loaded.tokenizer))
    apply_mask(model, delta.mask, own.anatomy)
    model.to(loaded.model.device)  # adapters begin on the CPU
    parameters = trainable_parameters(model, delta.mask)
    for name, tensor in delta.tensors.items():
        parameters[name].data = torch.empty_like(parameters[name]).copy_(tensor)
    is_checkpoint = (path / manifest.MANIFEST_FILE).is_file()
    rendering = read_rendering(path.parent.parent if is_checkpoint else path)
    if rendering.template is not None:
        own.tokenizer.chat_template = rendering.template
    require_same_template(own.tokenizer, delta.base)
    config = read_saved(path / "config.yaml") if is_run(path) else RunConfig()
    return OpenedModel(own, config, path if is_run(path) else None, choice, delta, rendering)

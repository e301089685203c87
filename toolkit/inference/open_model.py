"""Load a trained model from a run, a checkpoint, a delta or a model directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.checkpoint import manifest
from toolkit.checkpoint.catalog import checkpoints_of
from toolkit.checkpoint.choice import ChosenCheckpoint, Step, read_checkpoint
from toolkit.checkpoint.delta import Base, Delta, is_delta, read_delta, read_mask_and_base
from toolkit.checkpoint.restore import Checkpoint
from toolkit.checkpoint.run_directory import OUT_OF_FOLD_FILE, fold_runs
from toolkit.config.recipe import read_saved
from toolkit.config.schema import DataConfig, ModelConfig, RunConfig
from toolkit.data.chat_rendering import Rendering, read_rendering
from toolkit.data.examples import Encoder
from toolkit.data.sources import task_of
from toolkit.inference.base_check import require_same_base, require_same_template, require_trust
from toolkit.inference.model_source import cast_weights, load_whole, load_with_adapter
from toolkit.inference.peft_adapter import apply_peft_adapter, is_adapter_directory, is_peft_adapter
from toolkit.mask.adapters import adapted_weight
from toolkit.mask.apply import apply_mask, merge_adapters, round_to_nearest, trainable_parameters
from toolkit.mask.row_layers import merge_rows
from toolkit.models.added_tokens import add_token_rows, token_ids
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.models.load import Dtype, LoadedModel, load, load_tokenizer
from toolkit.runtime.errors import CheckpointError, UsageError

log = logging.getLogger("frostline")


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model, and the run, checkpoint and recipe that it comes from."""

    loaded: LoadedModel
    config: RunConfig
    """Recipe of the run; the defaults if the source is not a run."""
    run: Path | None
    """Run directory; None if the source is not a run."""
    choice: ChosenCheckpoint | None
    """Checkpoint of the run; None if the source is not a run."""
    delta: Delta | None
    """Trained tensors; None if the source is a whole model."""
    rendering: Rendering = Rendering()
    """Chat format of the run; the default if the source is not a run."""

    @property
    def encoder(self) -> Encoder:
        """Return a new encoder of rows into this model's tokens, which also knows the tokens that end an answer."""
        return Encoder(self.loaded.tokenizer, self.config.data.max_length, self.loaded.ends, self.rendering)


def open_model(
    source: str,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
) -> OpenedModel:
    """Load the model behind ``source``.

    Args:
        source: run directory, checkpoint, delta, peft adapter directory, model directory, Hub id, or bundled name.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``; None takes the latest.
        base: new path of the base model of a run, delta or adapter, if it moved.
        trust_remote_code: run code that ships with the model: with the base of a run or delta, if that was trained so.
        dtype: precision of the model, to which masters are rounded; None takes that of the training, or that in which a
            model is stored.

    Raises:
        CheckpointError: the run has no such checkpoint, it is damaged, or the base model changed.
        UsageError: ``step`` is given and ``source`` is not a run; ``base`` and it is a whole model; or
            ``trust_remote_code`` and the model is on the Hub at no pinned commit.
        ModelError: the model cannot be loaded.
    """
    path = Path(source)
    if is_run(path):
        config = read_saved(path / "config.yaml")
        choice, delta = read_run(path, step)
        loaded = load_delta(delta, base, trust_remote_code, dtype)
        return OpenedModel(loaded, config, path, choice, delta, _rendering_of(path, loaded, delta.base))
    if step is not None:
        raise UsageError(f"--step {step} names a checkpoint of a run directory, and {source} is none; leave it out")
    if (path / manifest.MANIFEST_FILE).is_file() or is_delta(path):
        delta = read_trained(path)
        loaded = load_delta(delta, base, trust_remote_code, dtype)
        # a checkpoint is RUN/checkpoints/step-N; an exported delta has the run's rendering beside it
        rendering = _rendering_of(
            path.parent.parent if (path / manifest.MANIFEST_FILE).is_file() else path, loaded, delta.base
        )
        return OpenedModel(loaded, RunConfig(), None, None, delta, rendering)
    _refuse_beside_run(path)
    if is_adapter_directory(path):
        loaded, model = load_with_adapter(path, base, trust_remote_code, dtype)
    elif base is not None:
        raise UsageError(f"--base names the base model of a run, delta or adapter, and {source} is none; leave it out")
    else:
        loaded, model = load_whole(source, trust_remote_code, dtype)
    return OpenedModel(loaded, RunConfig(model=model), None, None, None)


def data_settings(source: str, rows: str | None = None) -> tuple[DataConfig, Rendering]:
    """Return how the run, checkpoint or delta behind ``source`` reads and renders rows, without its model.

    ``rows`` is their path; its task is that of the run's source there, see ``task_of``.

    Raises:
        ConfigError: the run's recipe cannot be read.
    """
    path = Path(source)
    if is_run(path):
        config = read_saved(path / "config.yaml")
        return config.data.model_copy(update={"task": task_of(config.data, rows)}), read_rendering(path)
    return DataConfig(), read_rendering(path.parent.parent if (path / manifest.MANIFEST_FILE).is_file() else path)


def read_run(run: Path, step: Step | None = None) -> tuple[ChosenCheckpoint, Delta]:
    """Choose a checkpoint of a run, log which, and read its trained tensors; all its files are verified.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    choice, delta = read_checkpoint(run, step, lambda choice: (choice, Checkpoint(choice.checkpoint).delta()))
    log.info("%s: using %s", run, choice.advice("--step best"))
    return choice, delta


def read_trained(path: Path) -> Delta:
    """Read the trained tensors of a run's latest checkpoint, a checkpoint or a delta; checkpoints are verified.

    Raises:
        CheckpointError: ``path`` is none of these, a run has no checkpoint, or the checkpoint is damaged.
    """
    if (path / manifest.MANIFEST_FILE).is_file():
        manifest.verify(path)
        return Checkpoint(path).delta()
    if is_delta(path):
        return read_delta(path)
    if is_run(path):
        choice, delta = read_checkpoint(path, None, lambda choice: (choice, Checkpoint(choice.checkpoint).delta()))
        log.info("%s: using %s", path, choice.advice(f"model.delta {choice.better}"))
        return delta
    _refuse_beside_run(path)
    raise CheckpointError(f"{path} is not a run directory, a checkpoint or a delta; expected one of them")


def load_delta(
    delta: Delta, base: str | Path | None = None, trust_remote_code: bool = False, dtype: Dtype | None = None
) -> LoadedModel:
    """Load the base model with the delta's tensors in place; see ``open_model`` for the arguments.

    Raises:
        CheckpointError: the base model's weights are not those that the delta was trained on.
        ModelError: the base model cannot be loaded, or needs its own code without ``trust_remote_code``.
    """
    config = delta.base.config.model_copy(update={"name_or_path": str(base)} if base else {})
    require_trust(config, trust_remote_code)
    loaded = load_base(config)
    require_same_base(loaded, delta.base, config)
    _apply_delta(loaded, delta, config, dtype)
    return loaded


def load_base(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    anatomy: Anatomy | None = None,
    blocks_on_disk: int = 0,
) -> LoadedModel:
    """Load a model as ``toolkit.models.load.load`` does, with the tensors of ``config.delta`` in place.

    ``tokenizer`` is that of ``load_tokenizer_of``; None loads it.

    Raises:
        CheckpointError: the delta cannot be read, was trained on other weights, or holds a block that is not loaded.
        ModelError: the model cannot be loaded.
    """
    tokenizer = tokenizer or load_tokenizer_of(config)
    if config.delta is None:
        return load(config, tokenizer, anatomy, blocks_on_disk)
    if is_peft_adapter(Path(config.delta)):
        loaded = load(config, tokenizer)
        apply_peft_adapter(loaded, Path(config.delta))
        return replace(loaded, anatomy=replace(detect_anatomy(loaded.model), added=loaded.anatomy.added))
    delta = read_trained(Path(config.delta))
    below = {"delta": delta.base.config.delta, "add_tokens": delta.base.config.add_tokens}
    base_config = config.model_copy(update=below)  # which may itself be a delta
    loaded = load_base(base_config, tokenizer, anatomy, blocks_on_disk)
    own_tokenizer = load_tokenizer_of(base_config)  # the other may have more tokens
    require_same_base(replace(loaded, tokenizer=own_tokenizer), delta.base, config)
    _apply_delta(loaded, delta, config)
    if delta.mask.adapters:
        log.info("model.delta: its adapters are merged into their layers, rounded to %s", config.dtype)
        if delta.mask.quantised:
            log.info("model.delta: quantised layers are dequantised; base_precision of the new mask rounds them anew")
        merge_adapters(loaded.model, delta.tensors)
    merge_rows(loaded.model, delta.tensors, round_to_nearest)
    return _with_new_anatomy(loaded, config)


def _with_new_anatomy(loaded: LoadedModel, config: ModelConfig) -> LoadedModel:
    """Add the rows of ``config.add_tokens`` to a model with a delta, and describe it: the head may be untied now."""
    if own := token_ids(loaded.tokenizer, config.add_tokens):
        add_token_rows(loaded.model, own)
    added = token_ids(loaded.tokenizer, all_added_tokens(config))
    return replace(loaded, anatomy=replace(detect_anatomy(loaded.model), added=added))


def load_tokenizer_of(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer with the tokens that ``config`` and the runs behind ``config.delta`` add.

    Raises:
        ModelError: as ``load_tokenizer``.
        CheckpointError: ``config.delta`` is none, or damaged.
    """
    return load_tokenizer(config.model_copy(update={"add_tokens": all_added_tokens(config)}))


def all_added_tokens(config: ModelConfig) -> list[str]:
    """Return the tokens that the runs behind ``config.delta`` add, and then those of ``config``.

    Raises:
        CheckpointError: ``config.delta`` is none, or damaged.
    """
    tokens, seen = list(config.add_tokens), set[Path]()
    while config.delta is not None and not is_peft_adapter(Path(config.delta)):
        if (place := Path(config.delta).resolve()) in seen:
            raise CheckpointError(
                f"{config.delta}: its base begins from it again (model.delta in base.json); expected another model"
            )
        seen.add(place)
        config = _base_of(Path(config.delta))
        tokens = [*config.add_tokens, *tokens]
    return tokens


def _base_of(path: Path) -> ModelConfig:
    """Return the model that a run, checkpoint or delta began from; raises as ``read_trained``."""
    holder = path if is_delta(path) else next(iter(checkpoints_of(path)), path)
    try:
        return read_mask_and_base(holder)[1].config
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return read_trained(path).base.config  # which says what is wrong


@torch.no_grad()
def _apply_delta(loaded: LoadedModel, delta: Delta, config: ModelConfig, dtype: Dtype | None = None) -> None:
    """Copy the delta's tensors into its base model, untying the head if the mask does; see ``load_base``."""
    if absent := [name for name in delta.tensors if adapted_weight(name) in loaded.on_disk]:
        raise CheckpointError(
            f"model.delta trained {absent[0]}, which prefix.placement: disk leaves on disk; choose another "
            "prefix.placement, or export the trained model and start from that"
        )
    apply_mask(loaded.model, delta.mask, loaded.anatomy)
    if dtype is not None:  # quantised layers keep the values that trained, whatever precision they compute in
        cast_weights(loaded.model, getattr(torch, dtype))
    parameters = trainable_parameters(loaded.model, delta.mask)
    for name, tensor in delta.tensors.items():
        parameters[name].copy_(tensor)


def _rendering_of(folder: Path, loaded: LoadedModel, base: Base) -> Rendering:
    """Return the rendering of a run or delta, and give the tokenizer its chat template.

    Raises:
        CheckpointError: the template that comes out is not that of the training.
    """
    rendering = read_rendering(folder)
    if rendering.template is not None:
        loaded.tokenizer.chat_template = rendering.template
    require_same_template(loaded.tokenizer, base)
    return rendering


def _refuse_beside_run(path: Path) -> None:
    """Raise CheckpointError for ``RUN/checkpoints/best``, a file, and a directory of folds, and say how to choose."""
    if runs := fold_runs(path):
        raise CheckpointError(
            f"{path} holds the runs of data.folds; expected one of them: {', '.join(map(str, runs))}. The loss of each "
            f"row, from a run that did not see it, is in {path / OUT_OF_FOLD_FILE}"
        )
    run = path.parent.parent
    if path.parent.name == "checkpoints" and is_run(run):
        present = ", ".join(checkpoint.name for checkpoint in checkpoints_of(run)) or "none"
        raise CheckpointError(
            f"{path} is no checkpoint; present: {present}. Name the run, {run}, and choose with "
            "--step N, latest or best"
        )


def is_run(path: Path) -> bool:
    """Return whether a path is a run directory."""
    return (path / "config.yaml").is_file()

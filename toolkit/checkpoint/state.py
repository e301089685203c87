"""Read ``state.json`` of a checkpoint, and compare it with the run that would resume from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolkit.checkpoint.manifest import damaged, newer_version
from toolkit.config.mask_schema import MaskConfig
from toolkit.config.policy import global_batch
from toolkit.config.schema import RunConfig

STATE_FILE = "state.json"

_IRRELEVANT = ("output.", "prefix.cache", "prefix.share", "prefix.placement", "data.task")
"""Settings that may differ on resume: where output, cached hidden states and frozen weights are kept, and the task, as
what it makes of the rows is compared itself."""
_SOURCES = (("data", "path"), ("data", "validation"), ("data", "test"))
"""Settings that name rows, each source of which may have a task."""
_BATCH_SIZE = ("train.micro_batch_size", "train.gradient_accumulation_steps", "train.micro_batch_tokens")
"""Settings that cut a step into micro batches. Of the first two only the product with the number of ranks is compared:
the rows of one step over all ranks."""
_SCORED = ("output.sample_answers", "output.sample_tokens")
"""Settings that the metric may depend on by which the best checkpoint is chosen."""
_HARMLESS = (
    "train.learning_rate", "train.weight_decay", "train.warmup_ratio", "train.scheduler", "train.epochs",
    "train.max_steps", "train.max_grad_norm", "train.max_skipped_steps", "train.gradient_checkpointing",
    "train.reduce_dtype", "train.early_stopping_patience", "train.early_stopping_threshold",
    "train.metric_for_best_model", "optim.",
    "data.packing", "data.path", "data.split", "data.name", "data.revision", "data.encoding", "data.separator",
    "data.sheet", "data.validation_split", "data.test", "data.test_split", "model.name_or_path", "model.revision",
    "model.attn_implementation", "model.trust_remote_code",
)  # fmt: skip
"""Settings that may change with --resume-override: later steps differ, and earlier ones keep their meaning. Paths of
rows and weights may change because their fingerprints may not."""


class CheckpointState(BaseModel):
    """Content of ``state.json``: position in the run, fingerprints of its inputs, and versions that wrote it.

    A field that is added must have a default, for checkpoints of earlier versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: int = Field(ge=0)
    """Optimizer steps done."""
    total_steps: int = Field(ge=0)
    """Optimizer steps of the whole run."""
    epoch: int = Field(ge=0)
    """Epochs done."""
    cursor: int = Field(ge=0)
    """Rows of the next epoch that are done, over all ranks, in the order of its permutation."""
    rows: int = Field(ge=1)
    """Training rows."""
    order: str
    """SHA-256 of the permutation of the next epoch."""
    global_batch: int = Field(ge=1)
    """Rows of one optimizer step over all ranks."""
    phase: int = Field(0, ge=0)
    """Phase of the mask's schedule in which the last step was done, from 0."""
    schedule_step: int = Field(ge=0)
    """Steps that the learning-rate scheduler has done."""
    engine: str
    ranks: int = Field(ge=1)
    eval_loss: float | None = None
    """Validation loss after this step, in checkpoints of version 0.1; newer ones have it in ``evaluation.json``."""
    totals: dict[str, float] = Field(default_factory=dict)
    """Sums since the run began (tokens, seconds …) and of the epoch that is under way; mean loss of each epoch done."""
    fingerprints: dict[str, str]
    """SHA-256 of data, test rows if there are some, tokenizer, chat template, base model and the mask's schedule."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and the libraries that wrote the checkpoint."""
    recipe: dict[str, Any]

    def resumed_total_steps(self, config: RunConfig, ranks: int) -> int:
        """Return the total steps of the run if it resumes from here with ``config`` on ``ranks`` ranks."""
        train = config.train
        batch = global_batch(train.micro_batch_size, train.gradient_accumulation_steps, ranks)
        steps_left = math.ceil((self.rows - self.cursor) / batch)
        steps_left += (train.epochs - self.epoch - 1) * math.ceil(self.rows / batch)
        total = self.step + max(steps_left, 0)
        return min(total, train.max_steps or total)


def read_state(checkpoint: Path) -> CheckpointState:
    """Read the state of a checkpoint of this or an earlier version.

    Raises:
        CheckpointError: the state is missing or damaged.
        NewerVersionError: it has keys that only a newer version knows.
    """
    try:
        content = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and (unknown := content.keys() - CheckpointState.model_fields):
            versions = content.get("versions")
            writer = versions.get("frostline") if isinstance(versions, dict) else None
            raise newer_version(checkpoint, writer, f"{STATE_FILE} has {', '.join(sorted(unknown))}")
        return CheckpointState.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise damaged(checkpoint, [f"{STATE_FILE} cannot be read ({where}: {fault['msg']})"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(checkpoint, [f"{STATE_FILE} cannot be read ({error})"]) from None


def recipe_differences(state: CheckpointState, config: RunConfig, ranks: int) -> tuple[list[str], list[str]]:
    """Compare a checkpoint's recipe with ``config``; return the refused differences and those that may be overridden.

    Each is one line of text. ``--resume-override`` accepts the second kind.
    """
    refused: list[str] = []
    harmless: list[str] = []
    before = _flatten(RunConfig().model_dump(mode="json"))  # keys newer than the checkpoint count as their defaults
    old, new = {**before, **_flatten(_with_defaults(state.recipe))}, _flatten(config.model_dump(mode="json"))
    for key in dict.fromkeys([*new, *old]):
        is_scored = config.train.metric_for_best_model != "loss" and key in _SCORED
        if (key.startswith(_IRRELEVANT) and not is_scored) or key in _BATCH_SIZE or old.get(key) == new.get(key):
            continue
        difference = f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
        (harmless if is_scored or key.startswith(_HARMLESS) else refused).append(difference)
    micro, accumulation = config.train.micro_batch_size, config.train.gradient_accumulation_steps
    if (batch := global_batch(micro, accumulation, ranks)) != state.global_batch:
        harmless.append(
            f"a step took {state.global_batch} rows, takes {batch} now (micro batch {micro} x "
            f"accumulation {accumulation} x {ranks} ranks): the steps that are left would "
            "be others. Keep the product of the three, or override: the run then goes on with the next row"
        )
    return refused, harmless


def fingerprint_differences(state: CheckpointState, now: Mapping[str, str], order: str) -> Iterator[str]:
    """Yield a line for each of data, tokenizer, template, model and schedule that differs from a checkpoint's.

    ``now`` holds this run's fingerprints, ``order`` the SHA-256 of its row order in the checkpoint's epoch.
    """
    data = state.recipe.get("data", {})
    is_drawn = data.get("folds") is not None or isinstance(data.get("test"), float)  # another file may be reported on
    for name, meaning in _MEANINGS.items():
        if name == "test" and not (is_drawn and name in state.fingerprints and name in now):
            continue
        if state.fingerprints.get(name) != now[name]:
            yield f"{meaning} (SHA-256 {state.fingerprints.get(name, 'unknown')[:12]} then, {now[name][:12]} now)"
    if state.fingerprints.get("data") == now["data"] and state.order != order:
        yield f"this torch gives epoch {state.epoch + 1} another order of rows; use the version that wrote it"


def input_differences(state: CheckpointState, other: CheckpointState) -> Iterator[str]:
    """Yield a line for each of model, rows, tokenizer and template that two checkpoints of other runs do not share."""
    for name in ("base", "data", "tokenizer", "chat_template"):
        then, now = (one.fingerprints.get(name, "unknown") for one in (state, other))
        if then != now:
            yield f"{_MEANINGS[name]} (SHA-256 {then[:12]} then, {now[:12]} now)"


_MEANINGS = {
    "base": "the weights of the base model have changed since",
    "data": "the rows, or the ids that this version makes of them, have changed since",
    "test": "the test rows, or those that the fold holds out, have changed since",
    "tokenizer": "the tokenizer has changed since",
    "chat_template": "the chat template has changed since",
    "schedule": "it was trained under another mask.schedule or mask.rotation: phases begin, end or train otherwise",
}


def _with_defaults(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's recipe with the defaults of keys that entries of its mask did not have yet."""
    try:
        return {**recipe, "mask": MaskConfig.model_validate(recipe["mask"]).model_dump(mode="json")}
    except (KeyError, ValidationError):
        return recipe


def _without_tasks(named: Any) -> Any:
    """Return what names rows without the sources' own tasks, which count as ``data.task`` does."""
    if not isinstance(named, list):
        return named
    return [{**entry, "task": None} if isinstance(entry, dict) else entry for entry in named]


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe by ``section.key``."""
    return {
        f"{section}.{key}": _without_tasks(value) if (section, key) in _SOURCES else value
        for section, keys in values.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }

"""Export a run: a model directory that ``from_pretrained`` loads, or a delta for the base model."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from toolkit.checkpoint.choice import ChosenCheckpoint, Step
from toolkit.checkpoint.delta import Delta, save_delta
from toolkit.config.recipe import dump
from toolkit.data.chat_rendering import Rendering, read_rendering
from toolkit.exporting.quantised_base import merged_base_text
from toolkit.inference.model_source import cast_weights
from toolkit.inference.open_model import open_model, read_run
from toolkit.mask.apply import merge_adapters, parameters_by_name, round_to_nearest
from toolkit.mask.audit import audit_markdown
from toolkit.mask.row_layers import merge_rows
from toolkit.models.load import Dtype
from toolkit.models.source_files import TEMPLATES_FOLDER
from toolkit.models.weight_files import WeightComparison, join_names
from toolkit.optim.rounding import stochastic_round
from toolkit.runtime.errors import CheckpointError, DiskError, UsageError
from toolkit.runtime.own_files import is_real_directory
from toolkit.runtime.paths import make_parent

Rounding = Literal["nearest", "stochastic"]


def export_model(
    run: Path,
    target: Path,
    dtype: Dtype | None = None,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    rounding: Rounding = "nearest",
) -> None:
    """Write the whole trained model with tokenizer, chat template and model card, in the base model's format.

    Trained tensors come from the fp32 masters; an untied head is saved as its own tensor, with
    ``tie_word_embeddings: false``. See ``toolkit.export`` for arguments and errors.
    """
    check_paths(run, target)
    opened = open_model(str(run), step, base, trust_remote_code)
    delta, choice = opened.delta, opened.choice
    assert delta is not None  # the source is a run
    assert choice is not None
    _write_masters(opened.loaded.model, delta, dtype, rounding)
    opened.loaded.model.config.use_cache = True
    audit = audit_markdown(delta.mask, opened.loaded.anatomy)
    with staging_directory(target) as staging:
        comparison = opened.loaded.save(staging, opened.encoder.stop_ids())
        write_chat_template(opened.rendering, staging)
        card = _model_card(choice, delta, audit, dump(opened.config), comparison)
        (staging / "README.md").write_text(card, encoding="utf-8")


def export_delta(run: Path, target: Path, dtype: Dtype = "float32", step: Step | None = None) -> None:
    """Write the trained tensors alone, with the mask, and name and hash of the base model; see ``toolkit.export``."""
    check_paths(run, target)
    _, delta = read_run(run, step)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in delta.tensors.items()}
    with staging_directory(target) as staging:
        save_delta(Delta(tensors, delta.mask, delta.base), staging)
        read_rendering(run).save(staging)


def write_chat_template(rendering: Rendering, directory: Path) -> None:
    """Write the run's own chat template, if it has one, in place of the base model's."""
    if rendering.template is None:
        return
    (directory / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(directory / TEMPLATES_FOLDER, ignore_errors=True)
    (directory / "chat_template.jinja").write_text(rendering.template, encoding="utf-8")


@torch.no_grad()
def _write_masters(model: PreTrainedModel, delta: Delta, dtype: Dtype | None, rounding: Rounding) -> None:
    """Cast the model to ``dtype``, with the masters of ``delta`` and its merged adapters rounded to that only once.

    Stochastic rounding goes up or down, by a fixed seed, with probabilities that preserve the value on average, so that
    small updates survive in some weights.

    Raises:
        UsageError: ``rounding`` is stochastic, and the model is not to be bfloat16.
    """
    target: torch.dtype = getattr(torch, dtype) if dtype is not None else model.dtype
    round_into, generator = round_to_nearest, torch.Generator().manual_seed(0)
    if rounding == "stochastic":
        if target != torch.bfloat16:
            raise UsageError(
                f"--rounding stochastic rounds to bfloat16, and this export is {str(target).removeprefix('torch.')}; "
                "add --dtype bfloat16, or leave out --rounding"
            )

        def round_into(exact: torch.Tensor, out: torch.Tensor) -> None:
            if out.dtype != torch.bfloat16:  # some models keep a few weights in float32
                round_to_nearest(exact, out)
            else:
                noise = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32)
                stochastic_round(exact.float().clone(), noise, out)

    merge_adapters(model, delta.tensors, target, round_into)
    cast_weights(model, target)
    merge_rows(model, delta.tensors, round_into)
    merged = {f"{module}.weight" for adapter in delta.mask.adapters for module in adapter.modules}
    for name, parameter in sorted(parameters_by_name(model).items()):
        if name in delta.tensors and name not in merged:
            round_into(delta.tensors[name], parameter.detach())


def check_paths(run: Path, target: Path) -> None:
    """Raise CheckpointError if ``run`` is no run directory or ``target`` is not empty; create its parent."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not a run directory (no config.yaml); expected one such as runs/quickstart")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another --output, or remove it")
    if target.is_symlink() and not target.exists():
        raise CheckpointError(
            f"{target} is a link that leads nowhere; make what it leads to, or choose another --output"
        )
    if os.path.realpath(target.parent) == os.path.realpath(run / "checkpoints"):
        raise CheckpointError(f"{target} would be among the checkpoints of the run; choose another --output")
    make_parent(target)


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Yield a path at which the body creates a directory; it becomes ``target``, or is removed if the body fails.

    Each export has a staging directory of its own. Of two into one target the first that is done is published whole.

    Raises:
        DiskError: the files cannot be written.
        CheckpointError: another export was published at ``target`` meanwhile.
    """
    own = target.with_name(f".{target.name}.{uuid.uuid4().hex}.staging")
    descriptor = None
    try:
        _remove_abandoned(target)
        own.mkdir()
        descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks: what a killed export leaves is the user's to remove
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield own / "export"
        _publish(own / "export", target)
    except OSError as error:
        raise DiskError(f"{target} cannot be written ({error}); make room, or choose another --output") from None
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _publish(staging: Path, target: Path) -> None:
    """Rename a directory to ``target``, which is missing or an empty directory."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{target} was written by another process while this export ran; it is left as it is. Choose another "
            "--output, or remove it"
        ) from None


def _remove_abandoned(target: Path) -> None:
    """Remove what exports into ``target`` left that were killed: staging directories whose lock nobody holds."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.staging")
    for left in filter(is_real_directory, list(target.parent.iterdir())):
        if not name.fullmatch(left.name):
            continue
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _model_card(choice: ChosenCheckpoint, delta: Delta, audit: str, recipe: str, weights: WeightComparison) -> str:
    """Return the README.md of an exported model, with the mask's ``audit`` as Markdown and the ``recipe`` as YAML."""
    base = delta.base.config
    notes = (
        "\n\nThe head is its own tensor here; in the base model it is tied to the embeddings."
        if delta.mask.tied == "untie"
        else ""
    ) + merged_base_text(delta.mask)
    return f"""---
base_model: {base.name_or_path}
library_name: transformers
tags: [frostline, partial-fine-tuning]
---

# {base.name_or_path}, partially fine-tuned

Fine-tuned with Frostline from {base.name_or_path} (revision {base.revision or "unpinned"}, SHA-256 of its weights as
{base.dtype} {delta.base.sha256}): only the tensors marked as trained below were updated.{notes}

{_comparison_text(weights)}

{audit}

## Training

The weights are those of {choice.advice("which was not exported")}.

```yaml
{recipe}```

The licence and the intended use are those of the base model. The answers of a language model are no medical advice.
"""


def _comparison_text(weights: WeightComparison) -> str:
    """Return the paragraph of the model card on how the written files compare with the base model's."""
    counts = [
        (weights.identical, "bit-identical to the base model's"),
        (weights.same_values, "of the same values in another precision"),
        (weights.rounded, "the base model's values rounded, and otherwise unchanged"),
        (len(weights.changed), "of other values"),
        (len(weights.added), f"not in the base model ({join_names(weights.added, 4)})"),
        (len(weights.carried), f"not used by the model and copied as they are ({join_names(weights.carried, 4)})"),
    ]
    lines = [f"- {count:,} {what}" for count, what in counts if count]
    return "\n".join(["Of the tensors in these files, compared with the base model's files one by one:", "", *lines])

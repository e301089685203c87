"""Choose how a bfloat16 model on a CPU computes its products: once a run, the same on all ranks and after a resume."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from toolkit.models.attention_gradients import QUERIES, blocks_are_faster, mark_attention
from toolkit.models.faster_way import machine
from toolkit.models.float32_gradients import bfloat16_is_emulated, float32_is_faster, use_float32_gradients
from toolkit.models.padded_rows import pad_rows
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.paths import explain_refused_write, replace_text

log = logging.getLogger("frostline")

_FILE_NAME = "gradients.json"


@dataclass(frozen=True)
class GradientChoice:
    """Says how bfloat16 gradients, and outputs of layers, are computed on a CPU. Another choice moves last bits."""

    in_float32: bool
    """Products of layers and head, and attention, in float32, rounded once; else in bfloat16."""
    attention_in_blocks: bool
    """Attention in float32 for some queries at a time, where it is causal without a mask."""
    machine: str
    """Processor and torch that it was measured with."""
    forward_in_float32: bool = False
    """Outputs of layers in float32, rounded once, where products are: on a CPU without bfloat16 instructions."""

    @property
    def text(self) -> str:
        """Describe it for the log."""
        layers = "in float32, rounded once" if self.in_float32 else "in bfloat16"
        attention = "in float32" if self.in_float32 else "in bfloat16"
        if self.attention_in_blocks:
            attention = f"in float32, {QUERIES} queries at a time"
        outputs = "outputs and " if self.forward_in_float32 else ""
        return f"{outputs}gradients of linear layers {layers}, gradients of attention {attention}"


def choose_gradients(
    model: PreTrainedModel, tokens: int, world: World, run_dir: Path | None, resumes: bool
) -> GradientChoice | None:
    """Choose how ``model`` computes its gradients, and let it; every rank calls it. None where there is no choice.

    Rank 0 takes what was measured on this machine for rows of about ``tokens`` tokens, and keeps it in ``run_dir``, if
    there is one. A run that ``resumes`` goes on with what it began with, whatever this machine is faster at.

    Raises:
        CheckpointError: the record of the run cannot be read.
        DiskError: the run directory cannot be written.
    """
    if world.device.type != "cpu" or model.dtype != torch.bfloat16:
        return None
    choice = world.on_main(lambda: _recorded(run_dir) if resumes and run_dir else _measured(tokens, run_dir))
    apply_choice(model, choice)
    return choice


def apply_choice(model: PreTrainedModel, choice: GradientChoice | None) -> None:
    """Let ``model``, before a mask is applied, compute as a run does; without a choice it stays as it is."""
    if choice is None:
        return
    if choice.in_float32:
        use_float32_gradients(model, choice.forward_in_float32)
    else:
        pad_rows(model)
    mark_attention(model, choice.in_float32, choice.attention_in_blocks)


def _measured(tokens: int, run_dir: Path | None) -> GradientChoice:
    """Choose what this machine is faster at, and write it into the run directory."""
    in_float32 = float32_is_faster()
    forward = in_float32 and bfloat16_is_emulated()
    choice = GradientChoice(in_float32, blocks_are_faster(tokens, in_float32), machine(), forward)
    if run_dir is not None:
        with explain_refused_write(run_dir):
            replace_text(run_dir / _FILE_NAME, json.dumps(asdict(choice)) + "\n")
    log.info("%s: this CPU is faster at it", choice.text)
    return choice


def _recorded(run_dir: Path) -> GradientChoice:
    """Read the choice that a run began with; one without a record began before attention had a choice of its own."""
    path = run_dir / _FILE_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        choice = GradientChoice(**saved)
        if [type(value) for value in asdict(choice).values()] != [bool, bool, str, bool]:
            raise ValueError(f"found {saved}")
    except FileNotFoundError:
        choice = GradientChoice(float32_is_faster(), False, machine())
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); expected in_float32, attention_in_blocks, machine and "
            "forward_in_float32. Restore it; without the file the run goes on as runs did before they had one"
        ) from None
    here = (
        ""
        if choice.machine in (machine(), machine(is_short=True))
        else f" on another machine ({choice.machine}; this is {machine()})"
    )
    log.info("%s: as the run began%s", choice.text, here)
    return choice

"""Record a run: plan and masks in its directory, its peak memory, settings of the recipe without effect."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedTokenizerBase

from toolkit.checkpoint.run_directory import RECORD_FILE
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import Dataset
from toolkit.mask.audit import AuditRow
from toolkit.mask.schedule import Schedule
from toolkit.optim.groups import is_rate_always_zero
from toolkit.planning.planner import Plan
from toolkit.planning.table import as_dict
from toolkit.runtime.json_text import to_json
from toolkit.runtime.own_files import NotOwnError
from toolkit.runtime.paths import replace_bytes, replace_text
from toolkit.training.monitor import peak_memory_gib


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory of one rank."""

    peak: float
    """GiB; see ``peak_memory_gib``."""
    libraries: float | None
    """GiB of Python and what it had imported, measured before the model was loaded; None on a GPU, where only what
    torch's allocator gave counts."""

    @classmethod
    def measure(cls, device: torch.device, library_bytes: int) -> MemoryUse:
        """Measure this process, which computes on ``device``, so far."""
        return cls(peak_memory_gib(device), None if device.type == "cuda" else library_bytes / 2**30)

    def text(self, planned: float | None) -> str:
        """Describe it for the last line of a run; ``planned`` is the peak of its tensors in GiB, if it was planned."""
        what = "peak memory" if self.libraries is not None else "peak GPU memory"
        parts = []
        if self.libraries is not None:
            parts.append(f"{self.libraries:.2f} Python and libraries before the model")
        since = self.peak - (self.libraries or 0.0)
        if planned is None:
            parts.append(f"{since:.2f} since" if parts else "as torch allocated it; it could not be planned")
        elif since >= planned:
            parts += [f"{planned:.2f} tensors as planned", f"{since - planned:.2f} other"]
        else:
            parts.append(f"{since:.2f} since, where {planned:.2f} of tensors were planned")
        return f"{what} {self.peak:.2f} GiB ({', '.join(parts)})"


def save_record(run: Path, schedule: Schedule, dataset: Dataset, plan: Plan | None) -> None:
    """Write mask, schedule, plan, the files of the rows and skipped rows into the run directory."""
    schedule.phases[-1].delta_mask.save(run / "mask.json")
    if len(schedule.phases) > 1:
        name = "schedule.json" if schedule.rotation is None else "rotation.json"
        replace_text(run / name, to_json(schedule.as_list(), indent=1))
    save_plan(run, plan)
    dataset.save_sources(run / "data_files.json")
    dataset.save_skipped(run / "skipped_rows.jsonl")


def save_facts(run: Path, parts: Sequence[AuditRow], dataset: Dataset, device: torch.device) -> None:
    """Write what the report needs and no other file says: parts of the model, task, numbers of rows, hardware.

    ``parts`` are those of the mask that the run ends with, as a model card states them.
    """
    record = {
        "parts": [asdict(row) for row in parts],
        "task": dataset.task,
        "rows": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
            "skipped": len(dataset.skipped),
            "shortened": dataset.rows.shortened,
        },
        "hardware": {
            "kind": device.type,
            "device": device_name(device),
            "cpu_cores": os.cpu_count(),
            "system": platform.platform(),
        },
    }
    replace_text(run / RECORD_FILE, to_json(record, ensure_ascii=False, indent=1))


def save_tokenizer(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer, with its added tokens, into the run directory; links in its place are not followed."""
    folder = run / "tokenizer"
    if folder.is_symlink():
        raise NotOwnError(folder, "is a symbolic link")
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory() as staging:
        tokenizer.save_pretrained(staging)
        for path in sorted(Path(staging).iterdir()):
            replace_bytes(folder / path.name, path.read_bytes())


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if name := re.search(r"^model name\s*:\s*(.+)$", told, flags=re.M):
            return name[1]
    return platform.processor() or platform.machine()


def save_plan(run: Path, plan: Plan | None) -> None:
    """Write the plan of the run, if it can be planned."""
    if plan is not None:
        replace_text(run / "plan.json", to_json(as_dict(plan), indent=1))


def unused_settings(config: RunConfig, total_steps: int, device: torch.device) -> Iterator[str]:
    """Yield a line for each setting of the recipe that has no effect in a run of ``total_steps`` steps."""
    if config.optim.name == "paged_adamw_8bit" and device.type == "cpu":
        yield "optim.name: paged_adamw_8bit pages nothing here and is adamw_8bit: the run computes on the CPU"
    if is_rate_always_zero(config.train, total_steps):
        steps = "one optimizer step" if total_steps == 1 else f"{total_steps} optimizer steps"
        yield (
            f"this run has {steps}, and the learning rate is 0 at {'it' if total_steps == 1 else 'each of them'}: the "
            f"warmup (train.warmup_ratio: {config.train.warmup_ratio:g}) rises from 0, so nothing will be learned. "
            "Expected more steps (rows, train.epochs, or fewer rows a step), or train.warmup_ratio: 0"
        )

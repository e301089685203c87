"""What the peers' processes share: their command line, and a clock for those that train with transformers' Trainer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.record import Record
from benchmarks.workload import Workload


def arguments(*switches: str) -> argparse.Namespace:
    """Parse the command line of a peer: workload, record, a scratch directory, and its switches."""
    parser = argparse.ArgumentParser()
    for name in ("workload", "record", "scratch"):
        parser.add_argument(name, type=Path)
    for switch in switches:
        parser.add_argument(switch, action="store_true")
    return parser.parse_args()


def load_model(workload: Workload) -> Any:
    """Load the workload's model in its precision, on the GPU if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(workload.model, dtype=getattr(torch, workload.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def labelled_rows(workload: Workload) -> list[dict[str, list[int]]]:
    """Return the rows of all epochs, one after the other, with -100 as the label of what is not supervised."""
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]}
        for ids, start in workload.sequence
    ]


def trainer_settings(workload: Workload, scratch: Path) -> dict[str, Any]:
    """Return the workload as transformers' TrainingArguments name it; the epochs lie end to end in one."""
    return {
        "output_dir": str(scratch), "num_train_epochs": 1, "per_device_train_batch_size": workload.micro_batch,
        "learning_rate": workload.learning_rate, "warmup_steps": workload.warmup_steps,
        "lr_scheduler_type": "linear", "weight_decay": 0.01, "max_grad_norm": 1.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True,
        "seed": workload.seed,
    }  # fmt: skip


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Fills a record from the Trainer's events."""

    def __init__(self) -> None:
        self.record = Record()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Count what trains."""
        self.record.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time."""
        self.record.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the time once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.record.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        """Note the loss of the step."""
        if "loss" in logs:
            self.record.losses.append(float(logs["loss"]))


def finish(record: Record, path: Path) -> None:
    """Write the record, with the most memory that was held on the GPU."""
    record.gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    record.save(path)

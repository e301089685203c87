"""TRL's SFTTrainer on bfloat16 weights: ``trl_sft.py WORKLOAD RECORD SCRATCH [--checkpointing]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.common import Clock, arguments, finish, labelled_rows, load_model, trainer_settings
from benchmarks.plain_loop import train_top
from benchmarks.workload import Workload

if __name__ == "__main__":
    given = arguments("--checkpointing")
    workload = Workload.read(given.workload)
    model = load_model(workload)
    train_top(model, workload)
    clock = Clock()
    settings = trainer_settings(workload, given.scratch)
    SFTTrainer(
        model=model,
        args=SFTConfig(
            **settings, gradient_checkpointing=given.checkpointing, train_sampling_strategy="sequential",
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(labelled_rows(workload)),
        callbacks=[clock],
    ).train()  # fmt: skip
    finish(clock.record, given.record)

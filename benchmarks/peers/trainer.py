"""transformers' Trainer on bfloat16 weights: ``trainer.py WORKLOAD RECORD SCRATCH [--checkpointing]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

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
    Trainer(
        model=model,
        args=TrainingArguments(
            **settings, gradient_checkpointing=given.checkpointing, train_sampling_strategy="sequential"
        ),
        train_dataset=labelled_rows(workload),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(workload.model)),
        callbacks=[clock],
    ).train()
    finish(clock.record, given.record)

"""LLaMA-Factory's ``freeze``, on token ids: ``llama_factory.py WORKLOAD RECORD SCRATCH [--checkpointing]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp

from benchmarks.peers.common import Clock, arguments, finish, labelled_rows, trainer_settings
from benchmarks.workload import Workload

if __name__ == "__main__":
    given = arguments("--checkpointing")
    workload = Workload.read(given.workload)
    tokens = given.scratch / "tokens"
    DatasetDict({"train": Dataset.from_list(labelled_rows(workload))}).save_to_disk(str(tokens))
    clock = Clock()
    settings = {
        "stage": "sft", "do_train": True, "finetuning_type": "freeze", "freeze_trainable_layers": workload.last,
        "freeze_extra_modules": "lm_head", "model_name_or_path": workload.model, "template": "empty",
        "tokenized_path": str(tokens), "dataset": "in tokenized_path", "disable_shuffling": True,
        "bf16": True, "flash_attn": "sdpa",
        "disable_gradient_checkpointing": not given.checkpointing,
    }  # fmt: skip
    run_exp({**trainer_settings(workload, given.scratch / "run"), **settings}, callbacks=[clock])
    finish(clock.record, given.record)

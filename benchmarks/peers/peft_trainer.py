"""peft's LoRA under transformers' Trainer, bfloat16: ``peft_trainer.py WORKLOAD RECORD SCRATCH [--everywhere]``.

The adapters are peft's own, in float32 as it keeps them, beside every linear layer of the workload's last blocks, or of
all blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.peers.common import Clock, arguments, finish, labelled_rows, load_model, trainer_settings
from benchmarks.workload import Workload

if __name__ == "__main__":
    given = arguments("--everywhere")
    workload = Workload.read(given.workload)
    model = load_model(workload)
    blocks = model.config.num_hidden_layers
    first = 0 if given.everywhere else blocks - workload.last
    layers = [
        f"model.layers.{index}.{name}"
        for index in range(first, blocks)
        for name, module in model.model.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
    clock = Clock()
    Trainer(
        model=model,
        args=TrainingArguments(**trainer_settings(workload, given.scratch), train_sampling_strategy="sequential"),
        train_dataset=labelled_rows(workload),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(workload.model)),
        callbacks=[clock],
    ).train()
    finish(clock.record, given.record)

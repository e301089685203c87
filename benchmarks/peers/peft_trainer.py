"""peft's LoRA under transformers' Trainer: ``peft_trainer.py WORKLOAD RECORD SCRATCH [--everywhere]``.

The adapters are peft's own, in float32 as it keeps them, beside every linear layer of the workload's last blocks, or of
all blocks. If the workload has validation rows, their mean loss a token after each epoch goes to
SCRATCH/validation.json, and the adapters to SCRATCH/epoch-N.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.common import Clock, arguments, finish, labelled_rows, load_model, trainer_settings
from benchmarks.workload import Workload


class Validation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Computes the validation rows' loss and saves the adapters after each epoch, which the Trainer knows not of."""

    def __init__(self, workload: Workload, scratch: Path) -> None:
        self.workload, self.scratch = workload, scratch
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Do so after the last step of an epoch."""
        steps = len(self.workload.orders[0]) // self.workload.micro_batch
        if state.global_step % steps or not self.workload.validation:
            return
        model.eval()
        nats, tokens = 0.0, 0
        with torch.no_grad():
            for ids, start in self.workload.validation:
                row = torch.tensor([ids], device=model.device)
                logits = model(input_ids=row).logits[0, start - 1 : -1].float()
                nats += float(nn.functional.cross_entropy(logits, row[0, start:], reduction="sum"))
                tokens += len(ids) - start
        model.train()
        self.losses.append(nats / tokens)
        model.save_pretrained(self.scratch / f"epoch-{len(self.losses)}")
        (self.scratch / "validation.json").write_text(json.dumps(self.losses), encoding="utf-8")


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
    torch.manual_seed(workload.seed)  # of the adapters' start
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers, task_type="CAUSAL_LM"))
    clock = Clock()
    Trainer(
        model=model,
        args=TrainingArguments(**trainer_settings(workload, given.scratch), train_sampling_strategy="sequential"),
        train_dataset=labelled_rows(workload),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(workload.model)),
        callbacks=[clock, Validation(workload, given.scratch)],
    ).train()
    finish(clock.record, given.record)

"""The part of ``benchmarks/gpu.py`` that trains: short runs by the public command."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import toolkit
from benchmarks.gpu_table import Row, Sizes, has_bitsandbytes
from benchmarks.prepare import SAMPLE, first_rows
from benchmarks.shapes import Shape, write_model
from benchmarks.workload import ROOT

SHORT = Shape(128, 6, 4, 2, 256, 260)
"""Of the model of the short runs."""
RUNS: dict[str, tuple[dict[str, object], float | None]] = {
    "cold cache": ({}, 2e-2),
    "warm cache": ({}, 2e-2),
    "sample answers": ({"output.sample_answers": 1, "output.sample_tokens": 8}, 2e-2),
    "activation checkpointing": ({"train.gradient_checkpointing": "on"}, 2e-2),
    "prefix on the host": ({"prefix.cache": "off", "prefix.placement": "cpu"}, 2e-2),
    "prefix on disk": ({"prefix.cache": "off", "prefix.placement": "disk"}, 2e-2),
    "int8 prefix on the host": ({"prefix.precision": "int8", "prefix.placement": "cpu"}, 0.2),
    "nf4 prefix": ({"prefix.precision": "nf4"}, 0.2),
    "adamw_8bit": ({"optim.name": "adamw_8bit"}, 5e-2),
    "adapters": ({"mask.train": [{"lora": {"select": "last:2"}}], "train.learning_rate": 5e-3}, None),
    "checkpoints in the background": ({"output.save_every_steps": 2}, 2e-2),
    "packed": ({"train.micro_batch_size": 4}, None),
    "padded": ({"train.micro_batch_size": 4, "data.packing": "off"}, None),
}
"""What each run changes of the first, and how far a step's loss may be from that run's; none where steps differ."""
NEED_BITSANDBYTES = {"int8 prefix on the host", "nf4 prefix", "adamw_8bit"}


def runs(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Train a small model in many ways by ``toolkit.train``; all losses agree with those of the plainest run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(SHORT, folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        shared = {
            "model.name_or_path": str(folder / "model"), "mask.train": ["last:2", "head"], "mask.tied": "error",
            "data.path": str(first_rows(SAMPLE, sizes.rows, folder)), "data.validation": 0.25,
            "data.max_length": 1024, "train.epochs": 3, "train.learning_rate": 1e-3,
            "output.sample_answers": 0, "prefix.cache_dir": str(folder / "cache"),
        }  # fmt: skip
        base = losses({**shared, "prefix.cache": "off", "output.dir": str(folder / "plain")})
        yield Row("run without cache: loss", f"{base[0]:.4f} to {base[-1]:.4f}", "falls", base[-1] < base[0])
        for title, (changes, allowed) in RUNS.items():
            if title in NEED_BITSANDBYTES and not has_bitsandbytes():
                yield Row(f"run, {title}", "left out: bitsandbytes is not installed")
                continue
            found = losses({**shared, **changes, "output.dir": str(folder / title.replace(" ", "-"))})
            if allowed is None:
                yield Row(f"run, {title}: loss", f"{found[0]:.4f} to {found[-1]:.4f}", "falls", found[-1] < found[0])
                continue
            off = max(abs(a - b) for a, b in zip(found, base, strict=True))
            yield Row(f"run, {title}: largest difference of a step's loss", f"{off:.4f}", f"{allowed}", off <= allowed)


def losses(overrides: Mapping[str, object]) -> list[float]:
    """Train to the end and return the loss of every step."""
    run = toolkit.train(ROOT / "recipes" / "quickstart.yaml", overrides).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 259 tokens, one a byte and three for turns, with a chat template."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return fast

"""Make a JSON file of what an earlier version of this toolkit wrote, and of the figures that it gave.

    git worktree add ../earlier 4e2adff
    python tests/old/make.py ../earlier tests/old/4e2adff.json

It calls only the scripts of that working tree, so it works at any commit. The weights are multiples of 1/8 by a
formula, which packs well; everything is float32, so that the figures hold on other machines. The reader is
tests/test_old_artefacts.py.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from pathlib import Path
from typing import Any

QUESTION = "does heat help?"
KILLED_AFTER = 4
"""Steps of the interrupted run's last checkpoint; the finished run has 8."""
TRAIN = (
    "--model.name_or_path", "model", "--model.dtype", "float32", "--data.path", "rows.jsonl",
    "--data.validation", "0.2", "--mask.train", "last:1", "--train.epochs", "2", "--train.learning_rate", "5e-2",
    "--output.dir", "finished", "--output.save_every_steps", "2", "--output.keep", "9",
    "--prefix.cache", "on", "--prefix.cache_dir", "cache",
)  # fmt: skip
LEFT_OUT = ("events.out.tfevents.*", ".lock", "README.md")
"""Locks, what names the host, and the model card, which no program reads."""


def make_model(folder: Path) -> None:
    """Write a Llama of 3 blocks of width 8 with a tied head, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    config = LlamaConfig(
        vocab_size=260, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" not in name:
                steps = torch.arange(parameter.numel()) * (7 + 2 * number)
                parameter.copy_(((steps * steps + 3 * steps) % 17 - 8).view_as(parameter) / 8)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def make_rows(path: Path) -> None:
    """Write five short rows; one is held out, and four make a step each."""
    rows = [
        {"QUESTION": f"does {a} help?", "CONTEXTS": [f"{a} is {b}."], "LONG_ANSWER": f"yes, {a} is {b}"}
        for a, b in (("rest", "good"), ("salt", "bad"), ("heat", "warm"), ("ice", "cold"), ("tea", "hot"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(checkout: Path, folder: Path, script: str, *flags: str) -> str:
    """Run one of the checkout's scripts in ``folder``; what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FROSTLINE_CACHE": str(folder / "home")}
    words = [sys.executable, str(checkout / "launch" / f"{script}.py"), *flags]
    return subprocess.run(words, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def interrupt(finished: Path, interrupted: Path) -> None:
    """Copy a finished run as one that was killed one step after its checkpoint of step ``KILLED_AFTER``."""
    shutil.copytree(finished, interrupted)
    for checkpoint in (interrupted / "checkpoints").glob("step-*"):
        if checkpoint.name != f"step-{KILLED_AFTER:08}":
            shutil.rmtree(checkpoint)
    for pointer in ("latest", "best"):
        (interrupted / "checkpoints" / pointer).write_text(f"step-{KILLED_AFTER:08}", encoding="utf-8")
    lines = (interrupted / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [line for line in lines if json.loads(line).get("step", 0) <= KILLED_AFTER + 1]
    (interrupted / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")


def packed(folder: Path) -> list[str]:
    """Return the files of a folder as lines of base64, of a tar archive without owners and times."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(path.match(pattern) for pattern in LEFT_OUT):
                entry = tarfile.TarInfo(str(path.relative_to(folder)))
                entry.size = path.stat().st_size
                tar.addfile(entry, io.BytesIO(path.read_bytes()))
    return textwrap.wrap(base64.b64encode(archive.getvalue()).decode(), 116)


def unpack(lines: list[str], folder: Path) -> None:
    """Write what ``packed`` returned into a folder."""
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode("".join(lines)))) as tar:
        for entry in tar:  # extractall needs a filter, which Python 3.11 has from 3.11.4 on
            content = tar.extractfile(entry)
            assert content is not None  # files alone were packed
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


def make(checkout: Path, folder: Path) -> dict[str, Any]:
    """Have the checkout make everything in ``folder``; figures and files."""
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl")
    command(checkout, folder, "train", *TRAIN)
    evaluated = json.loads(command(checkout, folder, "evaluate", "finished").splitlines()[-1])
    answer = command(checkout, folder, "generate", "finished", "--question", QUESTION, "--max-new-tokens", "12")
    command(checkout, folder, "export", "finished", "--output", "export")
    command(checkout, folder, "export", "finished", "--output", "delta", "--delta")
    interrupt(folder / "finished", folder / "interrupted")
    metrics = (folder / "finished" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(folder / "home", ignore_errors=True)
    for checkpoint in sorted((folder / "finished" / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(checkpoint)
    return {
        "losses": [row["loss"] for row in map(json.loads, metrics) if "loss" in row],
        "eval_loss": evaluated["loss"],
        "answer": answer,
        "files": packed(folder),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="working tree of the earlier version")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--folder", type=Path, help="work there and leave the files, to look at")
    given = parser.parse_args()
    where = given.folder or Path(tempfile.mkdtemp())
    where.mkdir(parents=True, exist_ok=True)
    made = make(given.checkout.resolve(), where)
    given.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

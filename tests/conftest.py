"""Shared fixtures: a tiny model made on the spot, the sample rows, and a runner for the launch scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KOREAN = ROOT / "examples" / "data" / "clinical_qa_ko.jsonl"
ENGLISH = ROOT / "examples" / "data" / "clinical_qa_en.jsonl"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 6 blocks with a tied head, random float32 weights and a byte-level tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def make_tiny_model(directory: Path, tied: bool = True) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH.read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=0, pad_token_id=0,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def rows() -> list[dict[str, object]]:
    """The English sample rows."""
    return [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]


Launch = Callable[..., subprocess.CompletedProcess[str]]


def clean_environment() -> dict[str, str]:
    """The environment without a launcher's variables, single-threaded, warnings not turned into errors."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    return {**environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run a launch script in a new process from the repository root: ``launch("train", "--train.epochs", "1")``."""

    def run(
        script: str, *flags: object, launcher: list[str] | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        command = [*(launcher or [sys.executable]), str(ROOT / "launch" / f"{script}.py"), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=900)

    return run

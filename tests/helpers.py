"""What several tests need: paths, a tiny model made on the spot, runs in this process and in others."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KOREAN = ROOT / "examples" / "data" / "clinical_qa_ko.jsonl"
ENGLISH = ROOT / "examples" / "data" / "clinical_qa_en.jsonl"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
REFERENCE_MASK = ("--mask.train", "last:4", "head", "--mask.tied", "untie")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")


def make_tokenizer(special: tuple[str, ...] = SPECIAL, template: str = CHAT_TEMPLATE, **named: str) -> Any:
    """A byte-level tokenizer of 500 tokens with a chat template; the first special token ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH.read_text(encoding="utf-8").splitlines(), trainer)
    named = {"eos_token": special[0], "pad_token": special[0], **named}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    return fast


def tiny_llama(tied: bool = True) -> Any:
    """A Llama of 6 blocks with random float32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=0, pad_token_id=0,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_tiny_model(directory: Path, tied: bool = True) -> Path:
    """A model directory with ``tiny_llama`` and ``make_tokenizer``."""
    tiny_llama(tied).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def clean_environment() -> dict[str, str]:
    """The environment without any launcher's variables, one thread a process, offline."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in launcher and not key.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    return {**environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


_PORT_FLAGS = {"deepspeed": "--master_port", "torchrun": "--master_port", "accelerate": "--main_process_port"}
"""Each launcher's own default port may still be in use by the run before."""


def _ports_of_this_process() -> Iterator[int]:
    """Ports below those that the kernel gives to outgoing connections; each process of the tests begins elsewhere."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first, size = 12000 + worker % 4 * 5000, 5000
    for number in itertools.count(os.getpid()):
        yield first + number % size


_ports = _ports_of_this_process()


def free_port() -> int:
    """A port that nothing listens on, and that no other test is given in the next seconds."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("there is no free port")


may_start_ranks = True
"""False while a fast test runs; conftest.py sets it."""


def run_script(
    script: str,
    *flags: object,
    launcher: tuple[str, ...] = (sys.executable,),
    cwd: Path = ROOT,
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository in a new process, with ``environ`` over a clean environment."""
    if launcher[0] in _PORT_FLAGS:
        assert may_start_ranks, f"a test that starts {launcher[0]} is marked as distributed, which makes it slow"
        launcher = (*launcher, _PORT_FLAGS[launcher[0]], str(free_port()))
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    env = {**clean_environment(), **(environ or {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=3600)


_server: subprocess.Popen[str] | None = None


def run_ranks(script: str, *flags: object, ranks: int = 2, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository on several ranks, forked from a process that has imported everything already.

    For tests of what ranks do; those of how a launcher starts and ends them take ``run_script``.
    """
    global _server
    assert may_start_ranks, "a test that starts ranks is marked as distributed, which makes it slow"
    if _server is None or _server.poll() is not None:
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
        _server = subprocess.Popen(
            command, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert _server.stdin is not None
    assert _server.stdout is not None
    environ = {
        **clean_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        job = {
            "script": str(ROOT / script), "flags": [str(flag) for flag in flags], "ranks": ranks, "environ": environ,
            "cwd": str(cwd), "out": str(out), "err": str(err),
        }  # fmt: skip
        print(json.dumps(job), file=_server.stdin, flush=True)
        code = int(_server.stdout.readline())
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess([script, *job["flags"]], code, *said)


def run_here(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run launch/SCRIPT.py's command in this process, which has imported torch already."""
    main = importlib.import_module(f"toolkit.commands.{Path(script).stem}").main
    words, out, err = [str(flag) for flag in flags], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        from toolkit.commands.cli import run_command

        try:
            code = run_command(lambda: main(words))
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), err.getvalue())


def tiny_flags(model: Path, run: Path, *more: object) -> list[str]:
    """Flags of a short float32 run of the tiny model on the English sample; the mask is the reference's."""
    flags = [
        "--model.name_or_path", model, "--model.dtype", "float32", "--data.path", ENGLISH, "--data.validation", "none",
        *REFERENCE_MASK, "--train.learning_rate", "1e-3", "--output.dir", run, "--output.report", "[]",
        "--output.sample_answers", 0,
        *more,
    ]  # fmt: skip
    return [str(flag) for flag in flags]


def invocation(*flags: str) -> Any:
    """The parsed command line of launch/train.py."""
    from toolkit.config import flags as config_flags

    parser = config_flags.create_parser("test")
    config_flags.add_resume_override(parser)
    return config_flags.parse(parser, QUICKSTART, list(flags))


def set_up(given: Any, world: Any = None) -> Any:
    """A ``Trainer`` of the parsed command line before its first step."""
    from toolkit.runtime.distributed import World
    from toolkit.training.context import prepare
    from toolkit.training.trainer import Trainer

    trainer = Trainer(*prepare(given, world or World()), Path("unused"))
    trainer.begin(None)
    return trainer


def train(*flags: str) -> int:
    """Run launch/train.py's work in this process."""
    from toolkit.training.run import run

    return run(invocation(*flags))


def masters_of(checkpoint: Path) -> dict[str, Any]:
    """The trained tensors of a checkpoint, float32."""
    from toolkit.checkpoint.restore import Checkpoint

    return Checkpoint(checkpoint).delta().tensors


def reseal(checkpoint: Path) -> None:
    """Write a manifest that agrees with the files as they are: a forgery."""
    from toolkit.checkpoint.manifest import MANIFEST_FILE, write_manifest
    from toolkit.runtime.hashed_files import hash_files

    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    entries = hash_files(checkpoint, [name for name in names if name != MANIFEST_FILE])
    write_manifest(checkpoint, int(checkpoint.name.removeprefix("step-")), entries)


def metrics(run: Path, key: str = "loss") -> list[float]:
    """One column of ``metrics.jsonl``, rows without it left out."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows if key in row]

"""Measure a run's start on 20,000 and 200,000 generated rows: private memory, time for 1,000 rows, rows tokenised.

    python -m benchmarks.token_store [--rows 20000 200000] [--tokens 460] [--ranks 2]

Each size trains a model of one narrow block for one step, twice: the first start tokenises, the second finds the token
store. Memory is RssAnon, what a process does not share with the file; the peak of each rank's process and of its
largest worker are sampled every 20 ms. Of several ranks one tokenises, and the others wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_WORDS = "the fever of a patient with sepsis and low blood pressure was treated early by fluids".split()  # noqa: SIM905
_CHILD = "import json, sys; from benchmarks.token_store import start; start(*sys.argv[1:])"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--tokens", type=int, default=460, help="tokens of a row, roughly")
    parser.add_argument("--word-level", action="store_true", help="a tokenizer of whole words, for the memory alone")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run, on this machine")
    arguments = parser.parse_args()
    print("| rows | start | rank | s to the rows | s for 1,000 rows | rows tokenised | RssAnon, run "
          "| largest worker | s of its processor |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", arguments.word_level)
        for rows in arguments.rows:
            path = Path(folder) / f"{rows}.jsonl"
            write_rows(path, rows, arguments.tokens)
            for name in ("first", "second"):
                for rank, found in enumerate(_run(path, Path(folder), f"run-{rows}-{name}", arguments.ranks)):
                    seconds, tokenised = found["seconds"], found["tokenised"]
                    own, worker = (f"{found[key] / 2**20:.0f} MiB" for key in ("own", "worker"))
                    of_rows = f"{seconds:.1f} | {seconds / rows * 1000:.3f} | {tokenised:,}"
                    print(
                        f"| {rows:,} | {name} | {rank} | {of_rows} | {own} | {worker} | {found['processor']:.2f} |",
                        flush=True,
                    )


def _run(data: Path, folder: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    """Train one step on ``data`` by so many processes, and return what each of them found."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"FROSTLINE_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, founds = [], [folder / f"found-{rank}.json" for rank in range(ranks)]
    for rank, found in enumerate(founds):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, "-c", _CHILD, str(data), str(folder / "model"), str(folder / name), str(found)]
        environ = {**os.environ, **shared, **own}
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, cwd=ROOT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a process failed; its message is above")
    return [json.loads(found.read_text(encoding="utf-8")) for found in founds]


def make_model(path: Path, word_level: bool) -> None:
    """Save a model of two narrow blocks with SmolLM2's tokenizer, or one of words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.config.schema import ModelConfig
    from toolkit.inference.open_model import load_tokenizer_of

    tokenizer = word_tokenizer() if word_level else load_tokenizer_of(ModelConfig())
    tokenizer.save_pretrained(str(path))
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=2048,
        )
    ).save_pretrained(str(path))  # fmt: skip


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Write rows of about ``tokens`` tokens each, a word being one."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            words = draw.choices(_WORDS, k=tokens - 20)
            row = {
                "QUESTION": f"Question {number}?",
                "CONTEXTS": [" ".join(words[:-60])],
                "LONG_ANSWER": " ".join(words[-60:]),
            }
            file.write(json.dumps(row) + "\n")


def start(data: str, model: str, run: str, target: str) -> None:
    """Train one step on ``data`` in this process, and write what it took to ``target``."""
    import toolkit
    from toolkit.data.token_file import EncodedRows, StoreWriter
    from toolkit.training import loading

    tokenised, seconds = [0], [0.0, 0.0]
    append, load_rows = StoreWriter.append, loading.load_rows

    def count(writer: StoreWriter, rows: EncodedRows) -> None:
        tokenised[0] += rows.read
        append(writer, rows)

    def timed(config: Any, tokenizer: Any, world: Any, run_dir: Any) -> object:
        world.raise_if_stopping()  # all ranks are here: none counts the time that another takes to start
        began, used = time.perf_counter(), time.process_time()
        found = load_rows(config, tokenizer, world, run_dir)
        seconds[:] = time.perf_counter() - began, time.process_time() - used
        return found

    recipe = {
        "model.name_or_path": model, "model.dtype": "float32", "data.path": data, "data.task": "long_answer",
        "data.validation": None, "mask.train": ["last:1"], "train.max_steps": 1, "prefix.cache": "off",
        "output.dir": run,
    }  # fmt: skip
    patches = patch.object(StoreWriter, "append", count), patch("toolkit.training.context.load_rows", timed)
    with patches[0], patches[1], _Memory() as memory:
        toolkit.train(None, recipe)
    found = {"own": memory.own, "worker": memory.worker, "tokenised": tokenised[0], "seconds": seconds[0],
             "processor": seconds[1]}  # fmt: skip
    Path(target).write_text(json.dumps(found), encoding="utf-8")


def word_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are the words of the rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[END]", *dict.fromkeys(_WORDS)]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[END]", pad_token="[END]", unk_token="[UNK]"
    )  # fmt: skip


class _Memory:
    """Samples the peak of RssAnon of this process and of its largest child, in bytes, while entered."""

    def __init__(self) -> None:
        self.own = self.worker = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.02):
            self.own = max(self.own, private_bytes(this.pid))
            self.worker = max([self.worker, *map(private_bytes, _pids(this.children()))])


def private_bytes(pid: int) -> int:
    """Return RssAnon of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _pids(processes: Sequence[psutil.Process]) -> list[int]:
    return [process.pid for process in processes]


if __name__ == "__main__":
    main()

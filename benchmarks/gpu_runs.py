"""The parts of ``benchmarks/gpu.py`` that train: short runs by the public command, and steps of a large shape."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import toolkit
from benchmarks.floors import synchronise
from benchmarks.gpu_parts import CHUNK, Row, Sizes, has_bitsandbytes, median_ms
from benchmarks.prepare import SAMPLE, first_rows
from benchmarks.shapes import Shape, write_model
from benchmarks.update import by_hand
from benchmarks.workload import ROOT
from toolkit.activation_cache.cached_prefix import HiddenStates
from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.optim import master_adamw
from toolkit.runtime.distributed import World
from toolkit.split import supervised_loss
from toolkit.split.suffix import split
from toolkit.training.step import train_step

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
    "adamw_bf16": ({"optim.name": "adamw_bf16"}, 5e-2),
    "adamw_8bit": ({"optim.name": "adamw_8bit"}, 5e-2),
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


def steps(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time steps of the large shape on cached hidden states beside a plain loop; count kernels and waits."""
    with device:
        model = LlamaForCausalLM._from_config(sizes.shape.config(), dtype=torch.bfloat16)
    model.config.use_cache = False
    anatomy = detect_anatomy(model.train())
    mask = build_mask(MaskConfig(train=["last:4", "head"]), anatomy)
    apply_mask(model, mask, anatomy)
    prefix, suffix = split(model, anatomy, mask.boundary)
    assert prefix is not None
    batches = {case: random_batch(*case, sizes.shape.vocabulary).to(device) for case in sizes.batches}
    hidden = {case: prefix(batch) for case, batch in batches.items()}
    first = sizes.batches[0]
    yield Row("short cuts", suffix.choose_shortcuts(hidden[first], batches[first]).text)
    weights = trainable_parameters(suffix.model, mask)
    for fused in (False, True):
        step = by_hand(list(weights.values()), partial(torch.optim.AdamW, lr=1e-5, fused=fused))
        for case, batch in batches.items():
            taken = median_ms(partial(plain_step, model, batch, step), device)
            yield Row(f"plain loop{', fused AdamW' if fused else ''}, B T S = {case}, ms", f"{taken:.1f}")
        del step
    for title, block, piece in (
        ("as it is", supervised_loss.BLOCK_BYTES, master_adamw.LARGEST_PIECE),
        ("loss in blocks of 2^31", 2**31, master_adamw.LARGEST_PIECE),
        ("and the update in whole launches", 2**31, CHUNK),
    ):
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(supervised_loss, "BLOCK_BYTES", block))
            stack.enter_context(mock.patch.object(master_adamw, "LARGEST_PIECE", piece))
            engine = LocalEngine(suffix, weights, mask.groups, TrainConfig(), OptimConfig(), 100, World())

            def cached_step(case: tuple[int, int, int], engine: LocalEngine = engine) -> None:
                train_step([batches[case]], cast(HiddenStates, lambda batch: hidden[case]), engine, World())
                engine.moved_share()

            for case in sizes.batches:
                taken = median_ms(partial(cached_step, case), device)
                yield Row(f"step {title}, B T S = {case}, ms", f"{taken:.1f}")
            if device.type == "cuda":
                yield kernels(partial(cached_step, first), f"step {title}, B T S = {first}", device)
                yield waits(partial(cached_step, first), f"step {title}: waits for the device")
            del engine, cached_step
    if device.type == "cuda":
        yield Row("most memory of the steps, GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}")


def random_batch(rows: int, tokens: int, supervised: int, vocabulary: int) -> Batch:
    """Return rows of random token ids whose last ones are supervised, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator).tolist()
    return collate([Example(tuple(row), tokens - supervised) for row in ids], 0)


def plain_step(model: Any, batch: Batch, update: Callable[[], object]) -> None:
    """Take a step as a plain loop does: the whole model, whole logits, float32 masters."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[batch.supervised].float()
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits, batch.targets))
    update()


def kernels(work: Callable[[], object], what: str, device: torch.device) -> Row:
    """Count the kernels of a step and add up their time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        synchronise(device)
    launched = [event for event in profiled.events() or [] if event.device_type.name == "CUDA"]
    taken = sum(event.time_range.elapsed_us() for event in launched) / 1e3
    return Row(f"{what}: kernels and their ms", f"{len(launched)}, {taken:.2f}")


def waits(work: Callable[[], object], what: str) -> Row:
    """List the lines at which a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return Row(what, ", ".join(f"{line} x {count}" for line, count in lines.items()) or "none")

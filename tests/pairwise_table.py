"""What the pairwise suite combines: the values of every recipe key, launchers and DeepSpeed files, and the refusals."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from covering import Pair

LAUNCHERS = {
    "python": ("python",),
    "deepspeed 1": ("deepspeed", "--num_gpus", "1"),
    "deepspeed 2": ("deepspeed", "--num_gpus", "2"),
    "torchrun 2": ("torchrun", "--nproc_per_node", "2"),
}
DS = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")

GROUP = [{"select": ["blocks:3"], "learning_rate": 1e-4, "weight_decay": 0.1}, "blocks:5"]
ADAPTERS = {"lora": {"select": ["last:3"], "rank": 4, "alpha": 12, "dropout": 0.1, "rslora": True, "init": "gaussian"}}
MAGNITUDES = {
    "lora": {
        "select": ["last:2"], "targets": ["q_proj", "mlp.down_proj"], "rank": 2, "dora": True, "learning_rate": 1e-4,
        "weight_decay": 0.1, "base_precision": "int8",
    }
}  # fmt: skip
ROWS = {"rows": {"select": ["embeddings"], "from": 5, "to": 90, "learning_rate": 1e-3, "weight_decay": 0.1}}
HEAD_ROWS = {"rows": {"select": ["head"], "ids": [3, 8, 40]}}
QUANTISED = {"lora": {"select": ["last:3"], "rank": 4, "base_precision": "nf4"}}
VALUES: dict[str, dict[str, Any]] = {
    "model.delta": {"none": None, "a run": "DELTA"},
    "model.add_tokens": {"none": [], "two": ["<triage>", "<urgent>"]},
    "model.dtype": {"bfloat16": "bfloat16", "float32": "float32"},
    "model.attn_implementation": {"none": None, "eager": "eager", "sdpa": "sdpa"},
    "model.trust_remote_code": {"false": False, "true": True},
    "data.path": {
        "jsonl": "rows.jsonl", "csv": "rows.csv", "one bad row": "bad.jsonl", "conversations": "chat.jsonl",
        "a mixture": [
            {"path": "rows.jsonl", "weight": 0.5}, {"path": "more_*.jsonl.gz", "weight": 1.5, "task": "long_answer"},
            {"path": "prompts.jsonl", "task": "prompt_completion"},
        ],
    },
    "data.task": {"auto": "auto", "mapped": {"name": "long_answer", "columns": {"question": "QUESTION"}}},
    "data.train_on": {"none": None, "last": "last", "all": "all"},
    "data.chat_template": {"none": None, "chatml": "chatml"},
    "data.template_kwargs": {"none": {}, "a switch": {"enable_thinking": False}},
    "data.special_tokens": {"text": "text", "parse": "parse"},
    "data.normalize": {"nfc": "nfc", "off": "off"},
    "data.split": {"none": None, "train": "train"},
    "data.encoding": {"none": None, "utf-8": "utf-8"},
    "data.limit": {"none": None, "3": 3},
    "data.oversample": {"none": None, "a label": "label"},
    "data.max_length": {"2048": 2048, "260": 260},
    "data.validation": {"none": None, "a share": 0.34, "a file": "held_out.jsonl"},
    "data.test": {"none": None, "a share": 0.2, "a file": "test.jsonl"},
    "data.group_by": {"none": None, "a column": "patient"},
    "data.stratify_by": {"none": None, "a column": "label"},
    "data.folds": {"none": None, "2": 2},  # the worker trains fold 0
    "data.on_bad_row": {"error": "error", "skip": "skip"},
    "data.on_identifier": {"warn": "warn", "error": "error", "mask": "mask"},
    "data.identifier_patterns": {"none": [], "one": ["SNU-[0-9]{4}"]},
    "data.packing": {"auto": "auto", "on": "on", "off": "off"},
    "train.epochs": {"2": 2, "3": 3},
    "train.max_steps": {"none": None, "7": 7},  # more than an epoch has, in which a phase of mask.schedule ends
    "train.micro_batch_size": {"1": 1, "2": 2},
    "train.gradient_accumulation_steps": {"1": 1, "2": 2},
    "train.micro_batch_tokens": {"none": None, "one long row": 420},
    "train.learning_rate": {"1e-3": 1e-3, "1e-5": 1e-5},
    "train.weight_decay": {"0": 0.0, "0.1": 0.1},
    "train.warmup_ratio": {"0": 0.0, "0.5": 0.5},
    "train.scheduler": {name: name for name in ("linear", "cosine", "constant_with_warmup")},
    "train.max_grad_norm": {"0": 0.0, "1": 1.0},
    "train.max_skipped_steps": {"1": 1, "3": 3},
    "train.early_stopping_patience": {"none": None, "9": 9},
    "train.gradient_checkpointing": {"auto": "auto", "on": "on", "off": "off"},
    "train.reduce_dtype": {"none": None, "float32": "float32", "bfloat16": "bfloat16"},
    "train.seed": {"42": 42, "7": 7},
    "optim.name": {name: name for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")},
    "optim.betas": {"usual": [0.9, 0.999], "short": [0.8, 0.95]},
    "optim.eps": {"1e-8": 1e-8, "1e-6": 1e-6},
    "prefix.cache": {"auto": "auto", "on": "on", "off": "off"},
    "prefix.cache_dir": {"none": None, "given": "CACHE"},
    "prefix.share": {"none": None, "group": "group"},
    "prefix.cache_limit_gib": {"none": None, "1": 1.0},
    "prefix.precision": {"model": "model", "int8": "int8", "nf4": "nf4"},
    "prefix.placement": {"device": "device", "cpu": "cpu", "disk": "disk"},
    "output.share": {"none": None, "group": "group"},
    "output.save_every_steps": {"none": None, "1": 1, "2": 2},
    "output.keep": {"1": 1, "2": 2},
    "output.async_save": {"none": None, "false": False, "true": True},
    "output.evaluate_every_steps": {"none": None, "1": 1, "2": 2},
    "output.sample_answers": {"0": 0, "1": 1, "3": 3},
    "output.sample_tokens": {"2": 2, "5": 5},
    "output.report_to": {"tensorboard": ["tensorboard"], "none": []},
    "output.resume": {"auto": "auto", "must": "must"},
    "mask.train": {
        "last blocks and head": ["last:2", "head"], "head": ["head"], "blocks": ["blocks:3,5"], "groups": GROUP,
        "parts of blocks": ["last:3/mlp"], "all": ["all"], "adapters": [ADAPTERS],
        "adapters and head": [MAGNITUDES, "head"], "rows of the embeddings": [ROWS],
        "rows of the head": [HEAD_ROWS, "last:2/attention"], "quantised adapters": [QUANTISED],
    },
    "mask.freeze": {"nothing": [], "norms": ["last:3/norms", "norm"]},
    "mask.schedule": {
        "none": [], "a step": [{"train": ["blocks:4"], "until_step": 1}],
        "an epoch": [{"train": ["last:1"], "freeze": ["last:1/norms"], "until_epoch": 1}],
    },
    "mask.rotation": {
        "none": None, "badam": {"method": "badam", "every_steps": 1, "order": "descending"},
        "frostline": {"method": "frostline", "every_steps": 1, "blocks": 1, "seed": 8},
    },
    "mask.tied": {name: name for name in ("error", "untie", "both", "head_only")},
}  # fmt: skip
"""By recipe key, its values by name. DELTA and CACHE are replaced by directories, and files by those of the folder."""

NOT_COMBINED = {
    "data.retrieval": "needs a task with passages, and a corpus or dictionary: test_retrieval.py, test_ae_run.py",
    "output.evaluate_metrics": "what it may name follows from the task: test_validation_metrics.py, with other options",
    "train.metric_for_best_model": "one of output.evaluate_metrics",
    "train.early_stopping_threshold": "a number beside the patience: test_early_stopping.py",
    "model.name_or_path": "one tiny model; the model types have tests/test_zoo.py and tests/test_every_type.py",
    "model.revision": "of Hub models alone",
    "data.validation_split": "of sets with several splits alone",
    "data.test_split": "of sets with several splits alone",
    "data.fold": "comes with data.folds; several folds in a row have tests/test_folds.py",
    "data.name": "of Hub data sets and directories alone; tests/test_places.py, tests/test_hub_sets.py",
    "data.revision": "of Hub data sets alone",
    "data.separator": "of CSV alone, which is one of the files; tests/test_sources.py",
    "data.sheet": "of Excel workbooks alone; tests/test_sources.py",
    "output.report": "written after the run, from its directory: test_report.py",
    "output.report_answers": "of the report",
    "output.dir": "every run here has a directory of its own",
}
"""Recipe keys without values here, and why."""

TABLE: dict[str, list[str]] = {
    "launcher": list(LAUNCHERS),
    "ds": list(DS),
    "ended by": ["a signal", "a kill", "nothing"],
    **{key: list(values) for key, values in VALUES.items()},
}
"""All factors. Offload to NVMe is left out: it needs libaio and a compiled kernel (tests/test_nvme.py)."""

USUAL = {factor: names[0] for factor, names in TABLE.items()} | {"mask.train": "blocks", "mask.tied": "untie"}
"""What a refused pair is tried with."""


def _refused(message: str, *cells: tuple[str, tuple[str, ...]]) -> dict[Pair, str]:
    """Each combination of one value of each factor, with the message."""
    chosen = product(*([(factor, value) for value in values] for factor, values in cells))
    return {frozenset(combination): message for combination in chosen}


HEADS = ("mask.train", ("last blocks and head", "head", "adapters and head", "rows of the head"))
ROTATIONS = ("mask.rotation", ("badam", "frostline"))  # lisa takes one mask alone: test_rotation.py
NOT_WHOLE = (
    "mask.train",
    ("adapters", "adapters and head", "rows of the embeddings", "rows of the head", "quantised adapters"),
)
SCHEDULES = ("mask.schedule", ("a step", "an epoch"))
STORED = ("prefix.precision", ("int8", "nf4"))
PLACED = ("prefix.placement", ("cpu", "disk") if torch.cuda.is_available() else ("disk",))  # a CPU's host is its device
CACHED = ("prefix.cache", ("on",))
ALL = ("mask.train", ("all", "rows of the embeddings"))
BOTH = ("mask.tied", ("both",))
MOVES = "mask.schedule moves the frost line"
AT_BLOCK_0 = r"leaves no block frozen below what trains \(the frost line is at block 0\)"
NOTHING_FROZEN = "prefix.cache is on, but nothing below the trained tensors is frozen"
NOT_HELD_OUT = ("data.validation", ("none",)), ("data.test", ("none",)), ("data.folds", ("none",))
NOT_DRAWN = ("data.validation", ("none", "a file")), ("data.test", ("none", "a file")), ("data.folds", ("none",))
REFUSALS: dict[Pair, str] = {
    **_refused("bad.jsonl", ("data.path", ("one bad row",)), ("data.on_bad_row", ("error",))),
    **_refused("task long_answer needs the columns", ("data.path", ("conversations",)), ("data.task", ("mapped",))),
    **_refused("leave out test", ("data.folds", ("2",)), ("data.test", ("a share", "a file"))),
    **_refused("group_by is set, but nothing is held out", ("data.group_by", ("a column",)), *NOT_HELD_OUT),
    **_refused("stratify_by is set, but nothing is drawn", ("data.stratify_by", ("a column",)), *NOT_DRAWN),
    **_refused(
        "no validation loss to watch", ("train.early_stopping_patience", ("9",)), ("data.validation", ("none",))
    ),
    **_refused(
        "needs at least 2 .* of each value",
        ("data.folds", ("2",)),
        ("data.validation", ("a share",)),
        ("data.stratify_by", ("a column",)),
    ),
    **_refused(
        "report_to leaves out tensorboard", ("output.report_to", ("none",)), ("output.sample_answers", ("1", "3"))
    ),
    **_refused("share one tensor", ("mask.tied", ("error",)), ("mask.train", (*HEADS[1], *ALL[1]))),
    **_refused("mask.tied is head_only, but the mask selects the embeddings", ("mask.tied", ("head_only",)), ALL),
    **_refused("never frees memory that it paged", ("optim.name", ("paged_adamw_8bit",)), SCHEDULES),
    **_refused("never frees memory that it paged", ("optim.name", ("paged_adamw_8bit",)), ROTATIONS),
    **_refused("both say what trains when", ROTATIONS, SCHEDULES),
    **_refused("lets whole tensors take turns", ROTATIONS, NOT_WHOLE),
    **_refused("nothing would rotate", ROTATIONS, ("mask.train", ("head",))),
    **_refused("draws above a frost line", ("mask.rotation", ("frostline",)), ("mask.train", ("all",))),
    **_refused("draws above a frost line", ("mask.rotation", ("frostline",)), ("mask.train", HEADS[1][:1]), BOTH),
    **_refused(MOVES, STORED, SCHEDULES),
    **_refused(MOVES, PLACED, SCHEDULES),
    **_refused(AT_BLOCK_0, STORED, ALL),
    **_refused(AT_BLOCK_0, PLACED, ALL),
    **_refused(AT_BLOCK_0, STORED, HEADS, BOTH),
    **_refused(AT_BLOCK_0, PLACED, HEADS, BOTH),
    **_refused(
        "which prefix.placement: disk leaves on disk",
        ("model.delta", ("a run",)),
        ("prefix.placement", ("disk",)),
        HEADS,
    ),
    **_refused(NOTHING_FROZEN, CACHED, ALL),
    **_refused(NOTHING_FROZEN, CACHED, HEADS, BOTH),
    **_refused(
        "mask.tied is head_only: the embeddings move with every step", CACHED, HEADS, ("mask.tied", ("head_only",))
    ),
}
"""Combinations that are refused, each with what its message says; everything else of such a row is combined elsewhere.
"""

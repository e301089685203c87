"""Triton's kernels of the loss, by its interpreter: as exact as torch's own operations, in one launch a tile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import ROOT

from toolkit.runtime.triton_support import triton_trouble
from toolkit.split import logit_tiles
from toolkit.split.logit_tiles import has_kernels, kernel_text


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """What the kernels gave, of a process in which Triton interprets."""
    pytest.importorskip("triton", minversion="3.7.1", reason="earlier ones interpret no loop up to an argument")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "cross_entropy_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_are_as_exact_as_torchs_operations(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 11
    for case in cases:
        # the interpreter cuts a bfloat16 where cards and torch round it, which doubles the error
        allowed = 2.2 if case["dtype"] == "torch.bfloat16" else 1.1
        for found, plain in zip(case["off"], case["plain"], strict=True):
            assert found <= allowed * plain + 3e-7, case


@pytest.mark.slow
def test_a_tile_takes_one_launch_forward_and_one_backward(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        assert case["launches"] == {"add_statistics": case["tiles"], "replace_by_gradient": case["tiles"]}, case


def test_kernels_serve_logits_as_the_head_gives_them_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(2, 3)
    assert not has_kernels(logits, None)
    monkeypatch.setattr(logit_tiles, "triton_trouble", lambda device: "")
    assert has_kernels(logits, None)
    assert has_kernels(logits.bfloat16(), None)
    assert not has_kernels(logits.double(), None)
    assert not has_kernels(logits, torch.tanh)
    card = torch.device("cuda")
    assert kernel_text(card, None) == "; tiles by Triton's kernels"
    assert kernel_text(card, torch.tanh) == "; tiles by torch's operations: the model changes its logits"
    assert kernel_text(torch.device("cpu"), None) == ""


def test_where_triton_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    card, trouble = torch.device("cuda"), triton_trouble.__wrapped__
    assert trouble(torch.device("cpu")) == "the device is no GPU"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert trouble(card).startswith("Triton fails here ("), "there is no card"
    assert kernel_text(card, None).startswith("; tiles by torch's operations: Triton fails here (")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "reads no GPU's memory" in trouble(card)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert trouble(card) == "Triton is not installed"


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from toolkit.split import cross_entropy_kernels as kernels

types = {"logits": "*bf16", "targets": "*i64", **dict.fromkeys(("first", "width", "stride"), "i32")}

def ptx(kernel):
    signature = {name: "constexpr" if name == "columns" else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name in ("width", "stride")
    }
    fixed = {(kernel.arg_names.index("columns"),): kernels.COLUMNS}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": kernels.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

print(ptx(kernels._add_statistics).count("ld.global.v4.b32"))
print(*(ptx(kernels._replace_by_gradient).count(f"{way}.global.v4.b32") for way in ("ld", "st")))
"""


def test_compiled_for_an_h100_the_kernels_read_and_write_16_bytes_at_once() -> None:
    """Triton compiles without a GPU; a thread has 16 of 4,096 columns, which are two accesses in bfloat16."""
    pytest.importorskip("triton", minversion="3.4", reason="earlier ones describe a kernel's arguments otherwise")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    given = [sys.executable, "-c", COMPILED]
    done = subprocess.run(given, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.stdout.splitlines() == ["2", "2 2"], done.stderr[-3000:]

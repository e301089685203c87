"""Where kernels of our own update, and where torch's: decided by trying, alike on all ranks, and said in the log."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import tiny_flags, train

from toolkit.config.policy import Decision
from toolkit.optim import kernel_choice
from toolkit.optim.kernel_choice import agree_on_kernels, choose_kernels, kernels_if
from toolkit.runtime.triton_support import triton_trouble

CUDA = torch.device("cuda", 0)


def reason(device: torch.device) -> str:
    """Why torch's kernels are taken, decided anew."""
    triton_trouble.cache_clear()
    decision = choose_kernels(device)
    triton_trouble.cache_clear()
    assert not decision.on
    assert kernels_if(decision) is None
    return decision.reason.removeprefix("torch's fused AdamW, piece by piece: ")


def test_torchs_kernels_are_taken_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(torch.device("cpu")) == "the device is no GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(CUDA) == "TRITON_INTERPRET is set, and Triton's interpreter reads no GPU's memory"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason(CUDA) == "Triton is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels work on this machine's GPU")
def test_kernels_that_cannot_be_launched_are_left_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason(CUDA).startswith("Triton fails here (")  # the error is another one after a test on fake CUDA tensors


@dataclass
class Ranks:
    """A world whose other ranks decided as given."""

    device: torch.device
    others: list[bool]

    def all_gather_object(self, own: bool) -> list[bool]:
        assert self.device.type == "cuda", "elsewhere all ranks decide alike, and exchange nothing"
        return [own, *self.others]


@pytest.mark.parametrize(
    ("own", "others", "on"), [(True, [True], True), (True, [False], False), (False, [True], False), (True, [], True)]
)
def test_ranks_take_the_kernels_together(
    own: bool, others: list[bool], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "choose_kernels", lambda device: Decision(own, "ours"))
    decision = agree_on_kernels(Ranks(CUDA, others))
    assert decision.on is on
    assert decision.reason.endswith("Triton fails on another rank") == (own and not on)
    assert agree_on_kernels(Ranks(torch.device("cpu"), [])) == Decision(own, "ours")


def test_the_log_of_a_run_on_a_cpu_does_not_speak_of_kernels(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("frostline"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert train(*tiny_flags(tiny_model, tmp_path / "run", "--train.max_steps", 1)) == 0
    assert not [record.message for record in caplog.records if "update of float32 moments" in record.message]

"""Page-locked memory: little of it is wasted, and where it is refused the run goes on and says so once."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_streams import FakeGpu

from toolkit.runtime import page_locked
from toolkit.runtime.free_memory import RESERVE
from toolkit.runtime.page_locked import Arena, aligned

EXAONE = [2560 * 2560, 640 * 2560, 640 * 2560, 2560 * 2560, *[7168 * 2560] * 3, 2560, 2560]
"""Elements of a block of EXAONE-3.5-2.4B."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each block that is asked for, of which none is touched."""
    page_locked._warned.clear()
    sizes: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(page_locked, "allocate", allocate)
    return sizes


@pytest.mark.parametrize("elements", [EXAONE * 26, [102_400 * 2560] * 3 * 2, [5, 1, 0, 513]], ids=str)
def test_blocks_are_powers_of_two_and_hold_little_more_than_the_tensors(asked: list[int], elements: list[int]) -> None:
    sizes = [2 * count for count in elements]
    arena = Arena(sum(map(aligned, sizes)))
    taken = [arena.take(size) for size in sizes]
    assert [None if part is None else len(part) for part in taken] == sizes
    spans = sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in taken if part is not None and len(part))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "they do not overlap"
    assert all(size & (size - 1) == 0 for size in asked)
    assert sum(asked) <= 1.35 * sum(map(aligned, sizes))


def test_a_refusal_is_final_and_said_once(gpu: FakeGpu, said: list[str]) -> None:
    arena = Arena(2**20)
    gpu.refuses = True
    assert arena.take(10) is None
    gpu.refuses = False
    assert arena.take(10) is None, "what was placed elsewhere stays in order"
    assert len([line for line in said if line.startswith("no page-locked memory (a test refuses)")]) == 1


def test_memory_that_would_be_taken_from_others_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    page_locked._warned.clear()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=RESERVE + 2**20))
    empty: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *given, **named: empty.append((given, named)) or "pinned")
    assert page_locked.allocate(2**20) == "pinned"
    assert empty == [((2**20,), {"dtype": torch.uint8, "pin_memory": True})]
    assert page_locked.allocate(2**20 + 1) is None
    assert said == [
        "no page-locked memory (1 MiB are too much for the 1,025 MiB that are free): copies between host and GPU go on "
        "from pageable memory, which is slower; free host memory or raise ulimit -l"
    ]


def test_what_the_driver_refuses_goes_on_from_where_it_is(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    page_locked._warned.clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    tensor = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert page_locked.pin(tensor) is tensor
    monkeypatch.setattr(torch, "empty", refuse)
    assert page_locked.allocate(8) is None
    (line,) = said
    assert line.startswith("no page-locked memory (CUDA error: out of memory Compile with ...): ")

"""What memory is free is asked once all that the run needs no more is gone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import invocation, tiny_flags
from torch import nn

from toolkit.runtime.distributed import World
from toolkit.runtime.free_memory import free_bytes
from toolkit.training import context as training_context
from toolkit.training import phases
from toolkit.training.context import prepare


def parameters_alive() -> list[nn.Parameter]:
    """All parameters of this process that are in memory, also those that other tests keep."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter) and not thing.is_meta]


def bytes_by_storage(parameters: list[nn.Parameter]) -> dict[int, int]:
    """The bytes of each storage of these parameters, by its address."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}


def blocks_alive() -> int:
    """How many blocks of the tiny model have their weights in memory."""
    return len(bytes_by_storage([p for p in parameters_alive() if p.shape == (32, 64)]))  # mlp.down_proj


def blocks_at_the_decision(model: Path, tmp_path: Path, monkeypatch: Any, *flags: object) -> list[int]:
    """How many blocks are in memory at each look at what is free, once a phase is built."""
    words = tiny_flags(model, tmp_path / "run", "--prefix.cache_dir", tmp_path / "cache", *flags)
    before, seen = blocks_alive(), []
    context, handle = prepare(invocation(*words), World())
    monkeypatch.setattr(training_context, "free_bytes", lambda _: seen.append(blocks_alive() - before) or 10**12)
    assert phases.build_phase(context, handle, context.schedule.phases[0]).plan is not None
    return seen


def test_a_cached_run_looks_for_free_memory_when_the_frozen_blocks_are_gone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six blocks two train; cold and warm, only these are alive when gradient checkpointing is decided."""
    for _ in range(2):
        assert blocks_at_the_decision(tiny_model, tmp_path, monkeypatch, "--mask.train", "last:2", "head") == [2]
    off = ("--mask.train", "last:2", "head", "--prefix.cache", "off")
    assert blocks_at_the_decision(tiny_model, tmp_path, monkeypatch, *off) == [6], "the prefix is in use"


@pytest.mark.parametrize(("room", "expected"), [(0, "off"), (-1, "on")])
def test_a_card_that_the_plan_fits_exactly_keeps_its_activations(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], room: int, expected: str
) -> None:
    """A fake card as large as the plan's peak: what is free is its size without the weights that are alive."""
    of_other_tests = parameters_alive()  # kept here, so that no address of theirs is given out again
    words = tiny_flags(tiny_model, tmp_path / "run", "--prefix.cache_dir", tmp_path / "cache", "--mask.train", "last:2")
    context, handle = prepare(invocation(*words), World())
    assert context.plans[0] is not None
    memory = context.plans[0].memory
    suffix_weights = memory.at_peak["suffix weights"]

    def look(device: torch.device) -> int:
        alive = bytes_by_storage(parameters_alive())
        own = sum(size for address, size in alive.items() if address not in bytes_by_storage(of_other_tests))
        return memory.beside_weights + suffix_weights + room - own

    monkeypatch.setattr(training_context, "free_bytes", look)
    phases.build_phase(context, handle, context.schedule.phases[0])
    (line,) = [line for line in said if line.startswith("gradient checkpointing")]
    assert line.startswith(f"gradient checkpointing: {expected} (auto")


def test_on_a_gpu_the_allocators_stock_is_returned_before_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("look"), 7)[::-1])
    assert free_bytes(torch.device("cuda", 0)) == 7
    assert calls == ["collect", "empty", "look"]

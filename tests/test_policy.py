"""Decisions are taken once: a plan and the run of the same recipe decide the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import invocation, run_ranks, set_up, tiny_flags

from toolkit.config.policy import decide_cache, decide_checkpointing, global_batch, refuse_packing
from toolkit.config.schema import PrefixConfig
from toolkit.data.batches import BatchPlan
from toolkit.planning.command import plan_run
from toolkit.planning.table import as_dict
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError

ROWS = 20
SETTINGS = [
    "",
    "--train.epochs 1",
    "--train.epochs 1 --train.gradient_accumulation_steps 8",  # 3 steps of 8 rows are one pass, not 1.2
    "--train.epochs 1 --prefix.cache on",
    "--train.max_steps 20",
    "--train.max_steps 21",
    "--train.max_steps 5 --train.gradient_accumulation_steps 4",
    "--train.max_steps 6 --train.micro_batch_size 2 --train.gradient_accumulation_steps 2",
    "--train.max_steps 3 --train.epochs 1 --prefix.cache off",
    "--train.micro_batch_size 4 --prefix.cache off",
    "--train.micro_batch_size 4 --data.packing off --train.gradient_checkpointing on",
    "--train.micro_batch_size 4 --data.packing on --train.gradient_checkpointing off",
    "--train.micro_batch_size 1 --data.packing on",
    "--train.micro_batch_size 2 --data.packing on --model.attn_implementation eager",
    "--train.micro_batch_size 2 --model.attn_implementation eager",
    "--data.validation 0.2 --prefix.cache_limit_gib 1e-6",
    '--train.epochs 2 --mask.schedule {"train":["last:1"],"until_epoch":1}',  # each phase is one pass
    "--mask.train all --mask.tied both",
]


def stated_by_plan(words: Sequence[str], ranks: int = 1, budget: int | None = None) -> dict[str, Any]:
    plan = as_dict(*plan_run(invocation(*words), ranks, budget))
    return {
        "cached": plan["prefix"]["cached"],
        "packed": plan["micro_batch"]["packed"],
        "checkpointing": plan["engine"]["gradient_checkpointing"],
        "global_batch": plan["micro_batch"]["global_batch"],
    }


def stated_by_run(log: str) -> dict[str, Any]:
    def state(what: str) -> bool:
        found = re.findall(rf"{what}: (on|off)\b", log)
        assert found, f"the run does not say whether {what} is on:\n{log}"
        return bool(found[0] == "on")

    batch = re.search(r"steps.* of (\d+) row\(s\)", log)
    assert batch
    return {
        "cached": state("activation cache"),
        "packed": state("packing"),
        "checkpointing": state("gradient checkpointing"),
        "global_batch": int(batch[1]),
    }


def words_of(tiny_model: Path, tmp_path: Path, settings: str) -> list[str]:
    cache = ("--prefix.cache_dir", tmp_path / "cache")
    return tiny_flags(tiny_model, tmp_path / "run", "--mask.train", "last:2", *cache, *settings.split())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_plan_states_what_the_run_decides(tiny_model: Path, tmp_path: Path, said: list[str], settings: str) -> None:
    words = words_of(tiny_model, tmp_path, settings)
    planned = stated_by_plan(words)
    said.clear()
    set_up(invocation(*words), World())
    assert planned == stated_by_run("\n".join(said))


@pytest.mark.parametrize("settings", ["", "--train.micro_batch_size 4", "--train.gradient_checkpointing off"])
def test_where_memory_is_short_both_recompute_activations(
    tiny_model: Path, tmp_path: Path, said: list[str], settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(tiny_model, tmp_path, settings)
    planned = stated_by_plan(words, budget=1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1))
    said.clear()
    set_up(invocation(*words), World())
    assert planned == stated_by_run("\n".join(said))
    assert planned["checkpointing"] is (settings != "--train.gradient_checkpointing off")


SHARED = "--train.max_steps 12"
"""Less than one pass on one rank, more than one on two."""


def test_a_plan_for_two_ranks_counts_the_rows_of_both(tiny_model: Path, tmp_path: Path) -> None:
    words = words_of(tiny_model, tmp_path, SHARED)
    assert [stated_by_plan(words, ranks)["cached"] for ranks in (1, 2)] == [False, True]


@pytest.mark.distributed
def test_a_plan_for_two_ranks_states_what_they_decide(tiny_model: Path, tmp_path: Path) -> None:
    words = words_of(tiny_model, tmp_path, f"{SHARED} --train.micro_batch_size 2 --train.epochs 2")
    result = run_ranks("launch/train.py", *words)
    assert result.returncode == 0, result.stderr
    assert stated_by_plan(words, ranks=2) == stated_by_run(result.stdout + result.stderr)


def test_a_plan_refuses_the_cache_that_the_run_would_refuse(tiny_model: Path, tmp_path: Path) -> None:
    for settings, reason in (
        ("--mask.tied head_only", "the embeddings move with every step"),
        ("--prefix.cache_limit_gib 1e-6", "prefix.cache_limit_gib allows 1e-06 GiB"),
    ):
        words = words_of(tiny_model, tmp_path, f"--mask.train head --prefix.cache on {settings}")
        with pytest.raises(ConfigError, match=f"prefix.cache is on, but .*{reason}"):
            plan_run(invocation(*words), 1, None)


@pytest.mark.parametrize(("batch", "steps"), [(1, 20), (8, 3), (20, 1), (32, 1)])
def test_the_steps_of_an_epoch_are_one_pass_whatever_the_batch(batch: int, steps: int) -> None:
    plan = BatchPlan(ROWS, batch)
    assert plan.steps_per_epoch == steps
    assert [plan.passes(steps), plan.passes(3 * steps), plan.passes(3 * steps, steps)] == [1, 3, 2]
    assert BatchPlan(ROWS, 2, 2).passes(2) == 0.4


def test_rows_are_cached_where_they_are_read_twice_or_there_already() -> None:
    auto, on, off = (PrefixConfig(cache=mode) for mode in ("auto", "on", "off"))
    assert decide_cache(auto, None, 1.1).on
    assert not decide_cache(auto, None, 1).on
    assert decide_cache(auto, None, 1, is_complete=True).on
    assert decide_cache(on, None, 0.5).on
    assert decide_cache(off, "a reason", 3).reason == "off, as the recipe says"
    assert decide_cache(auto, "a reason", 3).reason == "off (auto: a reason)"
    with pytest.raises(ConfigError, match=r"prefix\.cache is on, but a reason; set it to auto or off"):
        decide_cache(on, "a reason", 3)


def test_auto_checkpoints_exactly_when_the_plan_does_not_fit() -> None:
    assert not decide_checkpointing("auto", 1000, 1000).on
    assert decide_checkpointing("auto", 1000, 999).on
    assert not decide_checkpointing("auto", 1000, 999, fixed_moment="update").on, "it would not lower the peak"
    assert not decide_checkpointing("auto", 1000, None).on
    assert decide_checkpointing("auto", None, 10**12).on, "what cannot be planned takes the way that needs less"
    assert decide_checkpointing("on", 0, 10**12).on
    assert not decide_checkpointing("off", 10**12, 0).on


def test_rows_of_one_length_and_single_rows_are_not_packed() -> None:
    assert refuse_packing("auto", 4, (9, 8)) is refuse_packing("on", 4, None) is None
    for mode, micro, lengths in (("off", 4, (9, 8)), ("on", 1, (9, 8)), ("on", 4, (9, 9))):
        refused = refuse_packing(mode, micro, lengths)  # type: ignore[arg-type]
        assert refused
        assert not refused.on


def test_a_step_takes_the_rows_of_all_ranks() -> None:
    assert global_batch(2, 3, 4) == BatchPlan(ROWS, 2, 3, ranks=4).global_batch == 24

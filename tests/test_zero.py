"""Real DeepSpeed on real ranks: every stage learns what one process learns."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import BFLOAT16_LOSS, assert_rounded_alike, rms
from helpers import ENGLISH, ROOT, masters_of, metrics, run_ranks, run_script, tiny_flags, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.distributed

DEEPSPEED = ("deepspeed", "--num_gpus", "2")


def succeed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def ds_config(stage: int) -> Path:
    return ROOT / "ds_configs" / f"zero{stage}.json"


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process without DeepSpeed, two micro batches a step: 21 rows, so that the last step is short."""
    folder = tmp_path_factory.mktemp("alone")
    run = folder / "run"
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    (folder / "odd.jsonl").write_text("\n".join([*rows, rows[0]]), encoding="utf-8")
    flags = tiny_flags(tiny_model, run, "--data.path", folder / "odd.jsonl", "--train.epochs", 2)
    assert train(*flags, "--train.gradient_accumulation_steps", "2") == 0
    return run


def final_masters(run: Path) -> dict[str, torch.Tensor]:
    name = (run / "checkpoints" / "latest").read_text()
    return masters_of(run / "checkpoints" / name)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.first_tier), 3])
def on_two_ranks(
    request: pytest.FixtureRequest, tiny_model: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the worker saw on two ranks under one ZeRO stage, and the final masters."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    flags = tiny_flags(
        tiny_model, folder, "--data.path", alone.parent / "odd.jsonl", "--train.epochs", 2, "--prefix.cache", "off"
    )
    output = folder / "result.json"
    succeed(run_ranks("tests/zero_worker.py", output, *flags, "--ds", ds_config(request.param)))
    result = json.loads(output.read_text())
    # other runs beside this one have buffers too, under their ports
    left = Path("/dev/shm").glob(f"deepspeed_*_{result['port']}_*")
    result["left in memory"] = sorted(path.name for path in left)
    assert result["engine"] == f"zero-{request.param}"
    return result, torch.load(f"{output}.pt")


def test_each_stage_has_the_step_losses_of_one_process(
    on_two_ranks: tuple[dict[str, Any], dict[str, torch.Tensor]], alone: Path
) -> None:
    result, masters = on_two_ranks
    assert len(result["losses"]) == 22
    assert max(abs(a - b) for a, b in zip(result["losses"], metrics(alone), strict=True)) < 1e-5
    assert result["norms"] == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)
    assert result["tokens"] == metrics(alone, "supervised_tokens")
    for name, expected in final_masters(alone).items():
        assert torch.allclose(masters[name], expected, atol=2e-5), name


def test_steps_leave_no_module_on_deepspeeds_stack(
    on_two_ranks: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    assert on_two_ranks[0]["modules_left_on_stack"] == 0


def test_a_run_leaves_nothing_in_shared_memory(
    on_two_ranks: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    assert on_two_ranks[0]["left in memory"] == []


def test_ranks_see_disjoint_rows_whose_union_is_the_data_set(
    on_two_ranks: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    first, second = on_two_ranks[0]["rows_by_rank"]
    assert (len(first), len(second)) == (22, 20)
    assert Counter(first + second) == Counter(list(range(21)) * 2)


def test_frozen_tensors_are_bit_identical_and_all_masters_move(
    on_two_ranks: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    result = on_two_ranks[0]
    assert result["frozen_unchanged"] == [True, True]
    assert result["frozen_tensors"] == [20, 20]
    assert len(result["masters_moved"]) == 37
    assert all(result["masters_moved"].values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bfloat16_run_with_accumulation_checkpointing_and_a_stop_ends_like_one_process(
    tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    """The whole command on two ranks, then resumed from within its first epoch."""
    shared = (
        "--model.dtype", "bfloat16", "--data.validation", "0.25", "--train.epochs", 2, "--train.learning_rate", "1e-4",
        "--output.save_every_steps", "3", "--train.gradient_checkpointing", "on",
        "--output.sample_answers", 3, "--output.sample_tokens", 3,
    )  # fmt: skip
    one = tmp_path / "one"
    assert train(*tiny_flags(tiny_model, one, *shared, "--train.gradient_accumulation_steps", "4")) == 0
    two = tmp_path / "two"
    accumulate = ("--train.gradient_accumulation_steps", 2, "--output.keep", 9)
    flags = tiny_flags(tiny_model, two, *shared, *accumulate, "--ds", ds_config(stage))
    succeed(run_ranks("launch/train.py", *flags))
    whole = metrics(two)
    assert_rounded_alike(two, one)
    assert rms(metrics(two, "eval_loss"), metrics(one, "eval_loss")) < BFLOAT16_LOSS

    for run in (one, two):  # answers of both ranks, of parameters that ZeRO-3 has gathered for it
        board = EventAccumulator(str(run / "tensorboard")).Reload()
        table = board.Tensors("answers/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
        assert [row.split(" | ")[0] for row in table[4:]] == ["| 1", "| 2", "| 3"]

    (two / "checkpoints" / "latest").write_text("step-00000003")  # as if the job had been killed after step 3
    succeed(run_ranks("launch/train.py", *flags))
    assert metrics(two) == whole
    assert metrics(two, "step").count(4) == 2, "one training row and one validation row of step 4"


def test_a_frozen_tied_head_trains_under_zero3_too(tiny_model: Path, tmp_path: Path) -> None:
    """The tied table is in both halves: in the prefix to embed, in the suffix as the head, which ZeRO-3 partitions."""
    flags = ("--mask.train", "last:2", "--train.epochs", "1")
    assert train(*tiny_flags(tiny_model, tmp_path / "one", *flags)) == 0
    run = tmp_path / "run"
    succeed(run_script("launch/train.py", *tiny_flags(tiny_model, run, *flags), "--ds", ds_config(3)))
    assert max(abs(a - b) for a, b in zip(metrics(run), metrics(tmp_path / "one"), strict=True)) < 1e-5


def test_torchrun_without_deepspeed_sums_gradients_over_ranks(tiny_model: Path, tmp_path: Path, alone: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.path", alone.parent / "odd.jsonl", "--train.epochs", 2)
    succeed(run_script("launch/train.py", *flags, launcher=("torchrun", "--nproc_per_node", "2")))
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), metrics(alone), strict=True)) < 1e-5


def test_accelerate_launch_gives_the_same_run(tiny_model: Path, tmp_path: Path, alone: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.path", alone.parent / "odd.jsonl", "--train.epochs", 2)
    launcher = (
        "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    )
    succeed(run_script("launch/train.py", *flags, launcher=launcher))
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), metrics(alone), strict=True)) < 1e-5


def test_deepspeed_needs_no_launcher_for_one_process(tiny_model: Path, tmp_path: Path, alone: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", "--data.path", alone.parent / "odd.jsonl", "--train.epochs", 2)
    accumulate = ("--train.gradient_accumulation_steps", 2)
    succeed(run_script("launch/train.py", *flags, *accumulate, "--ds", ds_config(2)))
    assert max(abs(a - b) for a, b in zip(metrics(tmp_path / "run"), metrics(alone), strict=True)) < 1e-5


def test_bad_usage_under_the_launcher_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    result = run_script("launch/train.py", "--train.epochs", "0", "--ds", ds_config(2), launcher=DEEPSPEED)
    assert result.returncode == 2
    assert result.stderr.count("train.epochs is '0'") == 1
    assert "Traceback" not in result.stderr

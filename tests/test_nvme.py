"""ZeRO-3 with masters and moments in files: the steps, checkpoints and phases of a run that has them in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer, masters_of, metrics, run_ranks, tiny_flags, train
from nvme_worker import PHASES, RUNS
from test_zero import succeed
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit.engine.deepspeed import nvme_files
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError, DiskError

RUN = ("--train.max_steps", 6, "--output.save_every_steps", 2, "--output.keep", 9, "--mask.train", "last:2", "head")


def has_libaio() -> bool:
    """CI must have it; elsewhere these tests are skipped without it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(os.environ.get("FROSTLINE_REQUIRE_CLUSTER")) or AsyncIOBuilder().is_compatible()


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose top is large enough for DeepSpeed to swap it: from 1 MiB of float32 a group and rank."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and what the worker saw on two ranks."""
    if not has_libaio():
        pytest.skip("libaio-dev is not installed")
    folder = tmp_path_factory.mktemp("nvme")
    one = ("--train.gradient_accumulation_steps", 4)
    assert train(*tiny_flags(wide_model, folder / "local", *RUN, *one)) == 0
    assert train(*tiny_flags(wide_model, folder / "phases", *RUN, *one, *PHASES)) == 0
    flags = tiny_flags(wide_model, folder, *RUN, "--train.micro_batch_size", 2)
    succeed(run_ranks("tests/nvme_worker.py", folder, *flags))
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_state_in_files_trains_resumes_and_changes_phase_like_state_in_memory(
    runs: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, seen = runs
    assert seen["codes"][name] == 0
    right = folder / ("phases" if name.startswith("phases") else "local")
    assert metrics(folder / name) == pytest.approx(metrics(right), abs=1e-5)
    last = Path("checkpoints") / "step-00000006"
    found, expected = masters_of(folder / name / last), masters_of(right / last)
    assert all((found[tensor] - expected[tensor]).abs().max() < 2e-5 for tensor in expected)


@pytest.mark.distributed
def test_masters_and_moments_really_are_in_files_and_gone_when_the_run_ends(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = runs
    plan = json.loads((folder / "fresh" / "plan.json").read_text())["memory"]
    trained = sum(master.numel() for master in masters_of(folder / "local" / "checkpoints" / "step-00000006").values())
    assert seen["in files"]["fresh"] == pytest.approx(12 * trained, rel=0.02)  # vectors are in memory
    assert plan["files"] == pytest.approx((12 + 4) * trained / 2, rel=0.02)  # gradients are in files, too
    assert plan["most"]["masters"] == plan["most"]["moments"] == 0
    assert seen["in files"]["pipelined"] > 0
    assert not (folder / "fresh" / "swap").exists()
    assert list((folder / "drive").iterdir()) == []


def test_two_runs_never_share_a_folder_on_the_drive(tmp_path: Path) -> None:
    found = set()
    for run in ("a/run", "b/run"):
        ds_config = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}}
        nvme_files.assign_swap_folders(ds_config, tmp_path / run)
        found |= set(nvme_files.swap_folders(ds_config))
    assert len(found) == 2
    assert {path.parent for path in found} == {tmp_path}
    own: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    nvme_files.assign_swap_folders(own, tmp_path / "run")
    assert nvme_files.swap_folders(own) == [tmp_path / "run" / "swap"]


def ds_with(path: Path) -> dict[str, Any]:
    return {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}


def test_what_cannot_be_swapped_to_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"nvme_path: .*file/swap cannot be made"):
        nvme_files.prepare_swap_folders(ds_with(tmp_path / "file" / "swap"), World(), 0)
    with pytest.raises(DiskError, match=r"needs 1,099,511,627,776 MiB in .*, .* MiB are free: free space, name"):
        nvme_files.prepare_swap_folders(ds_with(tmp_path / "swap"), World(), 2**60)
    nvme_files.prepare_swap_folders({"zero_optimization": {"stage": 3}}, World(), 2**60)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(ConfigError, match="needs libaio and its headers, which are not installed"):
        nvme_files.prepare_swap_folders(ds_with(tmp_path / "swap"), World(), 0)

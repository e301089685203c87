"""What a GPU is asked for and told, shown without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.commands import cli
from toolkit.config.schema import ModelConfig
from toolkit.models import mask_checks
from toolkit.models.load import load
from toolkit.models.mask_checks import masks_without_checks
from toolkit.optim import moments
from toolkit.optim.master_adamw import MasterAdamW
from toolkit.optim.update_monitor import UpdateMonitor
from toolkit.planning import suggest

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("2.13.0+cpu", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("2.8.1", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ("2.13.0", {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_gpu_segments_expand_unless_the_user_says_otherwise(
    version: str, given: Mapping[str, str], expected: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ: dict[str, str] = dict(given)
    monkeypatch.setattr(cli.metadata, "version", lambda package: version)
    monkeypatch.setattr(cli, "malloc", SimpleNamespace(keep_freed_memory=lambda: None))
    monkeypatch.setattr(cli.os, "environ", environ)
    cli.set_up_memory()
    assert {name: environ[name] for name in VARIABLES if name in environ} == expected


def test_attention_of_new_lengths_waits_for_no_plan_of_cudnn_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, expected in (({}, "1"), ({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}, "0")):
        environ: dict[str, str] = dict(given)
        monkeypatch.setattr(cli, "malloc", SimpleNamespace(keep_freed_memory=lambda: None))
        monkeypatch.setattr(cli.os, "environ", environ)
        cli.set_up_memory()
        assert environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == expected


def test_singular_values_are_computed_on_the_runs_device(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU."""
    loaded, seen = load(ModelConfig(name_or_path=str(tiny_model), dtype="float32")), set()

    def ratio(weight: torch.Tensor) -> float:
        seen.add(weight.device.type)
        return 1.0

    monkeypatch.setattr(suggest, "signal_to_noise", ratio)
    monkeypatch.setattr(suggest, "World", lambda: SimpleNamespace(device=torch.device("meta")))
    assert suggest.spectrum_scores(loaded) == [1.0] * 6
    assert seen == {"meta"}


def test_paged_moments_are_left_out_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is paged; the attribute is what bitsandbytes marks its managed memory with."""
    weights = {name: nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for name, size in (("a", 8192), ("b", 64))}
    options: dict[str, Any] = {"params": list(weights.values()), "lr": 1e-3, "weight_decay": 0.0}
    optimizer = MasterAdamW(weights, [{**options, "betas": (0.9, 0.999), "eps": 1e-8}], 0, name="paged_adamw_8bit")
    expected = []
    for paged in (False, True):
        monkeypatch.setattr(moments.EightBit, "_is_paged", lambda self, state, paged=paged: paged)
        monitor = UpdateMonitor(optimizer.sample)
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        monitor.before()
        with monkeypatch.context() as patch:
            patch.setattr(moments.EightBit, "_is_paged", lambda self, state: False)  # nothing to prefetch
            optimizer.step()
        monitor.after()
        expected.append(monitor.counts.tolist())
    assert expected == [[256 + 64, 256 + 64], [64, 64]]


def test_the_masks_without_checks_are_those_that_transformers_makes() -> None:
    """Packed positions, padding, sliding windows; and what was replaced is put back."""
    from transformers import MistralConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = MistralConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, sliding_window=3)
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(2, 6, 8)
    padding = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    rows = torch.arange(6)[None]
    cases: list[tuple[torch.Tensor | None, torch.Tensor, bool]] = [
        (None, rows, False), (padding, rows, False), (None, torch.tensor([[0, 1, 2, 0, 1, 2]]), True),
    ]  # fmt: skip
    before = [vars(mask_checks.masking_utils)[name] for name in (mask_checks._PACKED, mask_checks._SKIPPED)]
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        for mask, positions, is_packed in cases:
            arguments: dict[str, Any] = {
                "config": config, "inputs_embeds": embeds, "attention_mask": mask, "past_key_values": None,
                "position_ids": positions,
            }  # fmt: skip
            expected = make(**arguments)
            with masks_without_checks(is_packed):
                found = make(**arguments)
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
    assert [vars(mask_checks.masking_utils)[name] for name in (mask_checks._PACKED, mask_checks._SKIPPED)] == before

"""A head that shares the embeddings' tensor, trained as one or through the head alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, metrics, run_ranks, tiny_flags, train
from safetensors.torch import load_file
from test_zero import ds_config, succeed
from transformers import AutoModelForCausalLM

from toolkit.config.schema import DataConfig, ModelConfig
from toolkit.data.batches import epoch_order
from toolkit.data.dataset import load_dataset
from toolkit.exporting.run_export import export_model
from toolkit.models.load import load
from toolkit.training import cut

LR, STEPS = 1e-3, 40


def plain(model_path: Path, blocks: int, through_embeddings: bool) -> tuple[list[float], Any]:
    """A plain loop on a tied Llama: the last blocks and the shared tensor, which the lookup may pass gradients to."""
    loaded = load(ModelConfig(name_or_path=str(model_path), dtype="float32"))
    model = loaded.model.train()
    for name, parameter in model.named_parameters():
        in_last = name.startswith(tuple(f"model.layers.{6 - 1 - i}." for i in range(blocks)))
        parameter.requires_grad_(in_last or name == "model.embed_tokens.weight")
    if not through_embeddings:
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.detach())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(decay, lr=LR)
    examples = load_dataset(DataConfig(path=str(ENGLISH)), loaded.tokenizer, 42).train
    losses = []
    for step in range(STEPS):
        example = examples[epoch_order(20, 42, step // 20)[step % 20]]
        ids = torch.tensor([example.token_ids])
        logits = model(input_ids=ids).logits[0, example.answer_start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, example.answer_start :])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        warmup = STEPS // 10
        factor = step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)
        for group in optimizer.param_groups:
            group["lr"] = LR * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def flags(model: Path, run: Path, tied: str, *more: object) -> list[str]:
    return tiny_flags(model, run, "--mask.tied", tied, "--train.epochs", 2, *more)


@pytest.mark.parametrize("tied", ["both", "head_only"])
@pytest.mark.parametrize(("blocks", "selectors"), [(2, ["last:2", "head"]), (0, ["head"]), (6, ["last:6", "head"])])
def test_training_is_that_of_a_plain_loop_and_the_export_keeps_the_tie(
    tiny_model: Path, tmp_path: Path, tied: str, blocks: int, selectors: list[str]
) -> None:
    expected, model = plain(tiny_model, blocks, through_embeddings=tied == "both")
    run = tmp_path / "run"
    assert train(*flags(tiny_model, run, tied, "--mask.train", *selectors)) == 0
    assert max(abs(a - b) for a, b in zip(metrics(run), expected, strict=True)) < 1e-5
    export_model(run, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    for (name, ours), theirs in zip(exported.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name
        assert torch.equal(ours, base[name]) != theirs.requires_grad, name


def test_head_only_on_a_model_that_is_kept_whole_is_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*flags(tiny_model, tmp_path / "cut", "head_only")) == 0
    monkeypatch.setattr(cut, "split_is_exact", lambda *_: False)
    assert train(*flags(tiny_model, tmp_path / "whole", "head_only")) == 0
    apart = zip(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), strict=True)
    assert max(abs(a - b) for a, b in apart) < 1e-5


@pytest.mark.parametrize("tied", ["both", "head_only"])
def test_an_interrupted_run_goes_on_exactly(tiny_model: Path, tmp_path: Path, tied: str) -> None:
    run = tmp_path / "run"
    every = ("--output.save_every_steps", 7, "--output.keep", 99, "--model.dtype", "bfloat16")
    assert train(*flags(tiny_model, run, tied, *every)) == 0
    whole = metrics(run)
    (run / "checkpoints" / "latest").write_text("step-00000014")
    assert train(*flags(tiny_model, run, tied, *every)) == 0
    assert metrics(run) == whole


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_head_only_under_zero_moves_the_embeddings_along(tiny_model: Path, tmp_path: Path, stage: int) -> None:
    alone = tmp_path / "alone"
    assert train(*flags(tiny_model, alone, "head_only", "--train.gradient_accumulation_steps", 2)) == 0
    run = tmp_path / "run"
    saved = ("--output.save_every_steps", 5, "--output.keep", 99, "--ds", ds_config(stage))
    succeed(run_ranks("launch/train.py", *flags(tiny_model, run, "head_only", *saved)))
    assert max(abs(a - b) for a, b in zip(metrics(run), metrics(alone), strict=True)) < 1e-5
    whole = metrics(run)
    (run / "checkpoints" / "latest").write_text("step-00000005")
    succeed(run_ranks("launch/train.py", *flags(tiny_model, run, "head_only", *saved)))
    assert metrics(run) == whole

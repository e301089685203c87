from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ENGLISH, run_here

from toolkit.config.schema import DataConfig, MaskConfig, ModelConfig
from toolkit.data.dataset import load_dataset
from toolkit.data.examples import Example
from toolkit.mask.layer_mask import build_mask
from toolkit.models.load import LoadedModel, load
from toolkit.planning.suggest import Suggestion, gradient_scores, signal_to_noise, spectrum_scores, suggest
from toolkit.runtime.errors import ConfigError, ModelError


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))


@pytest.fixture
def examples(loaded: LoadedModel) -> tuple[Example, ...]:
    return load_dataset(DataConfig(path=str(ENGLISH)), loaded.tokenizer, 0).train[:3]


def test_a_signal_in_noise_raises_the_ratio() -> None:
    torch.manual_seed(0)
    noise = torch.randn(64, 48)
    spike = torch.outer(torch.randn(64), torch.randn(48))
    assert signal_to_noise(noise + spike) * float(torch.linalg.svdvals(noise + spike)[0]) > (
        signal_to_noise(noise) * float(torch.linalg.svdvals(noise)[0])
    )


def test_zeros_have_no_signal_and_weights_that_are_not_finite_are_refused(loaded: LoadedModel) -> None:
    assert signal_to_noise(torch.zeros(8, 4)) == 0.0
    weight = loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight.zero_()
    assert all(math.isfinite(score) for score in spectrum_scores(loaded))
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        spectrum_scores(loaded)


def test_spectrum_scores_are_at_most_one_and_see_a_block_with_structure(loaded: LoadedModel) -> None:
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "layers.2." in name and parameter.ndim == 2:
                values = torch.linspace(
                    1, 0.01, min(parameter.shape)
                )  # decays slowly: much signal, a low largest value
                u, _, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(u @ torch.diag(values) @ v)
    scores = spectrum_scores(loaded)
    assert len(scores) == 6
    assert max(scores) <= 1
    assert max(range(6), key=lambda block: scores[block]) == 2


def test_gradient_scores_are_the_norms_of_the_blocks_gradients(
    loaded: LoadedModel, examples: tuple[Example, ...]
) -> None:
    scores = gradient_scores(loaded, examples[:1])
    model = loaded.model
    ids = torch.tensor([examples[0].token_ids])
    logits = model(ids).logits[0, examples[0].answer_start - 1 : -1]
    torch.nn.functional.cross_entropy(logits, ids[0, examples[0].answer_start :]).backward()
    for block, score in enumerate(scores):
        gradients = [p.grad for n, p in model.named_parameters() if f"layers.{block}." in n]
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        assert score == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["spectrum", "gradient"])
def test_a_suggestion_is_a_mask_that_the_recipe_takes(
    loaded: LoadedModel, examples: tuple[Example, ...], method: str
) -> None:
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    suggestion = suggest(loaded, method, 0.5, examples)  # type: ignore[arg-type]
    assert len(suggestion.chosen) == 3
    assert set(suggestion.chosen) == set(suggestion.ranking[:3])
    sections = yaml.safe_load(suggestion.mask_block())
    assert sections["train"] == {"learning_rate": 5e-4}
    config = MaskConfig(**sections["mask"])
    mask = build_mask(config, loaded.anatomy)
    adapted = {loaded.anatomy.by_name[f"{name}.weight"].block for one in mask.adapters for name in one.modules}
    assert adapted == set(suggestion.chosen)
    assert f"frost line: block {min(suggestion.chosen)} of 6" in suggestion.table()
    assert suggestion.table().count("chosen") == 3
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_the_command_prints_a_ranking_and_a_mask(tiny_model: Path) -> None:
    flags = ("--suggest", "gradient", "--budget", "0.5", "--rows", 2, "--data.path", ENGLISH)
    result = run_here("launch/plan.py", "--model.name_or_path", tiny_model, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("chosen") == 3
    assert "mask:\n  train:\n  - lora:\n      select: blocks:" in result.stdout


def test_blocks_are_listed_as_ranges() -> None:
    assert "blocks:1-3,5" in Suggestion("spectrum", (0.0,) * 6, (1, 2, 3, 5)).mask_block()


def test_a_budget_out_of_range_and_missing_rows_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"--budget is 1\.5"):
        suggest(loaded, "spectrum", 1.5, ())
    with pytest.raises(ConfigError, match="no rows to look at"):
        suggest(loaded, "gradient", 0.5, ())
    assert len(suggest(loaded, "spectrum", 0.01, ()).chosen) == 1

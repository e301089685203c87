"""Any architecture: tiny random models of many types, each masked, cut and trained for two steps."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from helpers import ROOT
from zoo import CUT, OTHER, UNCUT, Kind, make

from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch, collate
from toolkit.data.examples import Example
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters, untie_head
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import MaskError, ModelError
from toolkit.split.exactness import split_is_exact
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import supervised_loss


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """One row alone, and three of which one is padded."""
    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(3, 60, (length,), generator=generator).tolist()) for length in (17, 11, 17)]
    return [collate([Example.with_answer(rows[0], 9)], 0), collate([Example.with_answer(row, 5) for row in rows], 0)]


def last_two_and_head(model: Any, kind: Kind) -> set[str]:
    """What ``last:2, head`` means, by names alone."""
    chosen = (f"{kind.blocks}.2.", f"{kind.blocks}.3.", f"{kind.head}.")
    return {name for name, _ in model.named_parameters() if name.startswith(chosen)}


def build(model: Any, *train: str, tied: Literal["error", "untie"] = "untie") -> LayerMask:
    return build_mask(MaskConfig(train=list(train), tied=tied), detect_anatomy(model))


def masked(model: Any, *train: str) -> LayerMask:
    """Lay the mask onto the model, untying its head if need be."""
    mask = build(model, *train)
    apply_mask(model, mask, detect_anatomy(model))
    return mask


def two_steps(model: Any, mask: LayerMask, boundary: int | None, batches: list[Batch]) -> set[str]:
    """Names of the tensors, buffers included, that two optimizer steps change."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix, suffix = split(model.train(), detect_anatomy(model), boundary)
    train = TrainConfig(learning_rate=1e-2, warmup_ratio=0)
    parameters = trainable_parameters(suffix.model, mask)
    engine = LocalEngine(suffix, parameters, mask.groups, train, OptimConfig(), 2, World())
    for batch in batches:
        loss = supervised_loss(engine.forward_loss, prefix(batch) if prefix else None, batch, len(batch.targets))
        engine.backward(loss, is_last=True)
        engine.update()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", CUT)
def test_the_mask_names_the_last_blocks_and_the_head_and_two_steps_change_just_them(
    name: str, batches: list[Batch]
) -> None:
    model, kind = make(name), CUT[name]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    mask = masked(model, "last:2", "head")
    assert set(mask.names) == last_two_and_head(model, kind)
    assert f"{kind.head}.weight" in mask.names
    assert (mask.boundary, mask.tied) == (2, "untie" if tied else "no")
    changed = two_steps(model, mask, mask.boundary, batches)
    assert changed == {tensor for tensor in mask.names if not tensor.endswith(kind.unreached)}


@pytest.mark.parametrize("name", CUT)
def test_the_halves_give_the_whole_models_logits_bit_for_bit(name: str, batches: list[Batch]) -> None:
    model = make(name).eval()
    for boundary in (1, 2, 4):
        prefix, suffix = split(model, detect_anatomy(model), boundary)
        assert prefix is not None
        for batch in batches:
            with torch.no_grad():
                whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
                assert torch.equal(whole[batch.supervised], suffix.eval().logits(prefix.eval()(batch), batch))
            assert split_is_exact(model, prefix, suffix, batch)


@pytest.mark.parametrize("name", [*CUT, *UNCUT])
def test_the_loss_in_tiles_is_that_of_the_whole_models_logits(name: str, batches: list[Batch]) -> None:
    """Whatever the type does before its head or to what the head gives: losses and gradients, cut or not."""
    model = make(name).eval()
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        untie_head(model, detect_anatomy(model))
    prefix, suffix = split(model, detect_anatomy(model), 2 if name in CUT else None)
    found = suffix.choose_shortcuts(prefix(batches[0]) if prefix else None, batches[0])
    assert found.tiled is (name != "cpmant"), found
    for batch in batches:
        loss = suffix(prefix(batch) if prefix else None, batch)
        loss.backward()
        parameters = dict(suffix.model.named_parameters())
        gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[batch.supervised], batch.targets, reduction="sum")
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert f"{CUT.get(name, UNCUT.get(name)).head}.weight" in gradients
        for key, gradient in gradients.items():
            assert torch.allclose(gradient, parameters[key].grad, rtol=1e-3, atol=1e-4), key
        model.zero_grad()


@pytest.mark.parametrize("name", UNCUT)
def test_a_type_that_cannot_be_cut_is_found_out_and_trained_whole(name: str, batches: list[Batch]) -> None:
    model, kind = make(name), UNCUT[name]
    mask = masked(model, "last:2", "head")
    assert set(mask.names) == last_two_and_head(model, kind)
    prefix, suffix = split(model, detect_anatomy(model), mask.boundary)
    assert prefix is not None
    assert not any(split_is_exact(model, prefix, suffix, batch) for batch in batches)
    assert two_steps(model, mask, None, batches) == set(mask.names)


def test_a_type_that_rescales_its_own_weights_is_refused() -> None:
    model = make("rwkv").train()
    with pytest.raises(ModelError, match=r"changes its own weights in a forward pass \(first rwkv\.blocks"):
        split(model, detect_anatomy(model), 3)


def test_a_tie_is_seen_also_where_the_head_is_named_before_the_embeddings(batches: list[Batch]) -> None:
    model = make("xlm-roberta")
    assert next(iter(model.state_dict())).startswith("lm_head")
    with pytest.raises(MaskError, match=r"selects lm_head\.decoder\.weight, but .* one tensor \(roberta\.embeddings"):
        build(model, "head", tied="error")
    with pytest.raises(
        MaskError, match=r"untie is not possible: lm_head\.bias shares the tensor lm_head\.decoder\.bias"
    ):
        build(model, "head")
    mask = masked(model, "last:2")
    prefix, suffix = split(model, detect_anatomy(model), 2)
    assert prefix is not None
    assert split_is_exact(model, prefix, suffix, batches[1])
    assert two_steps(model, mask, 2, batches) == set(mask.names)


def test_tensors_that_blocks_share_train_in_all_of_them_or_in_none(batches: list[Batch]) -> None:
    model = make("zamba2")
    with pytest.raises(MaskError, match=r"selects model\.layers\.3\.shared.* but not model\.layers\.1\.shared"):
        build(model, "last:2")
    with pytest.raises(MaskError, match="untie is not possible"):
        build(model, "blocks:1,3", "head")
    mask = masked(model, "blocks:1,3")
    assert mask.boundary == 1
    prefix, suffix = split(model, detect_anatomy(model), 1)
    assert prefix is not None
    assert not split_is_exact(model, prefix, suffix, batches[0])  # block 1 reads the embeddings again
    names = dict(model.named_parameters())
    assert two_steps(model, mask, None, batches) & set(names) == set(mask.names)
    assert not any(".shared_transformer." in name and ".layers.3." in name for name in mask.names)


def test_the_documentation_counts_these_types() -> None:
    types = {name.partition(":")[0] for name in (*CUT, *UNCUT, *OTHER)}
    assert f"Of {len(types)} model types" in (ROOT / "docs/split.md").read_text(encoding="utf-8")
    assert f"Tested on {len(types)} model types" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

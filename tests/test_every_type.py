"""Every causal type of the installed transformers: two steps as in a plain loop, or listed with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from every_type import make_any
from test_zoo import batches  # noqa: F401
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import CUT, OTHER, UNCUT

from toolkit.config.schema import MaskConfig, OptimConfig, TrainConfig
from toolkit.data.batches import Batch
from toolkit.engine.local import LocalEngine
from toolkit.mask.apply import apply_mask, trainable_parameters
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.split.exactness import split_is_exact
from toolkit.split.suffix import split
from toolkit.split.supervised_loss import supervised_loss

NOT_MADE = {
    "dots3_note": "the number of heads is asked of the whole config and set by layer",
    "dots3_note_text": "the number of heads is asked of the whole config and set by layer",
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for another model and reads that model's cache",
    "gemma4_unified_assistant": "drafts for another model and reads that model's cache",
    "musicgen": "the type's config is of three models, its causal class takes the decoder's alone",
    "musicgen_melody": "the type's config is of three models, its causal class takes the decoder's alone",
    "qwen4_exp": "the config's causal class takes the text config, which is qwen4_exp_text",
}  # fmt: skip
"""Types of which no tiny model can be made, and why."""

QUICK = {
    "deepseek_v4",  # has integer tables
    "doge",  # has parameters that stand in the block itself
    "prophetnet",  # has a head that reads several streams
    "xlnet",  # computes [T, B, H] within its blocks
}
"""Types that every run of the tests tries; the others take minutes."""

IN_THE_ZOO = {name.partition(":")[0] for name in (*CUT, *UNCUT, *OTHER)}
TRAIN = TrainConfig(learning_rate=1e-3, warmup_ratio=0)


def masked(model: Any) -> LayerMask:
    """The last two blocks and the head; without the head where it cannot be untied."""
    anatomy = detect_anatomy(model)
    ties = [tensor for tensor in anatomy.tensors if tensor.alias_of and tensor is not anatomy.tied_head]
    train = ["last:2"] if anatomy.tied_head and ties else ["last:2", "head"]
    if any(tensor.part == "block" for tensor in ties):  # Zamba: the blocks 2 and 5 of 6 share their attention
        train = ["blocks:2,5"]
    mask = build_mask(MaskConfig(train=list(train), tied="untie"), anatomy)
    apply_mask(model, mask, anatomy)
    return mask


def plain_losses(model: Any, given: list[Batch]) -> list[float]:
    """Losses of the loop that anybody would write: whole logits, clipping, AdamW, a rate that falls to zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay)
    losses = []
    for step, batch in enumerate(given):
        optimizer.param_groups[0]["lr"] = TRAIN.learning_rate * (1 - step / len(given))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[batch.supervised].float(), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def our_losses(model: Any, mask: LayerMask, given: list[Batch]) -> list[float]:
    """Losses of the same steps with the model cut where that is exact."""
    anatomy = detect_anatomy(model)
    prefix, suffix = split(model, anatomy, mask.boundary)
    if prefix is None or not all(split_is_exact(model, prefix, suffix, batch) for batch in given):
        prefix, suffix = split(model, anatomy, None)
    suffix.choose_shortcuts(prefix(given[0]) if prefix else None, given[0])
    parameters = trainable_parameters(suffix.model, mask)
    engine = LocalEngine(suffix, parameters, mask.groups, TRAIN, OptimConfig(), len(given), World())
    losses = []
    for batch in given:
        loss = supervised_loss(engine.forward_loss, prefix(batch) if prefix else None, batch, len(batch.targets))
        engine.backward(loss, is_last=True)
        engine.update()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - IN_THE_ZOO - NOT_MADE.keys())
    ],
)
def test_two_steps_are_those_of_a_plain_loop_and_frozen_tensors_stay(
    name: str,
    batches: list[Batch],  # noqa: F811
) -> None:
    model = make_any(name).eval()  # without dropout, which draws otherwise when other modules run
    plain = copy.deepcopy(model)
    masked(plain)
    mask = masked(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert our_losses(model, mask, batches) == pytest.approx(plain_losses(plain, batches), rel=1e-4)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved, "nothing was learned"
    assert moved & dict(model.named_parameters()).keys() <= set(mask.names)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_MADE)
def test_the_types_that_are_left_out_cannot_be_made(name: str) -> None:
    with pytest.raises(Exception, match=r"."):
        make_any(name)

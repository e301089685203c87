from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from toolkit.config.schema import MaskConfig
from toolkit.mask.apply import apply_mask
from toolkit.mask.audit import audit, audit_markdown, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.mask.selectors import resolve_selectors
from toolkit.models.anatomy import Anatomy
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.errors import MaskError


@pytest.fixture(scope="module")
def tied() -> Anatomy:
    return detect_anatomy(tiny_llama(tied=True))


@pytest.fixture(scope="module")
def untied() -> Anatomy:
    return detect_anatomy(tiny_llama(tied=False))


def blocks(anatomy: Anatomy, *indices: int) -> set[str]:
    return {t.name for t in anatomy.tensors if t.name.startswith(tuple(f"model.layers.{i}." for i in indices))}


@pytest.mark.parametrize(
    ("selector", "indices"),
    [
        ("last:2", (4, 5)),
        ("first:1", (0,)),
        ("last:6", range(6)),
        ("blocks:3", (3,)),
        ("blocks:1-3", (1, 2, 3)),
        ("blocks:0,2-3,5", (0, 2, 3, 5)),
        ("glob:model.layers.4.*", (4,)),
        (r"re:model\.layers\.[45]\..*", (4, 5)),
        ("blocks:-1", (5,)),
        ("blocks:0,-2--1", (0, 4, 5)),
        ("every:2", (1, 3, 5)),
        ("every:4", (3,)),
        ("fraction:0.5", (3, 4, 5)),
        ("fraction:0.01", (5,)),
        ("fraction:1", range(6)),
        ("contains:layers.4", (4,)),
    ],
)
def test_block_selectors_resolve_to_exactly_those_blocks(
    untied: Anatomy, selector: str, indices: tuple[int, ...]
) -> None:
    assert resolve_selectors([selector], untied) == blocks(untied, *indices)


def test_parts_of_blocks_divide_a_block() -> None:
    anatomy = detect_anatomy(tiny_llama(tied=False))
    attention, mlp, norms = (resolve_selectors([f"last:2/{part}"], anatomy) for part in ("attention", "mlp", "norms"))
    assert attention == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (4, 5) for x in "qkvo"}
    assert mlp == {f"model.layers.{i}.mlp.{x}_proj.weight" for i in (4, 5) for x in ("gate", "up", "down")}
    assert norms == blocks(anatomy, 4, 5) - attention - mlp
    assert len(norms) == 4


def test_norms_within_the_attention_are_norms() -> None:
    config = Qwen3Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, vocab_size=64,
    )  # fmt: skip
    anatomy = detect_anatomy(Qwen3ForCausalLM(config))
    assert {name.split(".")[-2] for name in resolve_selectors(["last:1/norms"], anatomy)} == {
        "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert not any("norm" in name for name in resolve_selectors(["last:1/attention"], anatomy))


def test_all_is_every_tensor(untied: Anatomy) -> None:
    assert resolve_selectors(["all"], untied) == set(untied.by_name)


def test_a_substring_that_reaches_further_blocks_is_refused() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2, vocab_size=16)
    anatomy = detect_anatomy(LlamaForCausalLM(config))
    with pytest.raises(MaskError) as error:
        resolve_selectors(["contains:layers.1"], anatomy)
    assert "also matches model.layers.10." in str(error.value)
    assert "Write blocks:1" in str(error.value)
    assert resolve_selectors(["contains:layers.1."], anatomy) == resolve_selectors(["blocks:1"], anatomy)


def test_freeze_takes_away_from_what_train_selects(untied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["last:2", "head"], freeze=["blocks:4", "last:6/norms"]), untied)
    expected = resolve_selectors(["blocks:5/attention", "blocks:5/mlp", "head"], untied)
    assert set(mask.names) == expected
    assert mask.boundary == 5


@pytest.mark.parametrize("policy", ["both", "head_only"])
def test_a_tied_tensor_that_is_frozen_under_its_other_name_is_refused(tied: Anatomy, policy: Any) -> None:
    with pytest.raises(
        MaskError, match=rf"freeze keeps model\.embed_tokens\.weight frozen.*mask\.tied: {policy} trains"
    ):
        build_mask(MaskConfig(train=["last:1", "head"], freeze=["embeddings"], tied=policy), tied)
    untied = build_mask(MaskConfig(train=["last:1", "head"], freeze=["embeddings"], tied="untie"), tied)
    assert "model.embed_tokens.weight" not in untied.names


def test_a_mask_that_freezes_all_it_trains_is_refused(untied: Anatomy) -> None:
    with pytest.raises(MaskError, match="leaves nothing to train"):
        build_mask(MaskConfig(train=["last:2"], freeze=["all"]), untied)


def test_groups_keep_their_settings_and_must_not_overlap(untied: Anatomy) -> None:
    config = MaskConfig.model_validate(
        {"train": ["last:1", {"select": "head", "learning_rate": 1e-4}, {"select": ["norm"], "weight_decay": 0.5}]}
    )
    mask = build_mask(config, untied)
    assert [(g.names[0], g.learning_rate, g.weight_decay) for g in mask.groups] == [
        ("model.layers.5.self_attn.q_proj.weight", None, None),
        ("lm_head.weight", 1e-4, None),
        ("model.norm.weight", None, 0.5),
    ]
    assert sum(len(group.names) for group in mask.groups) == len(mask.names)
    overlapping = MaskConfig.model_validate({"train": ["last:2", {"select": "last:1", "learning_rate": 1e-4}]})
    with pytest.raises(MaskError, match=r"into two groups of mask\.train"):
        build_mask(overlapping, untied)


@pytest.mark.parametrize(
    ("train", "boundary", "trained"),
    [(["last:2", "head"], 0, 19), (["embeddings"], 0, 1), (["head"], 0, 1)],
)
def test_both_trains_the_shared_tensor_as_one(tied: Anatomy, train: list[str], boundary: int, trained: int) -> None:
    mask = build_mask(MaskConfig(train=train, tied="both"), tied)
    assert (mask.boundary, len(mask.names), mask.has_prefix) == (boundary, trained, False)
    assert mask.names[0] == "model.embed_tokens.weight"
    assert "no frozen prefix" in audit_table(mask, tied)


def test_head_only_keeps_the_frost_line_of_the_blocks(tied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["last:2", "head"], tied="head_only"), tied)
    assert (mask.boundary, mask.names[0], mask.has_prefix) == (4, "model.embed_tokens.weight", True)
    assert "through the head alone; the embeddings move along" in audit_table(mask, tied)
    with pytest.raises(MaskError, match="write tied: both, or leave embeddings out"):
        build_mask(MaskConfig(train=["embeddings"], tied="head_only"), tied)


def test_part_selectors_resolve_to_exactly_that_part(untied: Anatomy) -> None:
    assert resolve_selectors(["head"], untied) == {"lm_head.weight"}
    assert resolve_selectors(["embeddings"], untied) == {"model.embed_tokens.weight"}
    assert resolve_selectors(["norm"], untied) == {"model.norm.weight"}


def test_selectors_unite_in_any_order(untied: Anatomy) -> None:
    assert resolve_selectors(["head", "last:1", "blocks:5"], untied) == resolve_selectors(["blocks:5", "head"], untied)


def test_patterns_match_whole_names_only(untied: Anatomy) -> None:
    with pytest.raises(MaskError, match="matches none of the 57 tensors"):
        resolve_selectors(["re:layers.2"], untied)
    assert resolve_selectors(["glob:*.layers.2.*"], untied) == blocks(untied, 2)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("last:7", "whole number from 1 to 6"),
        ("last:0", "whole number from 1 to 6"),
        ("first:x", "whole number from 1 to 6"),
        ("blocks:6", "block 6 is out of range; this model has 6 blocks, 0 to 5"),
        ("blocks:4-2", "runs backwards; write 2-4"),
        ("blocks:", "is not a block"),
        ("layers.28", "is not known; expected one of last:N"),
        ("haed", "Did you mean head?"),
        ("lst:4", "Did you mean last:?"),
        ("glob:model.layer.4.*", "Close names: model.layers.4"),
        ("re:(", "is not a regular expression"),
        ("", "is not known"),
        ("layers.28 ", "Did you mean last:1 (there is no block 28)?"),
        ("model.layers.3", "Did you mean blocks:3?"),
        ("blocks:-7", "block -7 is out of range"),
        ("every:7", "whole number from 1 to 6"),
        ("fraction:0", "above 0 and up to 1"),
        ("fraction:1.5", "above 0 and up to 1"),
        ("last:2/attn", "a block has no part 'attn'; expected attention, mlp, norms. Did you mean attention?"),
        ("contains:transformer.h.3.", "On this model write blocks:3"),
        ("contains:wte", "On this model write embeddings"),
        ("contains:", "matches none"),
    ],
)
def test_a_selector_that_cannot_be_meant_is_refused_with_a_remedy(untied: Anatomy, selector: str, message: str) -> None:
    with pytest.raises(MaskError) as error:
        resolve_selectors([selector], untied)
    assert message in str(error.value)


def test_a_part_the_model_lacks_is_refused(untied: Anatomy) -> None:
    bare = Anatomy(
        untied.embeddings, untied.blocks, 6, None, untied.head, tuple(t for t in untied.tensors if t.part != "norm")
    )
    with pytest.raises(MaskError, match="matches nothing"):
        resolve_selectors(["norm"], bare)


@pytest.mark.parametrize(
    ("train", "boundary"),
    [
        (["last:4", "head"], 2),
        (["head"], 6),
        (["norm"], 6),
        (["blocks:3", "head"], 3),
        (["first:1"], 0),
        (["embeddings", "last:1"], 0),
    ],
)
def test_the_boundary_is_the_lowest_block_that_trains(untied: Anatomy, train: list[str], boundary: int) -> None:
    assert build_mask(MaskConfig(train=train), untied).boundary == boundary


@pytest.mark.parametrize("train", [["head"], ["last:2", "head"], ["embeddings"], ["glob:lm_head.*"], ["re:.*embed.*"]])
def test_a_tied_head_is_refused_and_the_choices_are_named(tied: Anatomy, train: list[str]) -> None:
    with pytest.raises(MaskError) as error:
        build_mask(MaskConfig(train=train), tied)
    assert "share one tensor (model.embed_tokens.weight)" in str(error.value)
    for choice in ("untie ", "both ", "head_only "):
        assert f"  mask.tied: {choice}" in str(error.value)


def test_a_tied_head_that_is_not_selected_is_no_conflict(tied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["last:1"]), tied)
    assert set(mask.names) == blocks(tied, 5)
    assert mask.tied == "no"


def test_untie_gives_the_head_its_own_tensor_and_leaves_the_embeddings_frozen() -> None:
    model = tiny_llama(tied=True)
    anatomy = detect_anatomy(model)
    before = model.model.embed_tokens.weight.detach().clone()
    apply_mask(model, build_mask(MaskConfig(train=["head"], tied="untie"), anatomy), anatomy)
    head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() != embeddings.data_ptr()
    assert torch.equal(head, before)
    assert torch.equal(embeddings, before)
    assert head.requires_grad
    assert not embeddings.requires_grad
    assert not model.config.tie_word_embeddings


def test_exactly_the_mask_requires_gradients() -> None:
    model = tiny_llama(tied=True)
    anatomy = detect_anatomy(model)
    mask = build_mask(MaskConfig(train=["last:2", "head"], tied="untie"), anatomy)
    apply_mask(model, mask, anatomy)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == blocks(anatomy, 4, 5) | {"lm_head.weight"} == set(mask.names)


def test_the_audit_counts_every_parameter_once(tied: Anatomy) -> None:
    rows = {row.part: row for row in audit(build_mask(MaskConfig(train=["last:2"]), tied), tied)}
    assert list(rows) == ["embeddings", "blocks 0–3", "blocks 4–5", "norm", "head"]
    assert rows["head"].parameters == 0
    assert rows["head"].note == "tied to model.embed_tokens.weight"
    model = tiny_llama(tied=True)
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert rows["blocks 4–5"].state == "trained"
    assert rows["blocks 0–3"].state == "frozen"


def test_the_audit_table_draws_the_frost_line_and_the_untied_head(tied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["last:4", "head"], tied="untie"), tied)
    lines = audit_table(mask, tied).splitlines()
    line = next(number for number, text in enumerate(lines) if "frost line: block 2 of 6" in text)
    assert lines[line - 1].startswith("blocks 0–1")
    assert lines[line + 1].startswith("blocks 2–5")
    assert "own copy, untied" in lines[-2]
    assert "53,504 trained (60.5%)" in lines[-1]
    assert "| blocks 2–5 | 36 | 37,120 | trained |" in audit_markdown(mask, tied)


def test_a_partly_trained_block_shows_its_share(untied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["glob:*.5.mlp.*"]), untied)
    row = next(row for row in audit(mask, untied) if row.part == "block 5")
    assert row.state == "66.2% trained"


def test_a_mask_survives_its_json(tmp_path: Path, untied: Anatomy) -> None:
    import json

    mask = build_mask(MaskConfig(train=["last:1", "norm"]), untied)
    mask.save(tmp_path / "mask.json")
    assert LayerMask.from_dict(json.loads((tmp_path / "mask.json").read_text())) == mask

from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

from toolkit.config.schema import MaskConfig
from toolkit.errors import MaskError
from toolkit.mask.apply import apply_mask
from toolkit.mask.audit import audit, audit_markdown, audit_table
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.mask.selectors import resolve
from toolkit.models.anatomy import Anatomy
from toolkit.models.inspect import inspect


@pytest.fixture(scope="module")
def tied() -> Anatomy:
    return inspect(tiny_llama(tied=True))


@pytest.fixture(scope="module")
def untied() -> Anatomy:
    return inspect(tiny_llama(tied=False))


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
    ],
)
def test_block_selectors_resolve_to_exactly_those_blocks(
    untied: Anatomy, selector: str, indices: tuple[int, ...]
) -> None:
    assert resolve([selector], untied) == blocks(untied, *indices)


def test_part_selectors_resolve_to_exactly_that_part(untied: Anatomy) -> None:
    assert resolve(["head"], untied) == {"lm_head.weight"}
    assert resolve(["embeddings"], untied) == {"model.embed_tokens.weight"}
    assert resolve(["norm"], untied) == {"model.norm.weight"}


def test_selectors_unite_in_any_order(untied: Anatomy) -> None:
    assert resolve(["head", "last:1", "blocks:5"], untied) == resolve(["blocks:5", "head"], untied)


def test_patterns_match_whole_names_only(untied: Anatomy) -> None:
    with pytest.raises(MaskError, match="matches none of the 57 tensors"):
        resolve(["re:layers.2"], untied)
    assert resolve(["glob:*.layers.2.*"], untied) == blocks(untied, 2)


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
    ],
)
def test_a_selector_that_cannot_be_meant_is_refused_with_a_remedy(untied: Anatomy, selector: str, message: str) -> None:
    with pytest.raises(MaskError) as error:
        resolve([selector], untied)
    assert message in str(error.value)


def test_a_part_the_model_lacks_is_refused(untied: Anatomy) -> None:
    bare = Anatomy(
        untied.embeddings, untied.blocks, 6, None, untied.head, tuple(t for t in untied.tensors if t.part != "norm")
    )
    with pytest.raises(MaskError, match="matches nothing"):
        resolve(["norm"], bare)


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
    assert "mask.tied: untie" in str(error.value)


def test_a_tied_head_that_is_not_selected_is_no_conflict(tied: Anatomy) -> None:
    mask = build_mask(MaskConfig(train=["last:1"]), tied)
    assert set(mask.names) == blocks(tied, 5)
    assert not mask.untie_head


def test_untie_gives_the_head_its_own_tensor_and_leaves_the_embeddings_frozen() -> None:
    model = tiny_llama(tied=True)
    anatomy = inspect(model)
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
    anatomy = inspect(model)
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

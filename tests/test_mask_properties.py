"""Whatever selectors are combined, the mask obeys the algebra of sets and never touches an unnamed tensor."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.config.schema import MaskConfig
from toolkit.mask.apply import apply_mask
from toolkit.mask.layer_mask import LayerMask, build_mask
from toolkit.mask.selectors import resolve_selectors
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.errors import MaskError

ANATOMY = detect_anatomy(tiny_llama(tied=False))
COUNT = ANATOMY.block_count
index = st.integers(-COUNT, COUNT - 1)
part = st.sampled_from(["", "/attention", "/mlp", "/norms"])


@st.composite
def block_lists(draw: st.DrawFn) -> str:
    """``blocks:`` with single blocks and ranges that run upwards."""
    items = []
    for _ in range(draw(st.integers(1, 3))):
        low, high = sorted((draw(index) % COUNT, draw(index) % COUNT))
        items.append(draw(st.sampled_from([str(low), f"{low}-{high}", f"{low - COUNT}", f"{low}-{high - COUNT}"])))
    return f"blocks:{','.join(items)}"


selectors = st.one_of(
    st.builds("{}:{}{}".format, st.sampled_from(["last", "first", "every"]), st.integers(1, COUNT), part),
    st.builds("fraction:{}{}".format, st.floats(0.01, 1).map(lambda f: f"{f:.3f}"), part),
    st.builds("{}{}".format, block_lists(), part),
    st.sampled_from(
        ["head", "embeddings", "norm", "all", "glob:*.mlp.*", r"re:model\.layers\.[13]\..*", "contains:layers.2"]
    ),
)
lists = st.lists(selectors, min_size=1, max_size=4)


def names(train: list[str], freeze: list[str] | None = None) -> set[str]:
    try:
        return set(build_mask(MaskConfig(train=train, freeze=freeze or []), ANATOMY).names)
    except MaskError as error:
        assert "leaves nothing to train" in str(error)
        return set()


@settings(deadline=None)
@given(lists, lists)
def test_freezing_is_set_difference_and_selection_is_union(train: list[str], freeze: list[str]) -> None:
    one_by_one = set().union(*(resolve_selectors([selector], ANATOMY) for selector in train))
    assert names(train) == one_by_one
    assert names(train, freeze) == one_by_one - resolve_selectors(freeze, ANATOMY)


@settings(deadline=None)
@given(lists, lists, st.randoms())
def test_order_and_repetition_do_not_matter(train: list[str], freeze: list[str], random: Any) -> None:
    shuffled = [*train, random.choice(train)]
    random.shuffle(shuffled)
    assert names(shuffled, freeze[::-1]) == names(train, freeze)


@settings(deadline=None)
@given(lists)
def test_the_boundary_is_the_lowest_block_with_a_trained_tensor(train: list[str]) -> None:
    mask = build_mask(MaskConfig(train=train), ANATOMY)
    tensors = [ANATOMY.by_name[name] for name in mask.names]
    if any(tensor.part == "embeddings" for tensor in tensors):
        assert mask.boundary == 0
    else:
        assert mask.boundary == min((t.block for t in tensors if t.block is not None), default=COUNT)


@given(lists, lists)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=40)
def test_only_named_tensors_ever_require_gradients(train: list[str], freeze: list[str]) -> None:
    model = tiny_llama(tied=False)
    try:
        mask: LayerMask = build_mask(MaskConfig(train=train, freeze=freeze), ANATOMY)
    except MaskError:
        return
    apply_mask(model, mask, ANATOMY)
    requiring = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert requiring == resolve_selectors(train, ANATOMY) - resolve_selectors(freeze, ANATOMY)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_resolves_or_is_refused_with_a_clear_error(text: str) -> None:
    try:
        resolved = resolve_selectors([text], ANATOMY)
    except MaskError as error:
        assert "mask selector" in str(error)
    else:
        assert resolved
        assert resolved <= set(ANATOMY.by_name)


@settings(deadline=None)
@given(
    st.sampled_from(["last", "first", "every", "blocks", "fraction", "contains", "re", "glob"]), st.text(max_size=12)
)
def test_any_argument_resolves_or_is_refused_with_a_clear_error(kind: str, argument: str) -> None:
    test_any_text_resolves_or_is_refused_with_a_clear_error.hypothesis.inner_test(f"{kind}:{argument}")


@pytest.mark.parametrize(
    "text", ["re:" + "(" * 200, "blocks:" + "9" * 5000, "fraction:1e400", "last:٣", "every:" + "9" * 5000]
)
def test_nasty_arguments_are_refused(text: str) -> None:
    with pytest.raises(MaskError):
        resolve_selectors([text], ANATOMY)

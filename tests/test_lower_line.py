"""The cache of a frost line filled from that of a lower one: the same bits, and no block below it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import invocation, make_tokenizer, metrics, run_ranks, set_up, tiny_flags, tiny_llama, train
from safetensors import safe_open
from test_cache import counting_blocks
from zoo import make

from toolkit.data.batches import Batch, collate, pack
from toolkit.data.examples import Example
from toolkit.models.anatomy_detection import detect_anatomy
from toolkit.runtime.distributed import World
from toolkit.split.exactness import continues_exactly
from toolkit.split.prefix import Prefix

ROWS = 8


def flags(model: Path, run: Path, cache: Path, last: int, *more: object) -> list[str]:
    given = ("--data.limit", ROWS, "--mask.train", f"last:{last}", "--prefix.cache_dir", cache)
    return tiny_flags(model, run, *given, *more)


def stored(cache: Path, boundary: int) -> dict[str, torch.Tensor]:
    """All hidden states of a frost line, by the sample's key."""
    found = {}
    for described in cache.glob("*/namespace.json"):
        if f'"boundary": "{boundary}"' in described.read_text():
            for path in described.parent.glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_higher_line_is_filled_from_a_lower_one_with_the_same_bits(
    tiny_model: Path, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("--model.dtype", dtype, "--train.epochs", 2)
    assert train(*flags(tiny_model, tmp_path / "low", tmp_path / "cache", 4, *more)) == 0
    with counting_blocks() as runs, caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tiny_model, tmp_path / "high", tmp_path / "cache", 1, *more)) == 0
    assert f"the first pass of {ROWS} of {ROWS} missing samples begins at block 2" in caplog.text
    checks = 3 + 3 + 1 + 2  # exact, repeatable, the form of the outputs; two rows from their tokens
    assert runs[0] == runs[1] == checks
    assert runs[2] == runs[3] == runs[4] == checks + 2 + ROWS, "the two rows again, and each sample once"

    assert train(*flags(tiny_model, tmp_path / "tokens", tmp_path / "other", 1, *more)) == 0
    ours = stored(tmp_path / "cache", 5)
    assert len(ours) == ROWS
    assert same(ours, stored(tmp_path / "other", 5))
    assert metrics(tmp_path / "high") == metrics(tmp_path / "tokens")


def test_the_line_that_saves_most_is_taken_and_what_it_lacks_begins_at_the_tokens(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    for last, rows in ((4, ROWS), (3, ROWS), (2, 3)):
        given = flags(tiny_model, tmp_path / f"{last}", cache, last, "--data.limit", rows, "--prefix.cache", "on")
        assert train(*given, "--train.epochs", "1") == 0
    caplog.clear()
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tiny_model, tmp_path / "high", cache, 1, "--train.epochs", 2)) == 0
    assert f"the first pass of {ROWS} of {ROWS} missing samples begins at block 3" in caplog.text
    assert train(*flags(tiny_model, tmp_path / "more", cache, 5, "--train.epochs", 2)) == 0, "a lower one is no help"
    few, caplog_text = tmp_path / "few", "the first pass of 3 of 8 missing samples begins at block 2"
    assert train(*flags(tiny_model, tmp_path / "part", few, 4, "--data.limit", 3, "--train.epochs", 2)) == 0
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tiny_model, tmp_path / "rest", few, 1, "--train.epochs", 2)) == 0
    assert caplog_text in caplog.text
    ours, theirs = stored(few, 5), stored(cache, 5)
    assert ours.keys() == theirs.keys(), "a batch with a sample that is not there begins at its tokens"
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours), "two layouts of batches round apart"


def test_other_weights_are_no_lower_line(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    assert train(*flags(tmp_path / "other", tmp_path / "low", tmp_path / "cache", 4, "--train.epochs", 2)) == 0
    with caplog.at_level(logging.INFO, "frostline"):
        set_up(invocation(*flags(tiny_model, tmp_path / "high", tmp_path / "cache", 1)), World())
    assert "begins at block" not in caplog.text


def test_without_room_for_both_the_first_pass_begins_at_the_tokens(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(*flags(tiny_model, tmp_path / "low", tmp_path / "cache", 4, "--train.epochs", 2)) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    limit = ("--prefix.cache_limit_gib", size * 1.3 / 2**30)
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tiny_model, tmp_path / "high", tmp_path / "cache", 1, "--train.epochs", 2, *limit)) == 0
    assert "there is no room for it beside them; the first pass begins at the tokens" in caplog.text
    assert len(stored(tmp_path / "cache", 5)) == ROWS


def rows_of(lengths: Sequence[int], packed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(3, 60, (length,), generator=generator).tolist()) for length in lengths]
    examples = [Example.with_answer(row, 2) for row in ids]
    return pack(examples) if packed else collate(examples, 0)


TYPES = ("llama", "gemma3_text", "gemma2", "qwen2", "gpt2", "exaone4", "cohere2", "bloom", "falcon_mamba")
"""Several kinds of attention masks and rotary embeddings by layer, learned positions, biases by position, a state."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TYPES)
def test_many_architectures_continue_with_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype).eval()
    anatomy = detect_anatomy(model)
    prefix = Prefix(model, anatomy, 3)
    for boundary in (1, 2):
        packed = [rows_of([9, 5, 13], packed=True)] if name in ("llama", "gemma3_text") else []
        for batch in (rows_of([9, 5, 13]), rows_of([12]), *packed):
            assert continues_exactly(prefix, boundary, batch)
        entering, _ = prefix.states_at(boundary, rows_of([9, 9]))
        other = prefix.forward_from(boundary, entering + 1, rows_of([9, 9]))
        assert not torch.equal(other, prefix(rows_of([9, 9]))), "what is given is what it computes from"


class HandsOnMore(torch.nn.Module):
    """A block that adds what block 0 left behind, beside the hidden states."""

    def __init__(self, block: Any, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.block, self.kept, self.attention_type = block, kept, None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.block.self_attn.layer_idx == 0:
            self.kept[:] = [hidden_states]
        output = self.block(hidden_states, *args, **kwargs)
        if self.block.self_attn.layer_idx != 2:
            return output
        kept = self.kept.pop()  # fails without block 0
        return (output[0] + kept, *output[1:]) if isinstance(output, tuple) else output + kept


def test_a_model_that_hands_on_more_than_hidden_states_begins_at_the_tokens() -> None:
    model = tiny_llama().eval()
    anatomy = detect_anatomy(model)
    prefix = Prefix(model, anatomy, 4)
    kept: list[torch.Tensor] = []
    blocks = prefix.model.get_submodule(anatomy.blocks)
    for at in range(3):
        blocks[at] = HandsOnMore(blocks[at], kept)
    prefix._blocks = list(blocks)[:4]
    assert not continues_exactly(prefix, 1, rows_of([9, 5]))


def test_a_mixture_of_experts_begins_at_the_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    like = tiny_llama().config
    values = {key: getattr(like, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads",
              "num_key_value_heads", "num_hidden_layers", "vocab_size")}  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**values, num_local_experts=4, eos_token_id=0, pad_token_id=0)).save_pretrained(
        tmp_path / "model"
    )
    make_tokenizer().save_pretrained(tmp_path / "model")
    more = ("--train.epochs", 2, "--data.limit", 4, "--mask.tied", "error")
    assert train(*flags(tmp_path / "model", tmp_path / "low", tmp_path / "cache", 4, *more)) == 0
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tmp_path / "model", tmp_path / "high", tmp_path / "cache", 1, *more)) == 0
    assert "a mixture of experts rounds by what else is in a batch; the first pass begins at the tokens" in caplog.text


@pytest.mark.distributed
def test_two_ranks_store_the_bits_that_one_does(tiny_model: Path, tmp_path: Path) -> None:
    for last in (4, 1):
        more = ("--train.epochs", 2, "--train.max_steps", 2, "--model.dtype", "bfloat16")
        given = flags(tiny_model, tmp_path / f"two-{last}", tmp_path / "two", last, *more, "--prefix.cache", "on")
        done = run_ranks("launch/train.py", *given)
        assert done.returncode == 0, done.stderr
    assert "missing samples begins at block 2" in done.stderr
    assert train(*flags(tiny_model, tmp_path / "one", tmp_path / "cache", 1, *more, "--prefix.cache", "on")) == 0
    assert same(stored(tmp_path / "two", 5), stored(tmp_path / "cache", 5))


def test_a_quantised_prefix_continues_from_its_own_lower_line(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("--prefix.precision", "int8", "--train.epochs", 2)
    assert train(*flags(tiny_model, tmp_path / "low", tmp_path / "cache", 4, *more)) == 0
    with caplog.at_level(logging.INFO, "frostline"):
        assert train(*flags(tiny_model, tmp_path / "high", tmp_path / "cache", 1, *more)) == 0
    assert "missing samples begins at block 2" in caplog.text
    assert train(*flags(tiny_model, tmp_path / "tokens", tmp_path / "other", 1, *more)) == 0
    assert same(stored(tmp_path / "cache", 5), stored(tmp_path / "other", 5))

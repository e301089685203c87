"""What is wrong with rows and added tokens is one clear error; what stays untrained is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import mask
from helpers import invocation, make_tokenizer, run_here, set_up, tiny_flags, tiny_llama
from row_runs import ADD, FULL, TOKENS, full_model, rows

from toolkit.mask.row_layers import add_rows, unused_rows
from toolkit.mask.rows import TableRows
from toolkit.models.added_tokens import add_token_rows, add_tokens
from toolkit.models.probe import called_modules
from toolkit.runtime.errors import MaskError, ModelError, UsageError
from toolkit.training.preflight import preflight


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([rows("embeddings", **{"from": 512})], "rows.from is 512, but model.embed_tokens.weight has 512 rows, 0 to"),
        ([rows("embeddings", **{"from": 5, "to": 900})], "rows.to is 900, but"),
        ([rows("embeddings", ids=[3, 512])], "rows.ids is 512, but"),
        ([rows("last:2", **{"from": 5})], "rows.select has 'last:2', which selects no table"),
        ([rows("norm", **{"from": 5})], "expected embeddings or head, whose tables here are lm_head.weight and model"),
        ([rows("embedings", **{"from": 5})], "mask selector 'embedings' is not known"),
        ([rows("embeddings")], "rows.from is added, but no tokens are"),
        ([rows("embeddings", **{"from": 5}), "embeddings"], "whole and some of its rows; expected one of the two"),
        ([rows("embeddings", **{"from": 5}), {"select": "head"}], "whole and some of its rows"),
        ([rows("embeddings", **{"from": 5}), rows("head", ids=[4, 9])], "train row 9 of model.embed_tokens.weight"),
        ([rows("embeddings", **{"from": 490})], "rows 500 to 511 of .* no token has: the tokenizer's ids end at 499"),
        ([{"rows": {"select": [], "from": 3}}], "at least 1 item"),
        ([{"rows": {"from": 3}}], r"mask\.train\.0\.rows\.select is missing"),
        ([{"rows": {"select": "head", "from": -1}}], "from: -1 is no row; expected a number from 0 on, or added"),
        ([{"rows": {"select": "head", "from": "new"}}], "from: 'new' is no row"),
        ([{"rows": {"select": "head"}}], "it has neither from nor ids"),
        ([{"rows": {"select": "head", "from": 3, "ids": [4]}}], "it has both from and ids"),
        ([{"rows": {"select": "head", "from": 3, "to": 2}}], "runs from 3 to 2, backwards"),
        ([{"rows": {"select": "head", "to": 2, "ids": [1]}}], "to is 2 without a number as from"),
        ([{"rows": {"select": "head", "frm": 3}}], r"did you mean mask\.train\.0\.rows\.from"),
        ([{"rows": "head"}], "expected keys under it, such as {select: embeddings, from: added}"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_one_clear_error(entries: list[Any], message: str, tiny_model: Path, tmp_path: Path) -> None:
    """The tables of this model have 512 rows for 500 tokens."""
    with pytest.raises(UsageError, match=message):
        set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", "--mask.tied", "both", *mask(*entries))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mask.tied", "error"],
            "the mask selects lm_head.weight, but the head and the embeddings share",
        ),
        (["--mask.tied", "both", "--mask.freeze", "head"], "mask.freeze takes away all tables that rows selects"),
        (["--mask.tied", "both", "--mask.freeze", "embeddings"], "mask.freeze keeps model.embed_tokens.weight frozen"),
        (["--mask.tied", "both", "--prefix.cache", "on"], "nothing below the trained tensors is frozen"),
    ],
)
def test_ties_and_what_is_frozen_mean_what_they_do_for_whole_tables(
    flags: list[str], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(
            invocation(*tiny_flags(tiny_model, tmp_path / "run", *flags, *mask(rows("head", **{"from": 5, "to": 6}))))
        )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|user|>", "<new>"], r"'<\|user\|>' \(id 1\), which the tokenizer has already"),
        (["<new>", "<new>"], "'<new>' is there twice"),
        (["<new>", ""], "'' is no token; expected a text"),
        (["  "], "'  ' is no token; expected a text"),
    ],
)
def test_a_token_that_cannot_be_added_is_one_clear_error(
    tokens: list[str], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        set_up(invocation(*tiny_flags(tiny_model, tmp_path / "run", "--model.add_tokens", *tokens, *mask("last:1"))))


@pytest.mark.parametrize(
    ("entries", "tied", "untrained"),
    [
        (["last:1"], True, ["model.embed_tokens.weight"]),
        (["last:1"], False, ["lm_head.weight", "model.embed_tokens.weight"]),
        ([rows("embeddings")], False, ["lm_head.weight"]),
        ([rows("embeddings", ids=[FULL])], False, ["lm_head.weight", "model.embed_tokens.weight"]),
        ([rows("embeddings", "head")], False, []),
        (["all"], False, []),
        ([rows("head")], True, []),
    ],
)
def test_added_tokens_that_do_not_train_are_warned_of(
    entries: list[Any], tied: bool, untrained: list[str], tmp_path: Path, said: list[str]
) -> None:
    full_model(tmp_path / "model", tied)
    flags = tiny_flags(tmp_path / "model", tmp_path / "run", *ADD, "--mask.tied", "head_only", *mask(*entries))
    preflight(invocation(*flags), 1)
    warned = [line.split("their rows of ")[1].split(":")[0] for line in said if "model.add_tokens adds 2" in line]
    assert warned == untrained


def test_the_start_of_new_rows_is_the_mean_whatever_the_threads_and_the_padding() -> None:
    for tied, length in ((True, 500), (False, 500), (True, 512), (False, 512)):
        starts = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = tiny_llama(tied).to(torch.bfloat16)
            model.resize_token_embeddings(length, mean_resizing=False)
            model.get_input_embeddings().weight.data[500:] = 7.0
            state, before = torch.get_rng_state(), model.get_output_embeddings().weight.detach().clone()
            add_token_rows(model, (500, 501))
            assert torch.equal(torch.get_rng_state(), state)
            starts.append([model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()])
            assert len(starts[-1][0]) == max(length, 502)
            expected = before[:500].double().mean(0).to(torch.bfloat16)
            assert torch.equal(starts[-1][1][500:502], expected.expand(2, -1))
            assert torch.equal(starts[-1][1][:500], before[:500])
            assert (starts[-1][0] is starts[-1][1]) or not tied or torch.equal(*starts[-1])
        assert all(torch.equal(first, second) for first, second in zip(*starts, strict=True))


def test_a_plan_says_what_the_run_would(tiny_model: Path, tmp_path: Path) -> None:
    flags = tiny_flags(tiny_model, tmp_path / "run", *mask(rows("embeddings", **{"from": 600})))
    result = run_here("plan.py", *flags)
    assert result.returncode == 2
    assert "has 512 rows" in result.stderr


def test_a_table_that_the_model_computes_past_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code multiplies with the head's weight instead of calling the head."""
    model = tiny_llama(tied=False)
    add_rows(model, [TableRows("lm_head.weight", ((5, 7),))])
    assert unused_rows(model, called_modules(model, lambda: model(input_ids=torch.arange(5)[None]))) == []
    assert unused_rows(model, called_modules(model, lambda: model.model(input_ids=torch.arange(5)[None]))) == [
        "lm_head"
    ]
    flags = tiny_flags(tiny_model, tmp_path / "run", "--mask.tied", "untie", *mask(rows("head", ids=[5, 6])))
    monkeypatch.setattr("toolkit.training.phase_cut.unused_rows", lambda model, called: ["lm_head"])
    with pytest.raises(UsageError, match="some of lm_head, which this model never calls: it computes with its weight"):
        set_up(invocation(*flags))


def test_a_head_of_an_unknown_class_gets_no_rows() -> None:
    class Head(torch.nn.Module):
        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = tiny_llama(tied=False)
    model.lm_head = Head(model.lm_head.weight)
    with pytest.raises(MaskError, match=r"lm_head.weight, which is a Head here; expected an nn.Embedding or nn.Linear"):
        add_rows(model, [TableRows("lm_head.weight", ((3, 5),))])


def test_what_a_tokenizer_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "add_tokens", lambda tokens: 1)
    with pytest.raises(ModelError, match="the tokenizer took 1 of the 2 tokens"):
        add_tokens(tokenizer, TOKENS)

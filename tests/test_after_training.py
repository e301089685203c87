"""Export, delta, generate and evaluate: what was trained is what is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ENGLISH, make_tiny_model, masters_of, run_here, run_script, tiny_flags, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from toolkit.checkpoint.delta import read_delta
from toolkit.exporting.run_export import export_delta, export_model
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import load_delta, open_model
from toolkit.runtime.errors import CheckpointError, DataError, ModelError
from toolkit.tasks.sample import ask

IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 run of two epochs on a model with a tied head, which was untied."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_tiny_model(folder / "base")
    flags = ("--model.dtype", "bfloat16", "--data.validation", "0.25", "--train.epochs", 2, "--output.keep", 2)
    assert train(*tiny_flags(model, folder / "run", *flags)) == 0
    return folder / "run"


def trained_logits(run: Path, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the base model with the masters of the last checkpoint laid in by hand."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.bfloat16)
    if dtype != torch.bfloat16:  # casting to the same precision would round the rotary buffers
        model.to(dtype)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    tensors = masters_of(run / "checkpoints" / "step-00000030")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        return model.eval()(IDS).logits


def test_the_export_gives_the_trained_models_logits_in_a_new_process(trained: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        result = run_here("launch/export.py", trained, "--output", tmp_path / dtype, "--dtype", dtype)
        assert (result.returncode, result.stdout) == (0, f"{tmp_path / dtype}\n"), result.stderr
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[2:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, dtype='auto').eval()\n"
        "    torch.save((model(torch.arange(3, 60)[None]).logits.detach(), str(model.dtype)), folder + '.pt')"
    )
    exports = (tmp_path / "bfloat16", tmp_path / "float32")
    loaded = run_script("launch/export.py", *exports, launcher=(sys.executable, "-c", code))
    assert loaded.returncode == 0, loaded.stderr
    for dtype in ("bfloat16", "float32"):
        logits, saved_as = torch.load(tmp_path / f"{dtype}.pt")
        assert saved_as == f"torch.{dtype}"
        assert torch.equal(logits, trained_logits(trained, getattr(torch, dtype)))


def test_the_export_holds_the_untied_head_tokenizer_template_and_card(trained: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    base = load_file(trained.parent / "base" / "model.safetensors")
    names = set(masters_of(trained / "checkpoints" / "step-00000030"))
    assert all(torch.equal(tensors[name], base[name].bfloat16()) for name in set(tensors) - names)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert "<|assistant|>" in tokenizer.chat_template
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "| blocks 2–5 | 36 | 37,120 | trained |" in card
    assert "The weights are those of step 30 (latest" in card
    assert "learning_rate: 0.001" in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_export_is_opened_in_the_precision_it_is_stored_in(trained: Path, tmp_path: Path, dtype: Any) -> None:
    export_model(trained, tmp_path / "export", dtype)
    opened = open_model(str(tmp_path / "export")).loaded.model
    run = open_model(str(trained), dtype=dtype).loaded.model
    tensors, own = load_file(tmp_path / "export" / "model.safetensors"), run.state_dict()
    assert opened.dtype == run.dtype == getattr(torch, dtype)
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in tensors.items())
    assert {buffer.dtype for model in (run, opened) for buffer in model.buffers()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(opened.eval()(IDS).logits, run.eval()(IDS).logits)


def test_a_config_of_nonsense_is_an_error_and_no_traceback(trained: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text('{"model_type": "llama", "text_config": "x"}')
    with pytest.raises(ModelError, match=r"cannot be loaded|cannot be read"):
        open_model(str(tmp_path / "export"))


def test_evaluate_rounds_masters_only_as_it_is_told(trained: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "export", "float32")

    def loss(source: Path, dtype: Any = None) -> float:
        return toolkit.evaluate(source, ENGLISH, dtype=dtype).loss

    assert loss(tmp_path / "export") == loss(trained, "float32") != loss(trained)
    assert loss(tmp_path / "export", "bfloat16") == loss(trained)
    for script, more in (("evaluate.py", ("--data.path", ENGLISH)), ("generate.py", ("--question", "a"))):
        result = run_here(f"launch/{script}", trained, "--dtype", "float16", *more)
        assert result.returncode == 0, result.stderr


def test_stochastic_rounding_keeps_on_average_what_the_nearest_bfloat16_loses(trained: Path, tmp_path: Path) -> None:
    for name, rounding in (("near", "nearest"), ("odds", "stochastic"), ("again", "stochastic")):
        result = run_here("launch/export.py", trained, "--output", tmp_path / name, "--rounding", rounding)
        assert result.returncode == 0, result.stderr
    near, odds, again = (load_file(tmp_path / name / "model.safetensors") for name in ("near", "odds", "again"))
    masters = masters_of(trained / "checkpoints" / "step-00000030")
    assert all(torch.equal(tensor, again[name]) for name, tensor in odds.items())
    assert all(torch.equal(tensor, near[name]) for name, tensor in odds.items() if name not in masters)
    lost = []
    for name, master in masters.items():
        below = (master.view(torch.int32) >> 16).to(torch.int16)  # the neighbour nearer to zero
        away = odds[name].view(torch.int16) - below
        assert set(away.unique().tolist()) <= {0, 1}
        assert not away[master == master.bfloat16()].any(), "a weight on the grid moved"
        lost.append(((odds[name] - master).mean().abs(), (odds[name] - master).abs().mean() / master.numel() ** 0.5))
    assert all(bias < 5 * noise for bias, noise in lost)
    assert any(not torch.equal(odds[name], near[name]) for name in masters)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--dtype", "float32"), "--rounding stochastic rounds to bfloat16, and this export is float32"),
        (("--delta",), "--rounding goes with a whole model; a delta or adapter holds the float32 masters"),
    ],
)
def test_stochastic_rounding_is_refused_where_it_would_do_nothing(
    trained: Path, tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    result = run_here("launch/export.py", trained, "--output", tmp_path / "x", "--rounding", "stochastic", *flags)
    assert (result.returncode, (tmp_path / "x").exists()) == (2, False)
    assert reason in result.stderr


@pytest.mark.parametrize("flags", [("--base", "moved"), ("--trust-remote-code",)])
def test_a_delta_refuses_flags_of_the_base_model_which_it_does_not_load(
    trained: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    result = run_here("launch/export.py", trained, "--delta", "--output", tmp_path / "x", *flags)
    assert (result.returncode, (tmp_path / "x").exists()) == (2, False)
    assert result.stderr == (
        "error: --base and --trust-remote-code go with a whole model; a delta is written without the base\n"
    )


def test_an_earlier_checkpoint_can_be_exported_and_a_missing_one_is_named(trained: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "early", step=15)
    export_model(trained, tmp_path / "late")
    early, late = (load_file(tmp_path / name / "model.safetensors") for name in ("early", "late"))
    assert not torch.equal(early["lm_head.weight"], late["lm_head.weight"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 16; present: step-00000015, step-00000030"):
        export_model(trained, tmp_path / "none", step=16)


def test_a_delta_loads_onto_the_base(trained: Path, tmp_path: Path) -> None:
    export_delta(trained, tmp_path / "delta")
    assert {path.name for path in (tmp_path / "delta").iterdir()} == {"trained.safetensors", "mask.json", "base.json"}
    with torch.no_grad():
        logits = load_delta(read_delta(tmp_path / "delta")).model.eval()(IDS).logits
    assert torch.equal(logits, trained_logits(trained, torch.bfloat16))


def test_a_delta_refuses_another_base(trained: Path, tmp_path: Path) -> None:
    export_delta(trained, tmp_path / "delta", "bfloat16")
    other = make_tiny_model(tmp_path / "other", tied=False)
    with pytest.raises(CheckpointError, match=r"trained on other weights than .*other holds now"):
        load_delta(read_delta(tmp_path / "delta"), base=str(other))


@pytest.mark.parametrize("damage", ["trained.safetensors", "mask.json", "base.json"])
def test_a_damaged_delta_is_refused(trained: Path, tmp_path: Path, damage: str) -> None:
    export_delta(trained, tmp_path / "delta")
    (tmp_path / "delta" / damage).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="not a readable delta"):
        read_delta(tmp_path / "delta")


def test_exporting_never_overwrites_and_needs_a_run(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_model(trained, tmp_path / "used")
    result = run_here("launch/export.py", tmp_path / "used")
    assert result.returncode == 2
    assert "is not a run directory" in result.stderr


def test_evaluation_repeats_the_last_validation_of_the_run(trained: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    result = run_here("launch/evaluate.py", trained)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["loss"] == pytest.approx(last, abs=1e-4)
    assert outcome["perplexity"] == pytest.approx(torch.tensor(outcome["loss"]).exp().item(), rel=1e-5)


def test_every_kind_of_source_evaluates_the_same(trained: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "export")
    export_delta(trained, tmp_path / "delta")
    losses = [
        toolkit.evaluate(source, ENGLISH, batch_size=batch).loss
        for source, batch in ((trained, 1), (tmp_path / "delta", 1), (tmp_path / "export", 1), (trained, 7))
    ]
    assert losses[0] == losses[1]
    # a plain model is loaded in the default precision, which is the run's
    assert losses[2] == losses[0]
    assert losses[3] == pytest.approx(losses[0], abs=2e-3)


def test_evaluating_without_held_out_rows_says_what_to_name(trained: Path) -> None:
    with pytest.raises(DataError, match=r"held no rows out; name some with --data\.path"):
        toolkit.evaluate(trained.parent / "base")


def test_held_out_rows_are_not_trusted_once_the_data_changed(tmp_path: Path) -> None:
    model, data = make_tiny_model(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows = ENGLISH.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(rows), encoding="utf-8")
    flags = ("--data.path", data, "--data.validation", "0.25", "--train.max_steps", "2")
    assert train(*tiny_flags(model, tmp_path / "run", *flags)) == 0
    data.write_text("\n".join(rows[1:]), encoding="utf-8")
    with pytest.raises(DataError, match="have changed since it was trained"):
        toolkit.evaluate(tmp_path / "run")


def test_answers_come_from_the_prompt_of_training_and_stop_at_the_turns_end(trained: Path) -> None:
    loaded = open_model(str(trained)).loaded
    sample = ask("Why?", ("Because.",))
    first, second = (Answerer(loaded, 512, 12).answer(sample) for _ in range(2))
    assert first == second
    head = loaded.model.lm_head.weight
    with torch.no_grad():
        head.zero_()
        loaded.model.model.norm.weight.zero_()
    assert Answerer(loaded, 512, 12).answer(sample) == "", "all logits equal: token 0, the end of a turn, comes first"


def test_a_long_prompt_loses_context_and_an_impossible_one_is_named(trained: Path) -> None:
    loaded = open_model(str(trained)).loaded
    assert Answerer(loaded, 64, 4).answer(ask("Why?", ("because " * 300,)))
    with pytest.raises(DataError, match="tokens without any context"):
        Answerer(loaded, 64, 4).answer(ask("why " * 200, ()))


def test_generate_answers_a_file_beside_its_references(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    flags = ("--input", ENGLISH, "--output", out, "--limit", 3, "--max-new-tokens", 4)
    result = run_here("launch/generate.py", trained, *flags)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    given = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()[:3]]
    assert [row["QUESTION"] for row in rows] == [row["QUESTION"] for row in given]
    assert [row["REFERENCE"] for row in rows] == [row["LONG_ANSWER"] for row in given]
    assert all(isinstance(row["ANSWER"], str) for row in rows)


def test_generate_answers_one_question(trained: Path) -> None:
    result = run_here("launch/generate.py", trained, "--question", "Why?", "--context", "a", "--max-new-tokens", 4)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 1

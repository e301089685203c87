"""Several runs over one base: it is loaded once, common tokens are computed once, and answers are the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tiny_model, run_here, train
from torch import nn
from zoo import make

from toolkit.commands.generate import generate
from toolkit.inference import shared_prefix
from toolkit.inference.answering import Answerer
from toolkit.inference.open_model import OpenedModel, open_model
from toolkit.inference.shared_base import open_together
from toolkit.inference.shared_prefix import SharedPrefix, common_length, continue_prefix
from toolkit.runtime.errors import UsageError
from toolkit.tasks.choose import load_task

NOTES = [
    {"NOTE": f"Day {day}: {text}", "A": "mild", "B": "home", "C": "none"}
    for day, text in enumerate(
        ["headache since noon, eats well, no fever at all today", "slept badly; a rash on both arms, itching by night",
         "fell in the bath, no pain, walks as before", "nothing new to report, takes the tablets"], start=1,
    )
]  # fmt: skip
SUFFIXES = {
    "grade": ("A", "How bad is it?", ["last:2"]),
    "coding": ("B", "Where to?", [{"lora": {"select": ["blocks:4", "blocks:5"], "rank": 2}}]),
    "document": ("C", "Write what is to be done now.", ["blocks:3", "head"]),
}
"""Three tasks on a model of 6 blocks, with frost lines at 4, 4 and 3: whole blocks, adapters, a block and the head."""


def task_of(name: str) -> dict[str, Any]:
    column, instruction, _ = SUFFIXES[name]
    return {
        "name": name, "columns": {"note": "NOTE", "grade": column}, "prompt": "{{ note }}\n\n" + instruction,
        "target": "{{ grade }}",
    }  # fmt: skip


def train_suffixes(model: Path, folder: Path, tied: str) -> list[Path]:
    rows = folder / "notes.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in NOTES), encoding="utf-8")
    runs = []
    for name, (_, _, mask) in SUFFIXES.items():
        flags = {"model.name_or_path": model, "model.dtype": "float32", "data.path": rows, "output.dir": folder / name,
                 "data.validation": "none", "data.task": json.dumps(task_of(name)), "mask.tied": tied,
                 "train.learning_rate": 0.03, "train.max_steps": 4, "output.report": "[]", "output.sample_answers": 0,
                 "prefix.cache": "off"}  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        mask_words = [one if isinstance(one, str) else json.dumps(one) for one in mask]
        assert train(*words, "--mask.train", *mask_words) == 0
        runs.append(folder / name)
    return runs


@pytest.fixture(scope="module")
def tied_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tied")
    return train_suffixes(make_tiny_model(folder / "model"), folder, "untie")


@pytest.fixture
def block_tokens(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Tokens that pass each block of a Llama, by its number."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    seen = Counter[int]()
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[self.self_attn.layer_idx] += hidden_states.shape[0] * hidden_states.shape[1]
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return seen


def together(runs: list[Path]) -> list[OpenedModel]:
    return open_together(list(map(str, runs)), torch.device("cpu"), [None] * len(runs))


def test_common_tokens_pass_the_frozen_blocks_once_a_note(tied_runs: list[Path], block_tokens: Counter[int]) -> None:
    opened = together(tied_runs)
    answerers = {run.name: Answerer(one.loaded, 300, 3) for run, one in zip(tied_runs, opened, strict=True)}
    samples = [
        {name: load_task(task_of(name)).read(note, with_answer=False) for name in SUFFIXES} for note in NOTES
    ]  # fmt: skip
    shared = SharedPrefix(answerers, 3)
    shared.answer(samples[0], 0)  # the first note is also asked in the plain way, to compare
    for row, of_note in enumerate(samples[1:], start=1):
        prompts = [answerers[name].prompt(of_note[name], row).ids for name in SUFFIXES]
        common = common_length(prompts)
        assert common > 20
        block_tokens.clear()
        before = shared.shared_tokens
        answers = shared.answer(of_note, row)
        assert shared.shared_tokens - before == common
        generated = [
            len(answerers[name].loaded.tokenizer.encode(answers[name], add_special_tokens=False)) for name in SUFFIXES
        ]  # fmt: skip
        rest = sum(len(prompt) - common for prompt in prompts)
        for block in range(6):
            passes = common if block < 3 else 3 * common
            assert passes + rest <= block_tokens[block] <= passes + rest + 3 * 2, (block, generated)
        assert block_tokens[5] - block_tokens[0] == 2 * common


def test_a_model_that_does_not_go_on_alike_reads_each_note_by_itself(
    tied_runs: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = together(tied_runs)
    answerers = {run.name: Answerer(one.loaded, 300, 3) for run, one in zip(tied_runs, opened, strict=True)}
    samples = {name: load_task(task_of(name)).read(NOTES[0], with_answer=False) for name in SUFFIXES}
    good = SharedPrefix(answerers, 3).answer(samples, 0)

    def other(*given: Any) -> Any:
        cache = continue_prefix(*given)
        cache.layers[5].values = cache.layers[5].values + 1.0
        return cache

    monkeypatch.setattr(shared_prefix, "continue_prefix", other)
    shared = SharedPrefix(answerers, 3)
    with caplog.at_level("INFO", "frostline"):
        assert [shared.answer(samples, row) for row in range(2)] == [good, good]
    assert shared.shared_tokens == 0
    assert caplog.text.count("does not give the same after a shared prefix") == 1


def storages(models: list[nn.Module]) -> dict[int, int]:
    """Bytes of each distinct storage that the tensors of some models lie in."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_three_suffixes_take_the_memory_of_one_prefix_and_theirs(tied_runs: list[Path]) -> None:
    opened = together(tied_runs)
    taken = sum(storages([one.loaded.model for one in opened]).values())
    base = open_model(str(tied_runs[0].parent / "model")).loaded.model
    whole = sum(storages([base]).values())
    above = [
        sum(p.nbytes for name, p in one.loaded.model.named_parameters() if one.delta and name_is_above(name, one.delta))
        for one in opened
    ]
    below = sum(p.nbytes for name, p in base.named_parameters() if not is_above(name, 3))
    assert taken <= 1.05 * (below + sum(above))
    own = sum(tensor.nbytes for one in opened if one.delta for tensor in one.delta.tensors.values())
    assert taken <= whole + own + 64, "what none trained is there once"


def is_above(name: str, boundary: int) -> bool:
    part = name.split(".layers.")
    return int(part[1].split(".")[0]) >= boundary if len(part) == 2 else "embed" not in name


def name_is_above(name: str, delta: Any) -> bool:
    return is_above(name, delta.mask.boundary)


def test_answers_in_a_file_are_those_of_each_run_alone(tied_runs: list[Path], tmp_path: Path) -> None:
    notes, out = tmp_path / "notes.jsonl", tmp_path / "answers.jsonl"
    rows = [{key: value for key, value in note.items() if key != "B"} for note in NOTES]
    notes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [*map(str, tied_runs), "--input", str(notes), "--max-new-tokens", "6", "--output", str(out)]
    assert (done := run_here("generate.py", *words, "--limit", 2)).returncode == 0, done.stderr
    assert "is loaded once for 3 runs" in done.stderr
    given = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    alone = {run.name: generate(run, NOTES[:2], max_new_tokens=6) for run in tied_runs}
    assert [{name: row[f"ANSWER_{name}"] for name in alone} for row in given] == [
        {name: answers[row] for name, answers in alone.items()} for row in range(2)
    ]
    assert given[0]["NOTE"] == NOTES[0]["NOTE"]
    assert (given[0]["REFERENCE_grade"], "REFERENCE_coding" in given[0]) == ("mild", False)
    assert "--overwrite replaces it" in run_here("generate.py", *words).stderr
    assert len({tuple(answers) for answers in alone.values()}) == 3, "the tasks do answer differently"


def test_an_interrupted_file_goes_on(tied_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, out = tmp_path / "notes.jsonl", tmp_path / "answers.jsonl"
    notes.write_text("".join(json.dumps(row) + "\n" for row in NOTES), encoding="utf-8")
    words = [*map(str, tied_runs), "--input", str(notes), "--max-new-tokens", "2", "--output", str(out)]
    answer, rows = SharedPrefix.answer, list[int]()

    def interrupted(self: SharedPrefix, samples: Any, row: int) -> Any:
        rows.append(row)
        if len(rows) == 3:
            raise KeyboardInterrupt
        return answer(self, samples, row)

    monkeypatch.setattr(SharedPrefix, "answer", interrupted)
    assert run_here("generate.py", *words).returncode != 0
    assert not out.exists()
    assert run_here("generate.py", *words[1:]).returncode == 2, "other sources do not go on with it"
    assert run_here("generate.py", *words).returncode == 0
    assert rows == [0, 1, 2, 2, 3]
    assert len(out.read_text(encoding="utf-8").splitlines()) == 4


def tiny(kind: str, folder: Path) -> Path:
    """A model of 6 blocks with random weights; Gemma's windows are shorter than the notes."""
    from helpers import make_tokenizer

    sizes = {"vocab_size": 512, "num_hidden_layers": 6}
    more = {
        "gpt2": {"n_layer": 6, "n_positions": 512, "vocab_size": 512},
        "gemma3_text": {**sizes, "max_position_embeddings": 512, "sliding_window": 8},
    }[kind]
    make(kind, **more).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "untied llama"])
def test_positions_windows_and_heads_of_other_models_are_kept(kind: str, tmp_path: Path) -> None:
    untied = kind == "untied llama"
    model = make_tiny_model(tmp_path / "model", tied=False) if untied else tiny(kind, tmp_path / "model")
    runs = train_suffixes(model, tmp_path, "error" if untied else "untie")
    opened = together(runs)
    answerers = {run.name: Answerer(one.loaded, 300, 8) for run, one in zip(runs, opened, strict=True)}
    shared = SharedPrefix(answerers, 3)
    for row, note in enumerate(NOTES):
        samples = {name: load_task(task_of(name)).read(note, with_answer=False) for name in SUFFIXES}
        found = shared.answer(samples, row)
        for run in runs:
            assert found[run.name] == Answerer(open_model(str(run)).loaded, 300, 8).answer(samples[run.name], row)
    assert shared.shared_tokens > 20 * len(NOTES)


def test_other_bases_are_refused(tied_runs: list[Path], tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "model", tied=False)
    with pytest.raises(UsageError, match="is no run, checkpoint or delta; several sources answer together"):
        open_together([str(tied_runs[0]), str(other)], torch.device("cpu"), [None, None])
    rows = tied_runs[0].parent / "notes.jsonl"
    flags = ["--model.name_or_path", other, "--data.path", rows, "--data.task", json.dumps(task_of("grade")),
             "--data.validation", "none", "--mask.train", "last:1", "--output.dir", tmp_path / "run", "--output.report",
             "[]", "--output.sample_answers", 0, "--train.max_steps", 1]  # fmt: skip
    assert train(*map(str, flags)) == 0
    with pytest.raises(UsageError, match=r"different base models: its weights are others .*model\.dtype is bfloat16"):
        open_together([str(tied_runs[0]), str(tmp_path / "run")], torch.device("cpu"), [None, None])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question", "why?"], "several sources answer the rows of --input"),
        (["--input", "x.jsonl", "--dtype", "float32"], "--dtype goes with one source"),
        (["--input", "x.jsonl", "--batch-size", "2"], "--batch-size goes with one source"),
        (["--input", "x.jsonl", "--ds", "ds_configs/zero3.json"], "--ds divides one model among ranks"),
    ],
)
def test_flags_of_one_source_are_refused(flags: list[str], message: str) -> None:
    assert message in run_here("generate.py", "a", "b", *flags).stderr


def test_names_that_are_the_same_are_refused(tmp_path: Path) -> None:
    done = run_here("generate.py", "x/grade", "y/grade", "--input", "x.jsonl")
    assert "two sources are named grade, and so would their answers be (ANSWER_grade)" in done.stderr


def test_common_tokens_leave_each_prompt_one_of_its_own() -> None:
    assert common_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_length([[1, 2], [1, 2, 4]]) == 1
    assert common_length([[1], [1, 2]]) == 0

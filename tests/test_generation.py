"""Questions that are answered together, by several ranks, drawn, interrupted: each has the answer it has alone."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer, run_here, run_script, tiny_flags, train
from transformers import GenerationMixin
from zoo import CUT, OTHER, UNCUT, make

import toolkit
from toolkit.config.schema import ModelConfig
from toolkit.inference import answering
from toolkit.inference.answering import Answerer
from toolkit.inference.sampling import Sampling
from toolkit.models.load import LoadedModel, load
from toolkit.runtime.errors import DataError, OutOfMemoryError, UsageError
from toolkit.runtime.file_lock import FileLock
from toolkit.runtime.printable import printable
from toolkit.tasks.sample import ask

QUESTIONS = (
    "why?", "what is asthma and how does it begin?", "who is it", "how do children breathe at night?", "no", "when?",
    "which of them?",
)  # fmt: skip
SAMPLES = [(row, ask(question)) for row, question in enumerate(QUESTIONS)]

READS_PADDING = {
    "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2", "cpmant",
}  # fmt: skip
"""Types with a state that every token changes, and one with a prompt of its own before the others."""


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were answered together, each time."""
    taken: list[int] = []
    complete = answering.complete_together

    def counted(model: Any, tokenizer: Any, prompts: Any, *more: Any, **options: Any) -> list[str]:
        taken.append(len(prompts))
        return complete(model, tokenizer, prompts, *more, **options)

    monkeypatch.setattr(answering, "complete_together", counted)
    return taken


@pytest.mark.parametrize("name", [*CUT, *UNCUT, *OTHER])
def test_each_type_answers_together_what_it_answers_one_by_one_or_is_asked_one_by_one(
    name: str, sizes: list[int]
) -> None:
    config = {**CUT, **UNCUT, **OTHER}[name].config
    sized = {"vocab_size_per_layer_input": 512} if "vocab_size_per_layer_input" in config else {}
    positions = {"n_positions" if "n_positions" in config else "max_position_embeddings": 256}
    model = make(name, vocab_size=512, **positions, **sized).eval()
    loaded = LoadedModel(model, make_tokenizer(), None, None)  # type: ignore[arg-type]
    alone = dict(Answerer(loaded, 200, 4, 1).in_order(SAMPLES[:3]))
    assert sizes == [1] * 3
    assert dict(Answerer(loaded, 200, 4, 3).in_order(SAMPLES[:3])) == alone
    assert sizes[3:] == ([1] * 3 if name in READS_PADDING else [3])


def test_prompts_are_answered_longest_first_and_given_in_order(loaded: LoadedModel, sizes: list[int]) -> None:
    answerer = Answerer(loaded, 200, 4, 2)
    lengths = {row: len(answerer._encoder.prompt_ids(sample)) for row, sample in SAMPLES}
    rows = [list(batch) for batch in answerer.batches(SAMPLES)]
    assert [row for batch in rows for row in batch] == sorted(lengths, key=lambda row: (-lengths[row], row))
    assert [row for row, _ in answerer.in_order(SAMPLES)] == list(range(7))
    assert sizes == [2, 2, 2, 1] * 2


def test_a_few_questions_are_read_ahead(loaded: LoadedModel) -> None:
    read = []

    def questions() -> Any:
        for number in range(100):
            read.append(number)
            yield number, ask(f"why {number}?")

    next(Answerer(loaded, 200, 2, 2).in_order(questions()))
    assert len(read) == 16
    read.clear()
    next(Answerer(loaded, 200, 2, 1).in_order(questions()))
    assert len(read) == 1, "one by one, each is answered before the next is read"


def test_a_prompt_that_the_positions_leave_less_room_is_answered_alone(loaded: LoadedModel, sizes: list[int]) -> None:
    long = (7, ask("why " * 230))
    short = dict(Answerer(loaded, 600, 64, 4).in_order(SAMPLES))
    assert sizes == [4, 3]
    found = dict(Answerer(loaded, 600, 64, 4).in_order([*SAMPLES, long]))
    assert sizes[2:] == [1, 4, 3]
    assert {row: found[row] for row in short} == short
    assert found[7]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}])
def test_draws_depend_on_seed_and_row_alone(loaded: LoadedModel, options: dict[str, float]) -> None:
    def drawn(size: int, seed: int, samples: Any = SAMPLES) -> dict[int, str | None]:
        sampling = Sampling(temperature=1.0, seed=seed, **options)
        return dict(Answerer(loaded, 200, 8, size, sampling).in_order(samples))

    first = drawn(1, 5)
    assert first == drawn(3, 5) == drawn(8, 5)
    assert {3: first[3]} == drawn(1, 5, SAMPLES[3:4]), "as after an interruption"
    other = drawn(3, 6)
    assert sum(other[row] != first[row] for row in first) >= 6
    twins = drawn(4, 5, [(row, ask("why?")) for row in range(4)])
    assert len(set(twins.values())) == 4, "rows that ask the same are drawn by themselves"


def test_draws_follow_temperature_and_top_p() -> None:
    """5,000 draws from five tokens; 0.03 is four standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    for sampling in (Sampling(1.0), Sampling(0.5), Sampling(2.0, 0.7)):
        expected = torch.softmax(logits / sampling.temperature, 0)
        if sampling.top_p < 1:
            kept = expected.cumsum(0) - expected < sampling.top_p
            expected = expected * kept / (expected * kept).sum()
        scores = logits.repeat(5000, 1)
        for processor in sampling.processors(range(5000)):
            scores = processor(None, scores)
        found = scores.argmax(1).bincount(minlength=5) / 5000
        assert torch.allclose(found, expected, atol=0.03), sampling
        assert all(share == 0 for share, wanted in zip(found, expected, strict=True) if wanted == 0)


def test_a_model_that_counts_the_tokens_before_is_asked_one_by_one(
    loaded: LoadedModel, sizes: list[int], said: list[str]
) -> None:
    loaded.model.generation_config.repetition_penalty = 1.5
    alone = dict(Answerer(loaded, 200, 8, 1).in_order(SAMPLES))
    assert dict(Answerer(loaded, 200, 8, 4).in_order(SAMPLES)) == alone
    assert sizes == [1] * 14
    assert any("generation_config.json, reads padding too: questions are answered one by one" in line for line in said)


def test_beams_of_the_model_do_not_count(loaded: LoadedModel) -> None:
    greedy = dict(Answerer(loaded, 200, 8, 4).in_order(SAMPLES))
    drawn = dict(Answerer(loaded, 200, 8, 4, Sampling(1.0)).in_order(SAMPLES))
    loaded.model.generation_config.num_beams = 3
    assert dict(Answerer(loaded, 200, 8, 4).in_order(SAMPLES)) == greedy
    assert dict(Answerer(loaded, 200, 8, 4, Sampling(1.0)).in_order(SAMPLES)) == drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number from 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number from 1"),
        ({"temperature": -1}, "temperature is -1; expected a number from 0"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0; expected a number above 0 and up to 1"),
        ({"temperature": 1, "seed": -1}, "seed is -1; expected a whole number from 0"),
    ],
)
def test_values_out_of_range_are_named(tiny_model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        toolkit.generate(tiny_model, "why?", **options)


def test_a_whole_temperature_is_one(tiny_model: Path) -> None:
    answers = toolkit.generate(tiny_model, "why?", max_new_tokens=4, temperature=1)
    assert answers == toolkit.generate(tiny_model, "why?", max_new_tokens=4, temperature=1.0)


def test_no_generation_setting_of_the_model_narrows_what_is_drawn(loaded: LoadedModel) -> None:
    """transformers draws from the 50 likeliest tokens unless told otherwise."""
    before = Answerer(loaded, 200, 8, 3, Sampling(1.5)).in_order(SAMPLES)
    found = dict(before)
    loaded.model.generation_config.top_k, loaded.model.generation_config.temperature = 1, 0.01
    assert dict(Answerer(loaded, 200, 8, 3, Sampling(1.5)).in_order(SAMPLES)) == found


def test_a_failed_allocation_names_the_batch_and_a_smaller_one(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")

    answerer = Answerer(loaded, 200, 4, 4)
    monkeypatch.setattr(answerer, "_pads", True)
    monkeypatch.setattr(loaded.model, "generate", full)
    with pytest.raises(OutOfMemoryError, match=r"generation, on a micro batch of 4 x \d+ tokens .*: --batch-size 2$"):
        next(answerer.batches(SAMPLES))


def test_a_question_that_is_too_long_is_an_error_or_skipped(loaded: LoadedModel, said: list[str]) -> None:
    samples = [*SAMPLES[:2], (2, ask("why " * 200)), SAMPLES[3]]
    with pytest.raises(DataError, match=r"question 3, 'why why .*', needs \d+ tokens without any context"):
        list(Answerer(loaded, 100, 4, 2).in_order(samples))
    answered = list(Answerer(loaded, 100, 4, 2, skips_bad_rows=True).in_order(samples))
    assert [(row, answer is None) for row, answer in answered] == [(0, False), (1, False), (2, True), (3, False)]
    assert sum(line.startswith("skipped: question 3, 'why why") for line in said) == 1


def test_questions_of_which_none_can_be_answered_are_all_skipped(loaded: LoadedModel) -> None:
    samples = [(row, ask("why " * 200)) for row in range(40)]
    assert dict(Answerer(loaded, 100, 4, 4, skips_bad_rows=True).in_order(samples)) == dict.fromkeys(range(40))


def test_the_api_answers_together_too(tiny_model: Path, sizes: list[int]) -> None:
    answers = toolkit.generate(tiny_model, list(QUESTIONS), max_new_tokens=4, batch_size=4)
    assert sizes == [4, 3]
    assert toolkit.generate(tiny_model, list(QUESTIONS), max_new_tokens=4, batch_size=1) == answers
    drawn = toolkit.generate(tiny_model, QUESTIONS[:2], max_new_tokens=8, temperature=1.0, top_p=0.9, seed=1)
    assert drawn == toolkit.generate(tiny_model, QUESTIONS[:2], max_new_tokens=8, temperature=1.0, top_p=0.9, seed=1)
    assert drawn != toolkit.generate(tiny_model, QUESTIONS[:2], max_new_tokens=8, temperature=1.0, top_p=0.9, seed=2)


# the file


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = ({"id": f"p{n}", "QUESTION": question, "CONTEXTS": ["c"]} for n, question in enumerate(QUESTIONS))
    return write(tmp_path / "questions.jsonl", *rows)


def flags(model: Path, questions: Path, *more: object) -> tuple[object, ...]:
    output = questions.with_name("answers.jsonl")
    return model, "--input", questions, "--output", output, "--max-new-tokens", 4, "--batch-size", 2, *more


def test_lines_keep_the_columns_of_their_rows(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 7, "question": "why?", "context": {"contexts": ["a", "b"]}, "long_answer": "so", "when": None},
        {"id": 8, "question": "how?", "context": {"contexts": []}, "long_answer": "thus", "CONTEXTS": "my own"},
    ]
    done = run_here("generate.py", *flags(tiny_model, write(tmp_path / "rows.jsonl", *rows)))
    assert done.returncode == 0, done.stderr
    first, second = lines(tmp_path / "answers.jsonl")
    assert {key: first[key] for key in rows[0]} == rows[0]
    assert (first["QUESTION"], first["CONTEXTS"], first["REFERENCE"]) == ("why?", ["a", "b"], "so")
    assert {key: second[key] for key in rows[1]} == rows[1], "no column of the user's is replaced"
    assert first["ANSWER"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "answers.jsonl", tmp_path / "rows.jsonl"]


def test_a_column_that_the_answers_would_take_is_an_error_before_a_model_loads(
    tiny_model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "ANSWER": "mine"} for row in lines(questions)]
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.commands.answers.open_model", None)
        done = run_here("generate.py", *flags(tiny_model, write(questions, *rows)))
    assert done.returncode == 2
    assert "line 1 has a column ANSWER, where its answer would go; name another with --answer-column" in done.stderr
    done = run_here("generate.py", *flags(tiny_model, questions, "--answer-column", "MODEL"))
    assert done.returncode == 0, done.stderr
    assert all(line["ANSWER"] == "mine" and line["MODEL"] for line in lines(questions.with_name("answers.jsonl")))
    done = run_here("generate.py", tiny_model, "--input", questions, "--max-new-tokens", 1)
    assert done.returncode == 0, "what is printed takes no column's place"


def test_a_file_is_replaced_only_when_asked(tiny_model: Path, questions: Path) -> None:
    output = questions.with_name("answers.jsonl")
    output.write_text("mine\n")
    output.chmod(0o600)
    done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, output.read_text()) == (2, "mine\n")
    assert "answers.jsonl exists; --overwrite replaces it, another --output leaves it" in done.stderr
    assert sorted(questions.parent.iterdir()) == [output, questions]
    assert run_here("generate.py", *flags(tiny_model, questions, "--overwrite")).returncode == 0
    assert [line["id"] for line in lines(output)] == [f"p{n}" for n in range(7)]
    assert output.stat().st_mode & 0o777 == 0o600, "who may not read the former file may not read this one"


def test_answers_may_take_the_place_of_their_questions_and_a_link_stays_one(tiny_model: Path, questions: Path) -> None:
    link = questions.with_name("link.jsonl")
    link.symlink_to(questions)
    given = (tiny_model, "--input", questions, "--output", link, "--max-new-tokens", 2, "--overwrite")
    done = run_here("generate.py", *given)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert [(line["id"], bool(line["ANSWER"])) for line in lines(questions)] == [(f"p{n}", True) for n in range(7)]


@pytest.fixture
def interrupted(tiny_model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A begun file of two batches of two."""
    with monkeypatch.context() as patch:
        complete, left = answering.complete_together, [0, 1]

        def dies(*given: Any, **options: Any) -> list[str]:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return complete(*given, **options)

        patch.setattr(answering, "complete_together", dies)
        assert run_here("generate.py", *flags(tiny_model, questions)).returncode == 130
    return questions.with_name("answers.jsonl.part")


def test_the_same_command_goes_on_after_an_interruption(
    tiny_model: Path, questions: Path, interrupted: Path, sizes: list[int]
) -> None:
    assert not questions.with_name("answers.jsonl").exists()
    with interrupted.open("a") as file:
        file.write('{"row": 5, "columns": {"QUES')  # killed while it wrote
    assert run_here("generate.py", *flags(tiny_model, questions)).returncode == 0
    assert sizes == [2, 1]
    found = lines(questions.with_name("answers.jsonl"))
    assert not interrupted.exists()
    assert run_here("generate.py", *flags(tiny_model, questions, "--overwrite")).returncode == 0
    assert lines(questions.with_name("answers.jsonl")) == found
    assert sizes == [2, 1, 2, 2, 2, 1]


def test_begun_answers_of_another_command_are_an_error_and_kept(
    tiny_model: Path, questions: Path, interrupted: Path, sizes: list[int]
) -> None:
    before = interrupted.read_bytes()
    done = run_here("generate.py", *flags(tiny_model, questions, "--temperature", 1, "--seed", 3))
    assert (done.returncode, interrupted.read_bytes()) == (2, before)
    assert "which had seed 42 (now 3), temperature 0.0 (now 1.0); go on with the former" in done.stderr
    assert run_here("generate.py", *flags(tiny_model, questions, "--seed", 3, "--overwrite")).returncode == 0
    assert sizes == [2, 2, 2, 1], "begun anew"


def rename(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["id"] = f"new {row['id']}"


def test_it_may_go_on_with_a_limit_batches_and_rules_of_another_size(
    tiny_model: Path, questions: Path, interrupted: Path, sizes: list[int]
) -> None:
    more = ("--limit", 7, "--on-bad-row", "skip", "--batch-size", 1)
    done = run_here("generate.py", *flags(tiny_model, questions, *more))
    assert done.returncode == 0, done.stderr
    assert sizes == [1, 1, 1]
    assert len(lines(questions.with_name("answers.jsonl"))) == 7


@pytest.mark.parametrize("change", [rename, lambda rows: rows[1].update(QUESTION=""), lambda rows: rows.__delitem__(3)])
def test_rows_that_changed_since_they_were_answered_are_an_error_before_a_model_loads(
    tiny_model: Path, questions: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    before, rows = interrupted.read_bytes(), lines(questions)
    change(rows)
    monkeypatch.setattr("toolkit.commands.answers.open_model", None)
    done = run_here("generate.py", *flags(tiny_model, write(questions, *rows), "--on-bad-row", "skip"))
    assert (done.returncode, interrupted.read_bytes()) == (2, before)
    assert "is not the one that was answered before an interruption; put the rows back, remove" in done.stderr


def test_a_skipped_row_that_can_be_answered_now_is_an_error_too(
    tiny_model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lines(questions)
    rows[4]["QUESTION"] = "why " * 3000
    with monkeypatch.context() as patch:
        patch.setattr(answering, "complete_together", lambda *_, **__: [][0])
        result = run_here("generate.py", *flags(tiny_model, write(questions, *rows), "--on-bad-row", "skip"))
    assert result.returncode == 1
    assert len(questions.with_name("answers.jsonl.part").read_text().splitlines()) == 2, "the settings, the skipped row"
    rows[4]["QUESTION"] = "why?"
    result = run_here("generate.py", *flags(tiny_model, write(questions, *rows)))
    assert (result.returncode, "row 5 is not the one that was answered" in result.stderr) == (2, True)


def test_another_model_at_the_same_place_is_another_setting(
    tiny_model: Path, questions: Path, interrupted: Path
) -> None:
    file = tiny_model / "model.safetensors"
    before = file.stat()
    os.utime(file, (before.st_atime, before.st_mtime + 5))
    try:
        done = run_here("generate.py", *flags(tiny_model, questions))
    finally:
        os.utime(file, (before.st_atime, before.st_mtime))
    assert (done.returncode, "interrupted, which had source [" in done.stderr) == (2, True)


@pytest.mark.parametrize("content", ["mine\n", "mine", '{"a": 1}\n', "[1]\n"])
def test_a_part_of_something_else_is_never_touched(tiny_model: Path, questions: Path, content: str) -> None:
    part = questions.with_name("answers.jsonl.part")
    part.write_text(content)
    for more in ((), ("--overwrite",)):
        done = run_here("generate.py", *flags(tiny_model, questions, *more))
        assert (done.returncode, part.read_text()) == (2, content)
        assert "answers.jsonl.part is in the way and holds no answers; move it" in done.stderr


def test_begun_answers_stay_until_there_is_one_in_their_place(
    tiny_model: Path, questions: Path, interrupted: Path
) -> None:
    before = interrupted.read_bytes()
    more = ("--seed", 3, "--overwrite", "--base", "nowhere")
    assert run_here("generate.py", *flags(tiny_model, questions, *more)).returncode == 2
    assert interrupted.read_bytes() == before


def test_a_damaged_line_is_an_error(tiny_model: Path, questions: Path, interrupted: Path) -> None:
    content = interrupted.read_text().splitlines(keepends=True)
    interrupted.write_text("".join([content[0], "5\n", *content[1:]]))
    done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, "answers.jsonl.part line 2 is damaged" in done.stderr) == (2, True)


def test_a_disk_that_is_full_loses_no_answer_before(
    tiny_model: Path, questions: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, before = os.pwrite, interrupted.read_bytes()

    def half(descriptor: int, data: bytes, place: int) -> int:
        if len(data) > 20:
            return write_all(descriptor, data[:20], place)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, "No space left" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
    assert interrupted.read_bytes().startswith(before)
    assert run_here("generate.py", *flags(tiny_model, questions)).returncode == 0
    assert [line["id"] for line in lines(questions.with_name("answers.jsonl"))] == [f"p{n}" for n in range(7)]


def test_a_file_system_without_locks_is_said(
    tiny_model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("toolkit.runtime.file_lock.fcntl.flock", none)
    done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, "this file system has no locks" in done.stderr) == (0, True)


def test_two_commands_do_not_write_one_file(tiny_model: Path, questions: Path, interrupted: Path) -> None:
    before = interrupted.read_bytes()
    lock = FileLock(interrupted)
    assert lock.acquire()
    done = run_here("generate.py", *flags(tiny_model, questions))
    lock.release()
    assert (done.returncode, interrupted.read_bytes()) == (2, before)
    assert "another process is writing" in done.stderr


def test_a_disk_that_is_full_at_the_end_loses_no_answer(
    tiny_model: Path, questions: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, "No space left" in done.stderr) == (1, True)
    asked = len(sizes)
    assert run_here("generate.py", *flags(tiny_model, questions)).returncode == 0
    assert len(sizes) == asked, "nothing is answered again"
    assert len(lines(questions.with_name("answers.jsonl"))) == 7


@pytest.mark.parametrize("more", [("--limit", 2), ("--on-bad-row", "skip")])
def test_answers_do_not_take_the_place_of_rows_that_have_none(
    tiny_model: Path, questions: Path, more: tuple[object, ...]
) -> None:
    before = questions.read_bytes()
    done = run_here("generate.py", tiny_model, "--input", questions, "--output", questions, "--overwrite", *more)
    assert (done.returncode, questions.read_bytes()) == (2, before)
    assert "only the whole of one .jsonl file can be replaced by its answers" in done.stderr
    table = questions.with_name("rows.csv")
    table.write_text("QUESTION,CONTEXTS\nwhy?,c\n")
    done = run_here("generate.py", tiny_model, "--input", table, "--output", table, "--overwrite")
    assert (done.returncode, table.read_text()) == (2, "QUESTION,CONTEXTS\nwhy?,c\n")


def test_a_masked_question_is_nowhere_in_the_clear(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(
        tmp_path / "rows.jsonl", *({"QUESTION": f"why {n}?", "CONTEXTS": [], "LONG_ANSWER": "a"} for n in range(4))
    )
    masks = ("--data.path", rows, "--data.on_identifier", "mask", "--train.max_steps", 1)
    assert train(*tiny_flags(tiny_model, tmp_path / "run", *masks)) == 0
    output = tmp_path / "answers.jsonl"
    given = ("generate.py", tmp_path / "run", "--output", output, "--max-new-tokens", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: [][0])
        run_here(*given, "--question", "call 010-1234-5678 why?")
    part = output.with_name("answers.jsonl.part")
    assert "why?" in part.read_text()
    assert "1234" not in part.read_text()
    part.unlink()
    write(rows, {"QUESTION": "why?", "CONTEXTS": [], "note": "010-1234-5678"})
    assert run_here(*given, "--input", rows).returncode == 0
    assert "1234" not in output.read_text()


def test_bad_rows_are_skipped_when_asked(tiny_model: Path, questions: Path) -> None:
    rows = lines(questions)
    rows[1]["QUESTION"], rows[4]["QUESTION"] = "", "why " * 3000
    questions = write(questions, *rows)
    done = run_here("generate.py", *flags(tiny_model, questions))
    assert (done.returncode, "1 rows cannot be answered:" in done.stderr) == (2, True)
    rows[1]["QUESTION"] = "why?"
    done = run_here("generate.py", *flags(tiny_model, write(questions, *rows), "--batch-size", 1))
    assert done.returncode == 2
    assert "question 5, 'why why" in done.stderr
    assert done.stderr.rstrip().endswith("; --on-bad-row skip leaves such questions out")
    rows[1]["QUESTION"] = ""
    questions.with_name("answers.jsonl.part").unlink()
    write(questions, *rows)
    done = run_here("generate.py", *flags(tiny_model, questions, "--on-bad-row", "skip"))
    assert done.returncode == 0, done.stderr
    assert "1 rows cannot be answered and are skipped:\n" in done.stderr
    assert "skipped: question 5, 'why why" in done.stderr
    assert [line["id"] for line in lines(questions.with_name("answers.jsonl"))] == ["p0", "p2", "p3", "p5", "p6"]


def test_half_a_surrogate_pair_in_another_column_is_kept(tiny_model: Path, questions: Path) -> None:
    rows = [{"QUESTION": "왜?", "CONTEXTS": [], "note": "\ud83d"}, {"QUESTION": "왜?", "CONTEXTS": []}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_here("generate.py", *flags(tiny_model, questions))
    if done.returncode:  # the reader says which row
        assert "line 1" in done.stderr
        done = run_here("generate.py", *flags(tiny_model, questions, "--on-bad-row", "skip"))
    assert done.returncode == 0, done.stderr
    assert '"QUESTION": "왜?"' in questions.with_name("answers.jsonl").read_text()


# the conversation


def talk(monkeypatch: pytest.MonkeyPatch, model: Path, *messages: str, flags: tuple[object, ...] = ()) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
    return run_here("generate.py", model, "--max-new-tokens", 4, *flags)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were given to the model, as text."""
    given: list[str] = []
    tokenizer, generate = make_tokenizer(), GenerationMixin.generate

    def seen(self: Any, *args: Any, **options: Any) -> Any:
        given.append(tokenizer.decode(options["input_ids"][0]))
        return generate(self, *args, **options)

    monkeypatch.setattr(GenerationMixin, "generate", seen)
    return given


def test_a_message_sees_the_conversation_before_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    done = talk(monkeypatch, tiny_model, "why?", "", "how?", "/new", "who?", "/quit", "never")
    assert done.returncode == 0, done.stderr
    first, _, _ = done.stdout.splitlines()
    assert [printable(prompt) for prompt in prompts] == [  # as answers are printed
        "<|user|>\nwhy?<|end|>\n<|assistant|>\n",
        f"<|user|>\nwhy?<|end|>\n<|assistant|>\n{first}<|end|>\n<|user|>\nhow?<|end|>\n<|assistant|>\n",
        "<|user|>\nwho?<|end|>\n<|assistant|>\n",
    ]


def test_a_long_conversation_forgets_its_beginning(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    """The model has 512 positions, a message takes some 190 of them."""
    done = talk(monkeypatch, tiny_model, *("why " * 90 + f"{n}?" for n in range(4)))
    assert done.returncode == 0, done.stderr
    assert [prompt.count("<|user|>") for prompt in prompts] == [1, 2, 2, 2]
    assert prompts[-1].endswith("3?<|end|>\n<|assistant|>\n")


def test_a_conversation_without_words_or_that_cannot_be_asked_is_an_error(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = talk(monkeypatch, tiny_model)
    assert done.returncode == 2
    assert "there is no question; give --question or --input, or lines on the standard input" in done.stderr
    done = talk(monkeypatch, tiny_model, "why " * 3000, "how?")
    assert (done.returncode, done.stdout) == (2, "")
    monkeypatch.setattr(sys, "stdin", None)
    assert run_here("generate.py", tiny_model).returncode == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    done = run_here("generate.py", tiny_model)
    assert (done.returncode, "the standard input is not utf-8 text" in done.stderr) == (2, True)


# ranks


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [("torchrun", "--nproc_per_node", "2"), ("deepspeed", "--num_gpus", "2")])
def test_ranks_divide_the_questions_and_write_what_one_process_writes(
    tiny_model: Path, questions: Path, launcher: tuple[str, ...]
) -> None:
    alone = run_here("generate.py", *flags(tiny_model, questions))
    assert alone.returncode == 0, alone.stderr
    output = questions.with_name("answers.jsonl")
    expected = output.read_bytes()
    done = run_script("launch/generate.py", *flags(tiny_model, questions, "--overwrite"), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected
    assert done.stdout.splitlines().count(str(output)) == 1

"""The road from report to checked document: docs/clinical.md is followed with a tiny model, and an oracle is scored."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, make_tokenizer, run_here, tiny_llama

from toolkit.clinical.dictionary import toy
from toolkit.clinical.road import CLOCK, DOCUMENT, RECORDS, STEPS, TRIAGE, AskedStep, Road, Walked
from toolkit.clinical.road_scores import StepScore, road_scores, scores_table
from toolkit.commands.road import _parse, _rows, _walk
from toolkit.commands.road_files import open_lines, write_reports
from toolkit.config.data_schema import DataConfig
from toolkit.data.questions import RowReader
from toolkit.data.sources import read_rows
from toolkit.evaluation.label_probabilities import label_probabilities
from toolkit.inference import shared_base, shared_prefix
from toolkit.inference.note_models import _is_anothers, option_probabilities
from toolkit.inference.open_model import open_model
from toolkit.runtime.errors import DataError, UsageError
from toolkit.tasks.choose import load_task
from toolkit.tasks.sample import RowFaultError

PAGE = ROOT / "docs" / "clinical.md"
SAMPLES = ROOT / "examples" / "data" / "clinical" / "road_ko.jsonl"
CLASSES = ("self-care", "contact today", "emergency")
FIELDS = ("event", "serious", "criteria", "causality", "expectedness", "listed", "onset", "outcome", "action")


def row_of(number: int, note: str, label: str, term: str, day: str, serious: str) -> dict[str, Any]:
    event = {"AETERM": term, "AELLT": term, "AESER": serious, "AESTDTC": day}
    event |= {"AESHOSP": "Y"} if serious == "Y" else {}
    fields = dict(zip(FIELDS, (term, serious, ["AESHOSP"] if serious == "Y" else [], "RELATED", "UNKNOWN", None, day,
                               "UNKNOWN", "UNKNOWN"), strict=True))  # fmt: skip
    return {
        "NOTE": note, "NOTE_DATE": "2026-03-12", "STUDYID": "FROST-01", "USUBJID": f"FROST-01-90{number}",
        "LANGUAGE": "en", "AWARE_DATE": "2026-03-12", "CLASS": label, "EVENTS": [event], "FIELDS": fields,
    }  # fmt: skip


ROWS = [
    row_of(1, "Heartburn since 2026-03-11, eats little.", "self-care", "Heartburn", "2026-03-11", "N"),
    row_of(2, "Bloating from 2026-03-09 on, asks for a call.", "contact today", "Bloating", "2026-03-09", "N"),
    row_of(3, "Vomiting blood on 2026-03-10, admitted.", "emergency", "Vomiting blood", "2026-03-10", "Y"),
]


class Oracle:
    """Gives the right answers, but for some: by step and row number from 0. A document follows from its records."""

    steps = tuple(STEPS)

    def __init__(self, wrong: Mapping[tuple[str, int], Any] | None = None) -> None:
        self.wrong, self.number, self.begun = dict(wrong or {}), -1, 0

    def begin(self, number: int, values: Mapping[str, Any]) -> None:
        self.number, self.begun = number, self.begun + 1

    def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
        right = ROWS[self.number]
        row = {name: value for name, value in values.items() if name not in ("CLASS", "EVENTS", "FIELDS")}
        answer = {
            TRIAGE: f"{right['CLASS']}\n“{right['EVENTS'][0]['AETERM']}” is told.",
            RECORDS: json.dumps(right["EVENTS"]),
            CLOCK: json.dumps(right["FIELDS"]),
            DOCUMENT: document_of(values.get("AE", ())),
        }[step]
        reference = document_of(right["EVENTS"]) if step == DOCUMENT else answer
        wrong = self.wrong.get((step, self.number))
        if isinstance(wrong, Exception):
            raise wrong
        options = CLASSES if step == TRIAGE else ()
        label = wrong if step == TRIAGE and wrong else right["CLASS"]
        if step == TRIAGE:
            answer = answer.replace(right["CLASS"], label, 1)
        elif wrong is not None:
            answer = wrong
        return AskedStep(row, lambda number, forced: answer, reference, options,
                     lambda: [0.9 if one == label else 0.05 for one in options])  # fmt: skip


def document_of(events: Any) -> str:
    parts = [f"{one['AETERM']} began on {one['AESTDTC']} [AE.AETERM] [AE.AESTDTC]." for one in events]
    return " ".join(parts) or "There was no event [NOTE]."


def walk(oracle: Any, **settings: Any) -> tuple[list[Walked], Road]:
    road = Road(oracle, dictionary=toy(), scores=True, **settings)
    return [road.walk(at, f"rows line {at}", row) for at, row in enumerate(ROWS, start=1)], road


def by_name(scores: list[StepScore]) -> dict[tuple[str, str], tuple[float, float]]:
    return {(one.step, one.metric): (one.right_inputs, one.predicted_inputs) for one in scores}


def test_right_answers_in_place_of_models_score_one_everywhere() -> None:
    notes, road = walk(Oracle())
    scores = road_scores(notes, road)
    assert {one.step for one in scores} == {
        TRIAGE, RECORDS, "rules", CLOCK, "reporting clock", DOCUMENT, "verification"
    }  # fmt: skip
    assert all(value == (1.0, 1.0) for value in by_name(scores).values()), scores_table(scores)
    assert {one.rows for one in scores} == {3}
    assert [note.triage and note.triage["DECISION"] for note in notes] == [row["CLASS"] for row in ROWS]
    assert notes[2].clock is not None
    assert (notes[2].clock["CLOCK"]["days"], notes[2].clock["CLOCK"]["due"]) == (15, "2026-03-27")
    assert notes[0].records is not None
    assert (
        notes[0].records["RECORDS"][0] | {"USUBJID": "FROST-01-901", "DOMAIN": "AE"} == (notes[0].records["RECORDS"][0])
    )
    assert "AEDECOD" in notes[0].records["RECORDS"][0]


def test_an_error_of_the_records_shows_in_rules_document_and_verification_but_not_with_the_right_records() -> None:
    events = [ROWS[1]["EVENTS"][0] | {"AESTDTC": "2026-02-01"}]
    notes, road = walk(Oracle({(RECORDS, 1): json.dumps(events)}))
    found = by_name(road_scores(notes, road))
    assert found[RECORDS, "events/f1"] == (1.0, 1.0)
    assert found[RECORDS, "field/AESTDTC"] == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found["rules", "notes whose records break none"] == (1.0, pytest.approx(2 / 3))
    assert found["verification", "sentences, against the records given"] == (1.0, 1.0), "a false record backs it"
    assert found["verification", "sentences, against the right records"] == (1.0, pytest.approx(2 / 3))
    assert notes[1].document is not None
    assert "2026-02-01" in notes[1].document["TEXT"]
    assert notes[1].right_document == document_of(ROWS[1]["EVENTS"])
    assert any(flag["step"] == RECORDS and flag["reason"].startswith("AE-DATE-SOURCE") for flag in notes[1].flags)
    notes, road = walk(Oracle({(RECORDS, 1): "[]"}))
    found = by_name(road_scores(notes, road))
    assert found[DOCUMENT, "citation recall"] == (1.0, pytest.approx(4 / 6))
    assert found[TRIAGE, "class of the model"] == (1.0, 1.0)


def test_an_error_of_the_fields_shows_in_the_clock() -> None:
    fields = json.dumps(ROWS[2]["FIELDS"] | {"serious": "N", "criteria": []})
    notes, road = walk(Oracle({(CLOCK, 2): fields, (TRIAGE, 0): "contact today"}))
    found = by_name(road_scores(notes, road))
    assert found["reporting clock", "period and due date, computed"] == (1.0, pytest.approx(2 / 3))
    assert found[CLOCK, "fields"][1] < 1
    assert found[TRIAGE, "class of the model"] == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found[DOCUMENT, "citation recall"] == (1.0, 1.0)


def test_no_note_is_lost_whatever_fails(tmp_path: Path) -> None:
    wrong = {(step, at): RowFaultError("has no column X") if at else DataError("too long")
             for at, step in enumerate((TRIAGE, RECORDS, DOCUMENT))}  # fmt: skip
    notes, road = walk(Oracle({**wrong, (CLOCK, 0): "no JSON"}))
    notes += [road.walk(4, "rows line 4", None, "is not JSON"), road.walk(5, "rows line 5", ["no", "columns"])]
    for note in notes:
        write_reports(tmp_path, note, ("md", "docx"))
    lines = [note.results for note in notes]
    reasons = [{flag["step"]: flag["reason"] for flag in line["FLAGS"]} for line in lines]
    assert reasons[0][TRIAGE] == "too long"
    assert reasons[0][CLOCK].startswith("AT01")
    assert reasons[1][RECORDS] == "has no column X"
    assert reasons[1][DOCUMENT].startswith("written without records")
    assert (reasons[2][DOCUMENT], lines[2]["DOCUMENT"]) == ("has no column X", None)
    assert set(reasons[3]) == set(STEPS)
    assert reasons[4][TRIAGE] == "is no object with columns"
    assert all(line["NOTICE"].startswith(("For research", "연구용")) for line in lines)
    for number in range(1, 6):
        report = (tmp_path / f"note-{number}.md").read_text(encoding="utf-8")
        assert "For research; not for care." in report or "연구용이며 진료에 쓰지 않습니다." in report
        assert (tmp_path / f"note-{number}.docx").read_bytes()[:2] == b"PK"
    failed = by_name(road_scores(notes, road))
    assert failed[TRIAGE, "class of the model"] == (1.0, 1.0), "a note that was not asked about has no right answer"


def test_answers_are_asked_for_again_until_they_break_no_rule() -> None:
    given: list[int] = []

    class Second(Oracle):
        def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
            asked = super().ask(step, values)
            if step != RECORDS:
                return asked

            def draw(number: int, forced: str | None) -> str:
                given.append(number)
                return asked.draw(number, forced) if number > self.number else "no JSON"

            return AskedStep(asked.row, draw, asked.reference)

    notes, _ = walk(Second(), tries=2)
    assert given == [1, 1, 2, 1, 2]
    assert [note.records and (note.records["VERIFIED"], note.records["TRIES"]) for note in notes] == [
        (True, 1), (True, 2), (False, 2),
    ]  # fmt: skip
    assert [flag["step"] for flag in notes[2].flags][:1] == [RECORDS]


def test_right_answers_of_other_steps_are_hidden_from_a_case_record() -> None:
    own, others = frozenset({"EVENT", "event"}), frozenset({"EVENTS", "CLASS", "class"})
    columns = ("EVENT", "EVENTS", "CLASS", "class", "NOTE")
    assert [name for name in columns if _is_anothers(name, own, others)] == ["EVENTS", "CLASS", "class"]


def test_the_samples_have_right_answers_that_break_no_rule() -> None:
    rows = [row.values for row in read_rows(str(SAMPLES))]
    assert len(rows) == len({row["NOTE"] for row in rows}) == 6
    tasks = {step: load_task(step) for step in STEPS}
    for row in rows:
        assert tasks[DOCUMENT].has_answer(row)
        for step in (TRIAGE, RECORDS, CLOCK):
            own = tasks[step].answer_columns | tasks[step].asked_columns
            others = {name for key, task in tasks.items() if key != step for name in task.answer_columns}
            seen = {name: value for name, value in row.items() if not _is_anothers(name, own, others)}
            if not tasks[step].has_answer(seen):
                assert (step, row["EVENTS"]) == (CLOCK, [])
                continue
            answer = tasks[step].read(seen, with_answer=True).answer
            check = Road(Oracle(), dictionary=toy())._checked(
                AskedStep(seen, lambda number, forced, answer=answer: answer or ""), _check(step)
            )
            assert check[1:] == ([], 1), (row["NOTE"], step)


def _check(step: str) -> Any:
    from toolkit.clinical.verification import find_check

    return find_check(STEPS[step], toy() if step == RECORDS else None)


SMALL = ("--model.dtype", "float32", "--mask.train", "last:2", "--train.max_steps", 1, "--output.sample_answers", 0,
         "--output.report", "[]", "--output.evaluate_metrics", "[]", "--prefix.cache", "off",
         "--data.max_length", 2048)  # fmt: skip
"""The tiny tokenizer has a token for each byte of Korean."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands of the page give, and how often the base was loaded and a prefix was run."""
    folder = tmp_path_factory.mktemp("road")
    model = tiny_llama()
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    page, counts, done = PAGE.read_text(encoding="utf-8"), Counter[str](), []
    (table,) = re.findall(r"```csv\n(.*?)```", page, flags=re.S)
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FROSTLINE_CACHE", str(folder / "cache"))
        for module, name in ((shared_base, "load_base"), (shared_prefix, "run_prefix")):
            patch.setattr(module, name, _counted(getattr(module, name), name, counts))
        Path("notes.csv").write_text(table, encoding="utf-8")
        for words in commands:
            if words[:1] != ["python"]:
                continue
            more: tuple[Any, ...] = ()
            if words[1] == "launch/train.py":
                more = ("--model.name_or_path", folder / "model", *SMALL)
            if words[1] == "launch/road.py":
                more = ("--tries", 1, "--max-new-tokens", 150, *(("--limit", 1) if "--score" in words else ()))
            counts.clear()
            outcome = run_here(words[1], *words[2:], *more)
            done.append((words, outcome, dict(counts)))
            assert outcome.returncode in ((0, 1) if "verify" in words[1] else (0,)), (words, outcome.stderr)
    return {"folder": folder, "done": done}


def _counted(function: Any, name: str, counts: Counter[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def test_the_page_is_followed_to_the_letter(followed: dict[str, Any]) -> None:
    walked, scored = (one for one in followed["done"] if one[0][1] == "launch/road.py")
    assert walked[2] == {"load_base": 1, "run_prefix": 3 + 1}, "once a note; the first is also asked in the plain way"
    assert "is loaded once for 4 runs" in walked[1].stderr
    assert "3 notes in road" in walked[1].stdout
    assert "For research; not for care." in walked[1].stdout
    folder = followed["folder"] / "road"
    lines = [json.loads(line) for line in (folder / "road.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["NUMBER"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["TRIAGE"]["DECISION"] in ("자가 관리", "오늘 연락", "응급", "판단 보류")
        assert isinstance(line["RECORDS"]["RECORDS"], list)
        assert set(line["AE_TRIAGE"]["FIELDS"]) == set(FIELDS)
        assert all({"text", "verified", "faults"} == set(one) for one in line["DOCUMENT"]["SENTENCES"])
        assert line["NOTICE"] == "연구용이며 진료에 쓰지 않습니다."
        report = (folder / f"note-{line['NUMBER']}.md").read_text(encoding="utf-8")
        assert line["ROW"]["NOTE"] in report
        assert (folder / f"note-{line['NUMBER']}.docx").is_file()
    assert "| step | metric | right inputs | predicted inputs | notes |" in scored[1].stdout
    scores = json.loads((followed["folder"] / "scored" / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert {one["step"] for one in scores} >= {TRIAGE, RECORDS, "rules", CLOCK, DOCUMENT, "verification"}


def test_the_output_is_never_overwritten_and_other_tasks_are_refused(followed: dict[str, Any]) -> None:
    words = [str(word) for word in followed["done"][-1][0][2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(followed["folder"])
        again = run_here("road", *words)
        assert again.returncode == 2
        assert "holds note-1.md" in again.stderr
        at = words.index("--triage")
        swapped = [*words[:at], "--triage", "runs/ae_triage", *words[at + 2 :], "--output", "other"]
        other = run_here("road", *swapped)
        assert "was trained by the task ae_triage, whose verify is ae_triage; expected a run of a task" in other.stderr
        assert not Path("other").exists()


def test_probabilities_after_a_shared_prefix_are_those_that_evaluate_scores(followed: dict[str, Any]) -> None:
    opened = open_model(str(followed["folder"] / "runs" / "triage"))
    row = {"NOTE": "어제부터 열이 나요", "NOTE_DATE": "2026-03-12"}
    sample = load_task(TRIAGE).read(row, with_answer=False)
    wanted = label_probabilities(opened, [sample], ["row 1"], 1)[0]
    prompt, options = opened.encoder.encode_answers(sample, sample.options)
    models = {TRIAGE: opened.loaded}
    boundary = opened.delta.mask.boundary if opened.delta else 0
    start = shared_prefix.run_prefix(opened.loaded.model, opened.loaded.anatomy, boundary, prompt[:20])

    def continued(name: str, of: Any) -> Any:
        return shared_prefix.continue_prefix(models[name].model, models[name].anatomy, boundary, of)

    note = shared_prefix.SharedNote(start, continued)
    found = option_probabilities(opened, prompt, options, note, TRIAGE)
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
    alone = option_probabilities(opened, prompt, options, shared_prefix.SharedNote(None, continued), TRIAGE)
    assert alone == pytest.approx(found, abs=1e-5)
    assert torch.tensor(found).sum() == pytest.approx(1)


def test_notes_are_texts_and_tables_in_the_order_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("S: 속이 울렁거림\nP: 경과 관찰", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "b.csv").write_text("NOTE,NOTE_DATE\nFever.,2026-03-01\nCough.,\n", encoding="utf-8")
    words = [*(str(tmp_path / name) for name in ("a.txt", "b.csv", "empty.txt")), "--output", "x", "--triage", "t",
             "--coding", "c", "--document", "d", "--column", "NOTE_DATE=2026-04-02"]  # fmt: skip
    rows = list(_rows(_parse(words, "road")))
    assert [row.values and (row.values["NOTE"][:6], row.values["NOTE_DATE"]) for row in rows] == [
        ("S: 속이 ", "2026-04-02"), ("Fever.", "2026-03-01"), ("Cough.", "2026-04-02"), None,
    ]  # fmt: skip
    assert rows[0].values["PLAN"] == "경과 관찰"
    assert "is empty; expected a note" in str(rows[3].fault)


def test_what_one_run_masks_is_in_no_output(tmp_path: Path) -> None:
    rows = [row | {"NOTE": f"{row['NOTE']} Call 010-4821-7736."} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "out").mkdir()
    words = [str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--triage", "t", "--coding", "c",
             "--document", "d"]  # fmt: skip
    readers = {
        step: RowReader(DataConfig(task=step, on_identifier="mask" if step == CLOCK else "warn"), load_task(step))
        for step in STEPS
    }
    arguments = _parse(words, "road")
    with open_lines(arguments, {}) as file:
        assert len(_walk(arguments, Road(Oracle(), dictionary=toy()), readers, file, 3)) == 3
    for path in (tmp_path / "out").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "[PHONE]" in text
        assert "4821" not in text


def test_an_interrupted_road_goes_on_and_gives_what_an_undisturbed_one_gives(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    wrong = {(RECORDS, 0): "[]", (CLOCK, 1): DataError("too long")}
    readers = {step: RowReader(DataConfig(task=step), load_task(step)) for step in STEPS}

    class Killed(Oracle):
        def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
            if self.number == 2 and step == DOCUMENT:
                raise KeyboardInterrupt
            return super().ask(step, values)

    drawn = Counter[int]()

    class Drawn(Oracle):
        def ask(self, step: str, values: Mapping[str, Any]) -> AskedStep:
            asked, number = super().ask(step, values), self.number

            def draw(of: int, forced: str | None) -> str:
                drawn[number] += 1
                return asked.draw(of, forced)

            return AskedStep(asked.row, draw, asked.reference, asked.options, asked.probabilities)

    def walk_into(name: str, oracle: Oracle, *more: str) -> tuple[list[Walked], list[StepScore]]:
        (tmp_path / name).mkdir(exist_ok=True)
        words = [str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / name), "--triage", "t", "--coding", "c",
                 "--document", "d", "--score", *more]  # fmt: skip
        arguments = _parse(words, "road")
        road = Road(oracle, dictionary=toy(), scores=True)
        with open_lines(arguments, {}) as file:
            notes = _walk(arguments, road, readers, file, len(ROWS))
        return notes, road_scores(notes, road)

    whole = walk_into("whole", Oracle(wrong))
    with pytest.raises(KeyboardInterrupt):
        walk_into("cut", Killed(wrong))
    begun = tmp_path / "cut" / "road.jsonl.part"
    assert len(begun.read_bytes().splitlines()) == 1 + 2
    assert not (tmp_path / "cut" / "road.jsonl").exists()
    with pytest.raises(UsageError, match=r"2 answers of a command that was interrupted, which had seed 42 \(now 7\)"):
        walk_into("cut", Oracle(wrong), "--seed", "7")
    again = walk_into("cut", Drawn(wrong))
    assert set(drawn) == {2}, "no model answers for a note that was walked"
    assert again[1] == whole[1]
    assert [note.results for note in again[0]] == [note.results for note in whole[0]]
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == files
    assert set(files) == {"road.jsonl", "note-1.md", "note-2.md", "note-3.md"}
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        walk_into("changed", Killed(wrong))
    (tmp_path / "rows.jsonl").write_text(rows.replace("Heartburn since", "Heartburn from"), encoding="utf-8")
    with pytest.raises(DataError, match="row 1 is not the one that was answered before an interruption"):
        walk_into("changed", Oracle(wrong))

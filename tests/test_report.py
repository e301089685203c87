"""A run's report: what it says agrees with the run, and no text of the data can become a part of the page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import stat
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import ENGLISH, make_tiny_model, run_here, tiny_flags, train
from test_evaluation import TASK, choice_rows

import toolkit
from toolkit.checkpoint.choice import choose_checkpoint
from toolkit.evaluation.comparison import AnsweredRow
from toolkit.evaluation.verdicts import ModelScores
from toolkit.metrics.resampling import Difference
from toolkit.report import write_report
from toolkit.report.clean import clean
from toolkit.report.curves import draw_learning_rate, draw_losses
from toolkit.report.facts import Curves, read_curves, read_runs
from toolkit.report.phrases import PHRASES, Phrases
from toolkit.report.scores import result, scores_of
from toolkit.runtime.errors import CheckpointError, UsageError

VOID = {"meta", "wbr"}
SECTIONS = [
    "result",
    "trained",
    "curves",
    "scores",
    "answers",
    "forgetting",
    "data",
    "cost",
    "versions",
    "repeat",
    "methods",
]


class Page(HTMLParser):
    """Reads a page: its tags in order, its sections, its text, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open) and "tr" in self.open:
            self.rows[-1][-1] += data

    @property
    def sections(self) -> list[str | None]:
        return [attrs.get("id") for tag, attrs in self.tags if tag == "section"]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.sections == SECTIONS
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "form", "base"}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "action") for name in attrs)
        assert str(attrs.get("href", "#")).startswith("#")
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("aria-label") for attrs in page.all("svg"))
    assert all("scope" in attrs for attrs in page.all("th"))
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on questions with labels, of which 20 are validation rows and 20 test rows; no test adds to the run."""
    folder = tmp_path_factory.mktemp("report")
    make_tiny_model(folder / "model")
    flags = tiny_flags(
        folder / "model", folder / "run", "--data.path", choice_rows(folder / "rows.jsonl"), "--data.task",
        json.dumps(TASK), "--data.validation", 0.34, "--data.test", 0.34, "--train.epochs", 2, "--output.keep", 9,
        "--prefix.cache_dir", folder / "cache", "--train.learning_rate", 1e-2,
    )  # fmt: skip
    assert train(*flags) == 0
    made = sorted((folder / "run").rglob("*"))
    yield folder
    assert sorted((folder / "run").rglob("*")) == made


@pytest.fixture(scope="module")
def compared(folder: Path) -> toolkit.Comparison:
    return toolkit.evaluate(["base", folder / "run"], batch_size=4, answers=3, max_new_tokens=4)


def test_both_languages_have_the_same_phrases_with_the_same_values() -> None:
    english, korean = PHRASES["en"], PHRASES["ko"]
    assert english.keys() == korean.keys()
    for key, phrase in english.items():
        assert set(re.findall(r"{(\w+)}", phrase)) == set(re.findall(r"{(\w+)}", korean[key])), key
        assert sorted(re.findall(r"<\w+>", phrase)) == sorted(re.findall(r"<\w+>", korean[key])), key
    same = {key for key in english if english[key] == korean[key]}
    assert same <= {"gib"}


def test_a_comparison_gives_a_whole_page_in_each_language(
    folder: Path, compared: toolkit.Comparison, tmp_path: Path
) -> None:
    paths = write_report(folder / "run", compared, ("en", "ko"), tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["report.html", "report.ko.html"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o600]
    english, korean = map(read, paths)
    assert english.all("html") == [{"lang": "en"}]
    assert korean.all("html") == [{"lang": "ko"}]
    assert len(english.tags) == len(korean.tags)
    assert len(english.all("article")) == 3
    assert len(english.all("svg")) == 3
    assert "Nothing is claimed, as there are fewer than 50 independent rows" in english.text
    assert "아무것도 주장하지 않습니다" in korean.text
    own = scores_of(folder / "run", compared)
    header, declared = next(pair for pair in zip(english.rows, english.rows[1:], strict=False) if "metric" in pair[0])
    assert header[:4] == ["metric", "base", "fine-tuned", "difference to base"]
    assert declared[0].startswith("accuracy declared")
    assert f"{own.scores['accuracy'].value:.4f}" in declared[2]
    assert "too few rows" in declared[3]
    hangul = re.compile("[가-힣]")
    assert not hangul.search(english.text)


def test_the_model_card_and_the_report_agree(folder: Path, compared: toolkit.Comparison, tmp_path: Path) -> None:
    lora = '{lora: {select: "last:2", rank: 2}}'
    flags = tiny_flags(
        folder / "model", tmp_path / "lora", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--train.max_steps", 2, "--prefix.cache", "off",
    )  # fmt: skip
    at = flags.index("--mask.train")
    flags[at : at + 5] = ["--mask.train", lora]
    assert train(*flags) == 0
    for run, comparison in ((folder / "run", compared), (tmp_path / "lora", None)):
        card = (toolkit.export(run, tmp_path / f"export-{run.name}") / "README.md").read_text(encoding="utf-8")
        page = read(write_report(run, comparison, ("en",), tmp_path / f"page-{run.name}")[0])
        table = [[cell.strip() for cell in line.split("|")[1:5]] for line in card.splitlines() if line.startswith("| ")]
        head, *parts, total = table
        assert head == ["part", "tensors", "parameters", "state"]
        at = page.rows.index(head)
        assert page.rows[at + 1 : at + 1 + len(parts)] == parts
        trained = sum(part.trained for part in read_runs(run)[0].parts)
        assert total[2] in page.text
        assert f"{trained:,} of {total[2]} parameters trained" in page.text
        choice = choose_checkpoint(run)
        assert f"step {choice.step}" in page.text
        assert choice.score is None or f"{choice.score.loss:.4f}" in page.text
        assert (choice.score is None) == (run.name == "lora")
        base = re.search(r"SHA-256 of its weights as\nfloat32 (\w{64})", card)
        assert base is not None
        assert base[1] in page.text
        assert card.split("```yaml\n")[1].split("```")[0] in page.text
    assert "LoRA adapters of rank 2" in page.text


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown", "too few rows", None])
def test_the_sentence_says_what_the_declared_metric_shows(
    folder: Path, compared: toolkit.Comparison, language: Any, verdict: str | None
) -> None:
    own = scores_of(folder / "run", compared)
    score = dataclasses.replace(own.scores["accuracy"], verdict=verdict, difference=Difference(0.5, 0.25, 0.75, 0.01))
    own = dataclasses.replace(own, scores={**own.scores, "accuracy": score})
    said = result(own, compared, Phrases(language))
    assert "+0.5000 [0.2500, 0.7500]" in said
    trivial = [model for model in compared.models if model.is_trivial and "accuracy" in model.scores]
    best = max(trivial, key=lambda model: model.scores["accuracy"].value)
    assert f"{best.scores['accuracy'].value:.4f}" in said
    if language == "en":
        words = {
            "better": "is better than its base", "worse": "is worse than its base",
            "no difference shown": "No difference from its base is shown", "too few rows": "Nothing is claimed",
            None: "neither direction is better",
        }  # fmt: skip
        assert [key for key, text in words.items() if text in said] == [verdict]


def test_a_lower_trivial_score_is_the_best_where_lower_is_better_and_an_oracle_is_none(
    folder: Path, compared: toolkit.Comparison
) -> None:
    own = scores_of(folder / "run", compared)
    low, high = (dataclasses.replace(own.scores["loss"], value=value, difference=None) for value in (0.125, 9.0))
    named = {"another row's answer": high, "sentence nearest the question": low}
    named["oracle: sentence nearest the reference"] = dataclasses.replace(low, value=0.01)
    trivial = tuple(ModelScores(name, None, True, {"loss": score}) for name, score in named.items())
    models = (*[model for model in compared.models if not model.is_trivial], *trivial)
    said = result(own, dataclasses.replace(compared, primary="loss", models=models), Phrases("en"))
    assert "The best trivial answer (sentence nearest the question) scored 0.1250" in said


def test_words_that_differ_are_marked_in_both_answers(
    folder: Path, compared: toolkit.Comparison, tmp_path: Path
) -> None:
    own = scores_of(folder / "run", compared).name
    row = AnsweredRow("1", "q", (), "r", {"base": "it is not  so bad", own: "it is so\ngood indeed"})
    path = write_report(folder / "run", dataclasses.replace(compared, answered_rows=(row,)), ("en",), tmp_path)[0]
    source = read(path).source
    assert ">it is <del>not</del>  so <del>bad</del></p>" in source
    assert ">it is so\n<ins>good indeed</ins></p>" in source


ATTACKS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</p></section></body>",
    "{{ 7 * 7 }} {% raw %} {0} {x}", "w" * 5000, "a\x00b\x1b[31m\x85\x7f", "\ud800 lone \udfff", "\ufffe \uffff",
    "\u202egnp.exe", "שלום עולם", "]]> <!-- &lt; &#x3c;script&#x3e;", "\r\nline\rline",
)  # fmt: skip


def test_no_text_of_the_data_becomes_a_part_of_the_page(
    folder: Path, compared: toolkit.Comparison, tmp_path: Path
) -> None:
    run = tmp_path / "<script>alert(1)<'\"&{{x}} run"
    shutil.copytree(folder / "run", run)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        base = json.loads((checkpoint / "base.json").read_text())
        base["model"]["name_or_path"] = "<script>{{ 7 * 7 }} שלום"
        (checkpoint / "base.json").write_text(json.dumps(base))
        state = json.loads((checkpoint / "state.json").read_text())
        state["versions"]["torch"] = "<img src=x>"
        state["fingerprints"]["data"] = "</table><script>"
        (checkpoint / "state.json").write_text(json.dumps(state))
    record = json.loads((run / "record.json").read_text())
    record["task"], record["hardware"]["device"] = "<script>", "<b onclick=x>"
    (run / "record.json").write_text(json.dumps(record))
    own = scores_of(folder / "run", compared)
    rows = tuple(
        AnsweredRow(attack, attack, (attack,), attack, {"<script>b": attack, str(run): attack[::-1]})
        for attack in ATTACKS
    )
    models = tuple(
        dataclasses.replace(model, name={"base": "<script>b", own.name: str(run)}.get(model.name, model.name))
        for model in compared.models
    )
    evil = ModelScores("\u202e</title><script>", None, False, {**own.scores, "<script>": own.scores["loss"]})
    attacked = dataclasses.replace(compared, models=(*models, evil), against="<script>b", answered_rows=rows)
    plain = dataclasses.replace(
        attacked, answered_rows=tuple(
            AnsweredRow("a", "a", ("a",), "a", {"<script>b": "a", str(run): "a"}) for _ in ATTACKS
        ),
    )  # fmt: skip
    for language in ("en", "ko"):
        page = read(write_report(run, attacked, (language,), tmp_path / "out")[0])  # type: ignore[arg-type]
        harmless = read(write_report(run, plain, (language,), tmp_path / "out")[0])  # type: ignore[arg-type]
        marks = ("ins", "del")
        assert [tag for tag, _ in page.tags if tag not in marks] == [
            tag for tag, _ in harmless.tags if tag not in marks
        ]
        assert "<script" not in page.source.casefold()
        assert "alert(1)</script>" in page.text
        assert "{{ 7 * 7 }} {% raw %} {0} {x}" in page.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page.source)
        assert "a␀b␛[31m�␡" in page.text
        assert "<bdi>&lt;script&gt;{{ 7 * 7 }} שלום</bdi>" in page.source
        title = re.findall(r"<title>(.*?)</title>", page.source)[0]
        assert "\u202e" not in title


def test_text_that_a_page_may_hold_is_left_as_it_is() -> None:
    assert clean("한국어 — café\n\t👩‍⚕️ שלום") == "한국어 — café\n\t👩‍⚕️ שלום"


def test_a_run_alone_gives_a_report_that_names_the_command_for_scores(folder: Path, tmp_path: Path) -> None:
    page = read(write_report(folder / "run", None, ("en",), tmp_path)[0])
    assert "This report has no scores" in page.text
    assert f"report.py {folder / 'run'}" in page.text
    assert "No answers were generated." in page.text
    assert len(page.all("svg")) == 3
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((row["eval_loss"], row["step"]) for row in metrics if "eval_loss" in row)
    assert f"lowest validation loss {best[0]:.4f} at step {best[1]}" in page.text
    assert ["tokens read", f"{sum(row.get('tokens', 0) for row in metrics):,}"] in page.rows
    assert ["validation rows", "20"] in page.rows


def test_a_version_that_recorded_less_is_reported_with_what_there_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for name in ("record.json", "data_files.json", "metrics.jsonl", "mask.json"):
        (run / name).unlink()
    page = read(write_report(run, None, ("en",))[0])
    assert ["validation rows", "not recorded"] in page.rows
    assert ["device", "not recorded"] in page.rows
    assert "metrics.jsonl is not in the run directory" in page.text
    assert len(page.all("svg")) == 1  # the plan has the parts
    (run / "plan.json").unlink()
    page = read(write_report(run, None, ("en",))[0])
    assert "the number of all parameters was not recorded" in page.text
    assert not page.all("svg")


def test_what_cannot_be_reported_is_said(folder: Path, compared: toolkit.Comparison, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        write_report(tmp_path, None)
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    with pytest.raises(UsageError, match="the comparison has no scores of"):
        write_report(run, compared)
    (run / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged or missing .*record\.json"):
        write_report(run, None)
    (run / "record.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"record\.json holds a list"):
        write_report(run, None)
    (run / "record.json").unlink()
    (run / "report.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="is no report of Frostline"):
        write_report(run, None)
    assert (run / "report.html").read_text() == "<p>mine</p>"
    assert not (run / "report.ko.html").exists()
    write_report(run, None, ("ko",))
    write_report(run, None, ("ko",))  # replaces its own
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no committed checkpoint yet"):
        write_report(run, None, ("ko",))


def test_a_killed_line_is_left_out_and_a_long_run_is_drawn_as_means(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": None if step == 5 else step / 1000, "learning_rate": 1e-3, "peak_memory_gib": 1.0}
        for step in range(1, 5001)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5001, "lo')
    curves = read_curves(path)
    assert len(curves.steps) == 5000
    for picture in (draw_losses([curves], None), draw_learning_rate([curves, curves])):
        assert len(picture) < 60_000
        assert not re.search("nan|http|#0[1-4]0", picture)
    path.write_text("{\n" + json.dumps(rows[0]) + "\n")
    assert read_curves(path).steps == (1,)


def test_losses_that_are_not_finite_are_drawn_as_gaps() -> None:
    nan = float("nan")
    curves = Curves((1, 2), (nan, nan), (0.0, 0.0), (2,), (nan,))
    assert "nan" not in draw_losses([curves], None)


def test_folds_are_reported_together(folder: Path, tmp_path: Path) -> None:
    flags = tiny_flags(
        folder / "model", tmp_path / "folds", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--data.folds", 2, "--train.max_steps", 2, "--prefix.cache_dir", folder / "cache",
    )  # fmt: skip
    assert train(*flags) == 0
    done = run_here("launch/report.py", tmp_path / "folds", "--language", "en")
    assert done.returncode == 0, done.stderr
    page = read(tmp_path / "folds" / "report.html")
    assert ["fold", "0, 1 of 2"] in page.rows
    assert ["optimizer steps", "4 of 4"] in page.rows
    assert "Scored on 60 rows that were held out from training, each by the fold that did not see it" in page.text
    one = run_here("launch/report.py", tmp_path / "folds" / "fold-1", "--language", "ko", "--answers", 0)
    assert one.returncode == 2
    assert "held no validation rows out to be scored on; score the others with --part test" in one.stderr
    one = run_here("launch/report.py", tmp_path / "folds" / "fold-1", "--part", "test", "--answers", 0)
    assert one.returncode == 0, one.stderr


def test_the_command_scores_the_step_that_it_is_given(folder: Path, tmp_path: Path) -> None:
    steps = sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))
    done = run_here(
        "launch/report.py", folder / "run", "--language", "ko,en", "--step", steps[0], "--answers", 2,
        "--max-new-tokens", 2, "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "report.ko.html"), str(tmp_path / "report.html")]
    page = read(tmp_path / "report.html")
    assert f"Weights of step {steps[0]}" in page.text
    assert len(page.all("article")) == 2
    losses = {row[0].split()[0]: row for row in page.rows if row[0].startswith("loss")}
    scored = toolkit.evaluate(f"{folder / 'run'}@{steps[0]}")
    assert f"{scored.loss:.4f}" in losses["loss"][2]
    alone = run_here("launch/report.py", folder / "run", "--no-evaluation", "--output-dir", tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert "This report has no scores" in read(tmp_path / "report.html").text


def test_flags_that_contradict_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    for flags, message in (
        (["--no-evaluation", "--answers", "3"], "--answers goes with an evaluation"),
        (["--language", "fr"], "'fr' is no language of reports"),
        (["--output-dir", folder / "rows.jsonl"], "is a file; expected a folder"),
    ):
        done = run_here("launch/report.py", folder / "run", *flags)
        assert done.returncode == 2
        assert message in done.stderr
    assert run_here("launch/report.py", tmp_path / "none").returncode == 2


def test_a_mask_that_changes_is_told_phase_by_phase(folder: Path, tmp_path: Path) -> None:
    schedule = '[{train: ["last:1"], until_epoch: 1}]'
    flags = tiny_flags(
        folder / "model", tmp_path / "run", "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--train.epochs", 2, "--mask.schedule", schedule, "--prefix.cache", "off", "--data.limit", 4,
    )  # fmt: skip
    assert train(*flags) == 0
    page = read(write_report(tmp_path / "run", None, ("en",))[0])
    assert "The mask changed while training" in page.text
    assert page.text.count("frost line at block") == 2


def ended(folder: Path, name: str, *more: object) -> Any:
    """A run of launch/train.py, which ends with its report."""
    flags = tiny_flags(
        folder / "model", folder / name, "--data.path", folder / "rows.jsonl", "--data.task", json.dumps(TASK),
        "--data.validation", 0.2, "--train.max_steps", 3, "--train.epochs", 1, *more,
    )  # fmt: skip
    return run_here("train", *flags)


def test_a_run_ends_with_its_report_in_the_languages_of_the_recipe(folder: Path) -> None:
    done = ended(folder, "reported", "--output.report", "[en, ko]", "--output.report_answers", 2)
    assert done.returncode == 0, done.stderr
    run = folder / "reported"
    assert f"report: {run / 'report.html'}, {run / 'report.ko.html'}" in done.stderr
    english, korean = read(run / "report.html"), read(run / "report.ko.html")
    assert "macro_f1" in english.text
    assert "macro_f1" in korean.text
    scores = toolkit.evaluate(["base", run], batch_size=8, answers=2).models[0].scores
    assert f"{scores['loss'].value:.4f}" in english.text
    before = (run / "report.html").stat().st_mtime_ns
    again = ended(folder, "reported", "--output.report", "[en, ko]", "--output.report_answers", 2)
    assert again.returncode == 0
    assert "scoring the run" not in again.stderr  # it is there
    assert (run / "report.html").stat().st_mtime_ns == before
    (run / "report.ko.html").unlink()
    assert "scoring the run" in ended(folder, "reported", "--output.report", "[ko]").stderr  # a kill had prevented it
    assert "macro_f1" in read(run / "report.ko.html").text


def test_a_run_that_goes_on_has_a_new_report(folder: Path) -> None:
    flags = ("--output.report", "[en]", "--output.report_answers", 0)
    assert ended(folder, "longer", *flags).returncode == 0
    assert "step 3" in read(folder / "longer" / "report.html").text
    assert ended(folder, "longer", *flags, "--train.max_steps", 5, "--resume-override").returncode == 0
    page = read(folder / "longer" / "report.html")
    assert "step 5" in page.text
    assert "step 3" not in page.text


def test_folds_that_are_trained_one_at_a_time_are_reported_with_the_last(folder: Path) -> None:
    for fold in range(2):
        done = ended(
            folder, "one-by-one", "--output.report", "[en]", "--data.folds", 2, "--data.fold", fold,
            "--data.validation", "none",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (folder / "one-by-one" / "report.html").exists() == bool(fold)
    page = read(folder / "one-by-one" / "report.html")
    assert "macro_f1" in page.text
    assert f"--data.fold none --output.dir {folder / 'one-by-one'}-again" not in page.text  # quoted as one word
    assert "one-by-one-again --data.fold none" in page.text


def test_an_earlier_step_of_a_schedule_is_reported_as_it_was(folder: Path) -> None:
    schedule = '[{"train": ["head"], "until_step": 2}]'
    done = ended(
        folder, "phases", "--mask.schedule", schedule, "--output.save_every_steps", 2, "--output.keep", 9,
        "--train.max_steps", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run_here("report", folder / "phases", "--step", 2, "--no-evaluation", "--language", "en").returncode == 0
    early = read(folder / "phases" / "report.html")
    facts = read_runs(folder / "phases", 2)[0]
    assert facts.trained == 16384
    assert "16,384 parameters were trained, selected by head;" in early.text
    assert run_here("report", folder / "phases", "--no-evaluation", "--language", "en").returncode == 0
    late = read(folder / "phases" / "report.html")
    assert "selected by head; last:" in late.text


def test_a_mixture_of_tasks_is_scored_by_its_loss(folder: Path) -> None:
    path = json.dumps([
        {"path": str(folder / "rows.jsonl"), "task": TASK}, {"path": str(ENGLISH), "task": "long_answer"},
    ])  # fmt: skip
    done = ended(folder, "mixture", "--output.report", "[en]", "--data.path", path, "--data.task", "auto")
    assert done.returncode == 0, done.stderr
    assert "could not be scored" not in done.stderr
    assert "perplexity" in read(folder / "mixture" / "report.html").text
    assert run_here("report", folder / "mixture", "--language", "en").returncode == 0
    refused = run_here("report", folder / "mixture", "--answers", 2)
    assert (refused.returncode, "read by several tasks" in refused.stderr) == (2, True)


def test_a_run_is_whole_whatever_happens_to_its_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("toolkit.report.after_training.compare_models", fail)
    done = ended(folder, "unscored", "--output.report", "[en]")
    assert done.returncode == 0
    assert "could not be scored for its report (RuntimeError: planted); to try again: " in done.stderr
    page = read(folder / "unscored" / "report.html")
    assert "macro_f1" not in page.text

    def take_its_place(*given: Any, **options: Any) -> None:
        (folder / "taken" / "report.html").write_text("mine", encoding="utf-8")
        fail()

    monkeypatch.setattr("toolkit.report.after_training.compare_models", take_its_place)
    done = ended(folder, "taken", "--output.report", "[en]")
    assert done.returncode == 0
    assert "no report was written: " in done.stderr
    assert (folder / "taken" / "report.html").read_text(encoding="utf-8") == "mine"
    assert ended(folder, "silent").returncode == 0
    assert not list((folder / "silent").glob("report*"))


def test_folds_end_with_one_report_of_all(folder: Path) -> None:
    done = ended(folder, "of-folds", "--output.report", "[en]", "--data.folds", 2, "--data.validation", "none")
    assert done.returncode == 0, done.stderr
    assert "one checkpoint for each of 2 folds" in read(folder / "of-folds" / "report.html").text
    assert not (folder / "of-folds" / "fold-0" / "report.html").exists()


def test_drift_forgetting_and_a_public_source_have_their_places(folder: Path, compared: toolkit.Comparison) -> None:
    page = read(write_report(folder / "run", compared, ("en",), folder / "plain")[0])
    assert "Neither was measured" in page.text
    assert "PubMed" not in page.text
    items = choice_rows(folder / "items.jsonl", 12)
    more = toolkit.evaluate(
        ["base", folder / "run"], batch_size=4, drift=True, drift_max_new_tokens=3, forgetting=items,
        forgetting_task=TASK,
    )  # fmt: skip
    more = dataclasses.replace(more, public_sources=("PubMed",))
    assert more.drift is not None
    for language, heading in (("en", "Forgetting"), ("ko", "망각")):
        page = read(write_report(folder / "run", more, (language,), folder / "more")[0])  # type: ignore[arg-type]
        assert heading in page.text
        assert "PubMed" in page.text
        moved = scores_of(folder / "run", more.drift).scores["loss"]
        assert f"{moved.value:.4f}" in page.text
    done = run_here("report", folder / "run", "--no-evaluation", "--drift")
    assert (done.returncode, "goes with an evaluation" in done.stderr) == (2, True)


def test_rows_that_changed_are_said_with_what_report_can_do(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    choice_rows(tmp_path / "other.jsonl", 50)
    moved = config.replace(str(folder / "rows.jsonl"), str(tmp_path / "other.jsonl"))
    (tmp_path / "run" / "config.yaml").write_text(moved, encoding="utf-8")
    done = run_here("report", tmp_path / "run")
    assert done.returncode == 2
    assert "have changed since it was trained" in done.stderr
    assert "--no-evaluation makes one without scores" in done.stderr
    assert not list((tmp_path / "run").glob("report*"))

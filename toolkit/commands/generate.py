"""Answer questions with a run, an export, a delta or any model.

    python launch/generate.py runs/quickstart --question "…" --context "…"
    python launch/generate.py runs/quickstart --input questions.jsonl --output answers.jsonl

The input has the columns QUESTION and CONTEXTS in any format that training reads; the output is JSON lines with
QUESTION, CONTEXTS, ANSWER, and REFERENCE where the input has LONG_ANSWER.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.inference.open_model import OpenedModel
    from toolkit.models.load import Dtype
    from toolkit.tasks.pubmedqa import Sample


def generate(
    source: str | Path,
    questions: Iterable[str | Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    step: Step | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype | None = None,
) -> list[str]:
    """Return the model's answer to each question, from the same prompt that training used.

    Args:
        source: run directory, checkpoint, export, delta, model directory, Hub id or bundled name.
        questions: rows with the task's columns, as in ``{"QUESTION": …, "CONTEXTS": […]}``; a string is a question
            without contexts.
        max_new_tokens: longest answer in tokens.
        temperature: sampling temperature; 0 decodes greedily, which is repeatable.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of a run or delta, if it moved.
        trust_remote_code: run code that ships with the base model, if ``source`` was trained with it.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.

    Raises:
        DataError: questions are empty or longer than the model's context; the message names each row.
        UsageError: ``source`` cannot be opened.
    """
    from toolkit.data.questions import questions_of
    from toolkit.data.sources import Row
    from toolkit.inference.open_model import open_model
    from toolkit.tasks.pubmedqa import CONTEXTS, QUESTION

    items = [questions] if isinstance(questions, str | Mapping) else questions
    rows = [{QUESTION: item, CONTEXTS: []} if isinstance(item, str) else item for item in items]
    samples = questions_of(Row(f"question {number}", row) for number, row in enumerate(rows, start=1))
    opened = open_model(str(source), step, base, trust_remote_code, dtype)
    return list(_generate_answers(opened, samples, max_new_tokens, temperature))


def _generate_answers(
    opened: OpenedModel, samples: Iterable[Sample], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    """Move the model to the GPU, if there is one, and yield the answer to each sample."""
    from toolkit.inference.generation import answers
    from toolkit.runtime.distributed import World

    opened.loaded.model.to(World().device)
    max_length = opened.config.data.max_length
    return answers(opened.loaded, samples, max_length, max_new_tokens, temperature, opened.rendering)


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then answer, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = _parse(words, program)
    from toolkit.data.questions import from_prompt, read_questions
    from toolkit.inference.open_model import open_model
    from toolkit.runtime.paths import make_parent
    from toolkit.runtime.progress_bar import track

    if arguments.output:
        make_parent(arguments.output)
    samples = (
        read_questions(arguments.input, arguments.split)[: arguments.limit]
        if arguments.input
        else [from_prompt(arguments.question, arguments.context)]
    )
    opened = open_model(arguments.source, arguments.step, arguments.base, arguments.trust_remote_code, arguments.dtype)
    answers = _generate_answers(opened, samples, arguments.max_new_tokens, arguments.temperature)
    out = arguments.output.open("w", encoding="utf-8") if arguments.output else None
    questions = track(samples, "answering", "question") if out or not sys.stdout.isatty() else samples
    for sample, answer in zip(questions, answers, strict=True):
        if out is None:
            print(f"Q: {sample.question}\nA: {answer}\n" if arguments.input else answer, flush=True)
            continue
        row = {"QUESTION": sample.question, "CONTEXTS": list(sample.contexts), "ANSWER": answer}
        if sample.answer is not None:
            row["REFERENCE"] = sample.answer
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        out.flush()
    if out is not None:
        out.close()
        print(arguments.output)
    return 0


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("source", help="run directory, export, delta, model directory or Hub id")
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--question", help="one question")
    questions.add_argument("--input", help="file or Hub data set of questions")
    parser.add_argument("--context", action="append", default=[], help="context of --question; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON lines file for the answers; default: print them")
    parser.add_argument("--split", help="split of a Hub data set; default: its only one, or train")
    parser.add_argument("--limit", type=flags.positive_int, help="answer the first so many questions only")
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument(
        "--temperature", type=flags.temperature, default=0.0, help="0 is greedy and repeatable; default: 0"
    )
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    if arguments.context and arguments.input:
        parser.error("--context goes with --question; the rows of --input have contexts of their own")
    if arguments.split and not arguments.input:
        parser.error("--split goes with --input")
    if arguments.limit and not arguments.input:
        parser.error("--limit goes with --input")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    return arguments

"""Answer questions with a run, an export, a delta or any model.

    python launch/generate.py runs/quickstart --question "…" --context "…"
    python launch/generate.py runs/quickstart --input questions.jsonl --output answers.jsonl

The input has the columns of the run's task, as QUESTION and CONTEXTS, or a conversation, in any format that training
reads; the output is JSON lines with QUESTION, CONTEXTS, ANSWER, and REFERENCE where the input has an answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.data.sources import Source
    from toolkit.inference.open_model import OpenedModel
    from toolkit.models.load import Dtype
    from toolkit.tasks.sample import Sample


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
        source: run directory, checkpoint, export, delta, peft adapter, model directory, Hub id or bundled name.
        questions: rows with the task's columns, as in ``{"QUESTION": …, "CONTEXTS": […]}``; a string is a question
            without contexts.
        max_new_tokens: longest answer in tokens.
        temperature: sampling temperature; 0 decodes greedily, which is repeatable.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of a run, delta or adapter, if it moved.
        trust_remote_code: run code that ships with the model; with the base of a run or delta, if that was trained so.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.

    Raises:
        DataError: questions are empty or longer than the model's context; the message names each row.
        UsageError: ``source`` cannot be opened.
    """
    from toolkit.data.questions import from_prompt, questions_of
    from toolkit.data.sources import Row
    from toolkit.inference.open_model import data_settings, open_model

    items = [questions] if isinstance(questions, str | Mapping) else questions
    data, rendering = data_settings(str(source))
    samples = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, str):
            samples.append(from_prompt(item, (), data, rendering, f"question {number}"))
        else:
            samples += questions_of([Row(f"question {number}", item)], data, rendering)
    opened = open_model(str(source), step, base, trust_remote_code, dtype)
    return list(_generate_answers(opened, samples, max_new_tokens, temperature))


def _generate_answers(
    opened: OpenedModel, samples: Iterable[Sample], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    """Move the model to the GPU, if there is one, and yield the answer to each sample."""
    from toolkit.inference.generation import answers
    from toolkit.models.float32_gradients import use_faster_forward
    from toolkit.runtime.distributed import World

    device = World().device
    use_faster_forward(opened.loaded.model.to(device), device)
    max_length = opened.config.data.max_length
    return answers(opened.loaded, samples, max_length, max_new_tokens, temperature, opened.rendering)


def _with_answers(
    opened: OpenedModel, samples: Iterable[Sample], max_new_tokens: int, temperature: float
) -> Iterator[tuple[Sample, str]]:
    """Yield each sample with its answer; no more are held than are being answered."""
    asked: deque[Sample] = deque()

    def ask() -> Iterator[Sample]:
        for sample in samples:
            asked.append(sample)
            yield sample

    for answer in _generate_answers(opened, ask(), max_new_tokens, temperature):
        yield asked.popleft(), answer


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then answer, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = _parse(words, program)
    from toolkit.data.questions import Questions, from_prompt
    from toolkit.data.sources import iter_rows
    from toolkit.inference.open_model import data_settings, open_model
    from toolkit.runtime.paths import make_parent
    from toolkit.runtime.progress_bar import track

    if arguments.output:
        make_parent(arguments.output)
    data, rendering = data_settings(arguments.source, arguments.input)
    samples: Questions | list[Sample]
    if arguments.input:
        rows = _source(arguments)
        samples = Questions(lambda: iter_rows(rows), data, rendering, arguments.limit)
        if arguments.output and arguments.output.exists() and any(map(arguments.output.samefile, rows.files)):
            samples = list(samples)  # the answers take their place
    else:
        samples = [from_prompt(arguments.question, arguments.context, data, rendering)]
    opened = open_model(arguments.source, arguments.step, arguments.base, arguments.trust_remote_code, arguments.dtype)
    answered = _with_answers(opened, samples, arguments.max_new_tokens, arguments.temperature)
    out = arguments.output.open("w", encoding="utf-8") if arguments.output else None
    if out or not sys.stdout.isatty():
        answered = track(answered, "answering", "question", len(samples))
    for sample, answer in answered:
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


def _source(arguments: argparse.Namespace) -> Source:
    """Return the rows that the command line names."""
    from toolkit.data.sources import ReadOptions, Source

    options = ReadOptions.of(arguments.encoding, arguments.separator, arguments.sheet)
    return Source(arguments.input, arguments.split, arguments.name, arguments.revision, options=options, key="--split")


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.config import flags

    parser = verb_parser(__doc__, program)
    parser.add_argument("source", help="run directory, export, delta, peft adapter, model directory or Hub id")
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--question", help="one question")
    questions.add_argument("--input", help="file, directory, pattern or Hub data set of questions")
    parser.add_argument("--context", action="append", default=[], help="context of --question; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON lines file for the answers; default: print them")
    flags.add_source_flags(parser)
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
    for key in ("split", "name", "revision", "encoding", "separator", "sheet"):
        if getattr(arguments, key) and not arguments.input:
            parser.error(f"--{key} goes with --input")
    if arguments.limit and not arguments.input:
        parser.error("--limit goes with --input")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    return arguments

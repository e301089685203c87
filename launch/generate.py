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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from toolkit.runtime.environment import require_packages

require_packages(ROOT)

from toolkit.commands.cli import run_command
from toolkit.config import flags


def _parse() -> argparse.Namespace:
    parser = flags.parser(__doc__ or "")
    parser.add_argument("source", help="run directory, export, delta, model directory or Hub id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", help="one question")
    asked.add_argument("--input", help="file or Hub data set of questions")
    parser.add_argument("--context", action="append", default=[], help="context of --question; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON lines file for the answers; default: print them")
    parser.add_argument("--split", help="split of a Hub data set; default: its only one, or train")
    parser.add_argument("--limit", type=flags.positive, help="answer the first so many questions only")
    parser.add_argument(
        "--max-new-tokens", type=flags.positive, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument(
        "--temperature", type=flags.temperature, default=0.0, help="0 is greedy and repeatable; default: 0"
    )
    flags.add_opening(parser, "precision to compute in; default: the run's, or that in which a model is stored")
    arguments = parser.parse_args()
    if arguments.context and arguments.input:
        parser.error("--context goes with --question; the rows of --input have contexts of their own")
    if arguments.split and not arguments.input:
        parser.error("--split goes with --input")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    return arguments


def main() -> int:
    """Parse the command line, then answer."""
    arguments = _parse()
    from toolkit.data.questions import from_prompt, read_questions
    from toolkit.inference.generation import answers
    from toolkit.inference.open_model import open_model
    from toolkit.runtime.distributed import World
    from toolkit.runtime.paths import make_parent
    from toolkit.runtime.progress_bar import track

    if arguments.output:
        make_parent(arguments.output)
    questions = (
        read_questions(arguments.input, arguments.split)[: arguments.limit]
        if arguments.input
        else [from_prompt(arguments.question, arguments.context)]
    )
    opened = open_model(arguments.source, arguments.step, arguments.base, arguments.trust_remote_code, arguments.dtype)
    opened.loaded.model.to(World().device)
    given = answers(
        opened.loaded,
        questions,
        opened.config.data.max_length,
        arguments.max_new_tokens,
        arguments.temperature,
        opened.rendering,
    )
    out = arguments.output.open("w", encoding="utf-8") if arguments.output else None
    shown = track(questions, "answering", "question") if out or not sys.stdout.isatty() else questions
    for question, answer in zip(shown, given, strict=True):
        if out is None:
            print(f"Q: {question.question}\nA: {answer}\n" if arguments.input else answer, flush=True)
            continue
        row = {"QUESTION": question.question, "CONTEXTS": list(question.contexts), "ANSWER": answer}
        if question.answer is not None:
            row["REFERENCE"] = question.answer
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        out.flush()
    if out is not None:
        out.close()
        print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

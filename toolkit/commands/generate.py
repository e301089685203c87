"""Answer questions with a run, an export, a delta or any model.

    python launch/generate.py runs/quickstart                                  # a conversation in the terminal
    python launch/generate.py runs/quickstart --question "…" --context "…"
    python launch/generate.py runs/quickstart --input questions.jsonl --output answers.jsonl
    python launch/generate.py runs/triage runs/coding --input notes.jsonl --output answers.jsonl

The input has the columns of the run's task, as QUESTION and CONTEXTS, or a conversation, in any format that training
reads. The output is JSON lines with the columns of the input, QUESTION, CONTEXTS, ANSWER, and REFERENCE where the input
has an answer. It appears when all is answered; the same command goes on after an interruption. Several ranks, as under
torchrun or deepspeed, divide the questions, and the model too by --ds ds_configs/zero3.json.

Several runs over one base answer each row by the task of each, in columns ANSWER_NAME by the names of their
directories: the base is loaded once, and what their prompts begin with alike passes its frozen blocks once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands.cli import verb_parser

if TYPE_CHECKING:
    from toolkit.checkpoint.choice import Step
    from toolkit.models.load import Dtype


def generate(
    source: str | Path,
    questions: Iterable[str | Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    batch_size: int = 8,
    constrain: bool = False,
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
        temperature: sampling temperature; 0 decodes greedily.
        top_p: with a temperature, draw from the likeliest tokens whose probabilities add up to this.
        seed: seed of the draws: the same gives the same answers, whatever the batch size.
        batch_size: most questions that are answered together.
        constrain: let an answer be nothing but one of the task's labels or the row's options, or JSON by its schema.
        step: checkpoint of a run, by its number or as ``latest`` or ``best``. Defaults to the latest.
        base: new path of the base model of a run, delta or adapter, if it moved.
        trust_remote_code: run code that ships with the model; with the base of a run or delta, if that was trained so.
        dtype: precision of the computation. Defaults to the run's, or to that in which a model is stored.

    Raises:
        DataError: questions are empty or longer than the model's context; the message names each row.
        UsageError: ``source`` cannot be opened, or ``constrain`` is set and the task's answers are free text.
    """
    from toolkit.commands.answers import make_answerer
    from toolkit.data.questions import from_prompt, questions_of
    from toolkit.data.sources import Row
    from toolkit.inference.open_model import data_settings, open_model
    from toolkit.runtime.distributed import World

    items = [questions] if isinstance(questions, str | Mapping) else questions
    data, rendering = data_settings(str(source))
    samples = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, str):
            samples.append(from_prompt(item, (), data, rendering, f"question {number}"))
        else:
            samples += questions_of([Row(f"question {number}", item)], data, rendering)
    opened = open_model(str(source), step, base, trust_remote_code, dtype)
    options = argparse.Namespace(
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p, seed=seed,
        on_bad_row=None, constrain=constrain, ds_config=None,
    )  # fmt: skip
    answerer = make_answerer(opened, options, World())
    answers = [answer for _, answer in answerer.in_order(enumerate(samples)) if answer is not None]
    answerer.report_control_tokens()
    return answers


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Parse the command line, then answer, and return the exit code; see ``cli.verb_parser`` for ``program``."""
    arguments = _parse(words, program)
    from toolkit.commands.answers import answer_question, answer_rows, start_conversation
    from toolkit.runtime.distributed import join_ranks
    from toolkit.runtime.paths import make_parent

    if arguments.output:
        make_parent(arguments.output)
    arguments.ds_config = None
    if arguments.ds:
        from toolkit.engine.deepspeed.inference import read_inference_config
        from toolkit.engine.deepspeed.process_groups import reset_process_groups

        arguments.ds_config = read_inference_config(arguments.ds)  # before a model loads
        reset_process_groups()
    with join_ranks(engine_needs_group=arguments.ds is not None) as world:
        if len(arguments.sources) > 1:
            from toolkit.commands.several_answers import answer_notes

            answer_notes(arguments, world)
        elif arguments.input is not None:
            answer_rows(arguments, world)
        elif arguments.question is not None:
            answer_question(arguments, world)
        else:
            start_conversation(arguments, world)
    return 0


def _parse(words: Sequence[str] | None, program: str | None) -> argparse.Namespace:
    """Parse the command line, and end the process if flags contradict each other."""
    from toolkit.config import flags
    from toolkit.runtime.shipped import find_file

    parser = verb_parser(__doc__, program)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="run directory, export, delta, peft adapter, model directory or Hub id; or several runs over one base",
    )  # fmt: skip
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--question", help="one question; without it and --input: a conversation in the terminal")
    questions.add_argument("--input", help="file, directory, pattern or Hub data set of questions")
    parser.add_argument("--context", action="append", default=[], help="context of --question; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON lines file for the answers; default: print them")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists, or is begun otherwise")
    parser.add_argument("--answer-column", default="ANSWER", help="name of the answers in --output; default: ANSWER")
    flags.add_source_flags(parser)
    parser.add_argument("--limit", type=flags.positive_int, help="answer the first so many questions only")
    parser.add_argument(
        "--on-bad-row", choices=("error", "skip"),
        help="end at rows that cannot be answered, or name them and answer the others; default: error",
    )  # fmt: skip
    _add_generation_flags(parser)
    parser.add_argument(
        "--ds", "--deepspeed", "--deepspeed_config", dest="ds", type=find_file, metavar="FILE",
        help="DeepSpeed JSON of ZeRO stage 3, as ds_configs/zero3.json, by which the ranks divide the model, too",
    )  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    flags.add_open_model_flags(
        parser, "precision to compute in; default: the run's, or that in which a model is stored"
    )
    arguments = parser.parse_args(words)
    arguments.source = arguments.sources[0]
    if len(arguments.sources) > 1:
        _check_several(parser, arguments)
    arguments.batch_size = arguments.batch_size or (8 if len(arguments.sources) == 1 else 1)
    if arguments.input == "":
        parser.error("--input is empty; expected a file, directory, pattern or Hub data set")
    if arguments.answer_column in ("", "QUESTION", "CONTEXTS", "REFERENCE"):
        parser.error(
            f"--answer-column {arguments.answer_column!r} has another meaning in --output; choose another name"
        )
    if arguments.verify and not arguments.input:
        parser.error("--verify goes with --input, whose rows answers are checked against")
    if arguments.context and not arguments.question:
        parser.error("--context goes with --question; the rows of --input have contexts of their own")
    for key in ("split", "name", "revision", "encoding", "separator", "sheet", "limit", "on_bad_row"):
        if getattr(arguments, key) and not arguments.input:
            parser.error(f"--{key.replace('_', '-')} goes with --input")
    if arguments.overwrite and not arguments.output:
        parser.error("--overwrite goes with --output")
    if arguments.output and not (arguments.input or arguments.question is not None):
        parser.error("--output goes with --input or --question")
    if arguments.top_p < 1 and not arguments.temperature:
        parser.error("--top-p goes with a --temperature; without one the likeliest token is taken")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a directory; expected a file")
    return arguments


def _check_several(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the process if flags do not go with several sources."""
    if not arguments.input:
        parser.error("several sources answer the rows of --input; ask a question or begin a conversation with one")
    if arguments.ds:
        parser.error("--ds divides one model among ranks; leave it out with several sources")
    if arguments.verify:
        parser.error("--verify asks one source again; leave it out with several, and check their answers by verify")
    if arguments.dtype:
        parser.error(
            "--dtype goes with one source; several compute as they were trained, over the base as it is loaded"
        )
    if arguments.batch_size is not None:
        parser.error("--batch-size goes with one source; several answer one note after the other")


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how answers are generated."""
    from toolkit.config import flags

    parser.add_argument(
        "--batch-size", type=flags.positive_int,
        help="most questions that a rank answers together, about as long each; default: 8",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=flags.positive_int, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument("--temperature", type=flags.temperature, default=0.0, help="0 is greedy; default: 0")
    parser.add_argument(
        "--top-p", type=flags.probability, default=1.0,
        help="with a temperature: draw from the likeliest tokens whose probabilities add up to this; default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--constrain", action="store_true",
        help="an answer can be nothing but one of the task's labels or the row's options, or JSON by its schema",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="with --input: constrain, check each answer by its task's rules, ask again, then flag what breaks one",
    )  # fmt: skip
    parser.add_argument(
        "--verify-tries", type=flags.positive_int, default=3, help="of --verify: most tries a question; default: 3"
    )
    parser.add_argument(
        "--seed", type=flags.whole_number, default=42, help="of what is drawn at a temperature; default: 42"
    )

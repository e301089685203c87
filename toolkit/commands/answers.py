"""What ``frostline generate`` does: answer one question, the rows of a file, or the messages of a conversation."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from toolkit.checkpoint.choice import Step, choose_checkpoint
from toolkit.clinical import RESEARCH_USE
from toolkit.clinical.dictionary import Dictionary
from toolkit.clinical.verification import Check, find_check
from toolkit.commands.conversation import converse
from toolkit.data.model_limits import position_limit
from toolkit.data.questions import Question, Questions, from_prompt
from toolkit.data.retrieval import dictionary_of
from toolkit.data.sources import ReadOptions, Source, iter_rows
from toolkit.engine.deepspeed.inference import PartitionedModel
from toolkit.inference.answer_file import AnswerFile
from toolkit.inference.answering import Answerer, QuestionError
from toolkit.inference.chat import Chat
from toolkit.inference.constrained import require_format
from toolkit.inference.open_model import OpenedModel, data_settings, open_model
from toolkit.inference.sampling import Sampling
from toolkit.inference.verified import CheckedAnswer, checked_batches
from toolkit.models.float32_gradients import use_faster_forward
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.printable import printable
from toolkit.runtime.progress_bar import ProgressBar

log = logging.getLogger("frostline")


def make_answerer(
    opened: OpenedModel, options: argparse.Namespace, world: World, max_length: int | None = None
) -> Answerer:
    """Move the model to the rank's GPU, if there is one, or divide it as ``--ds`` says; return what answers with it."""
    model = opened.loaded.model.eval()
    use_faster_forward(model, world.device)
    partitioned = None
    if options.ds_config is None:
        model.to(world.device)
    else:
        partitioned = PartitionedModel(model, world, options.ds_config)
    return Answerer(
        opened.loaded, max_length or opened.config.data.max_length, options.max_new_tokens, options.batch_size,
        Sampling(options.temperature, options.top_p, options.seed), opened.rendering, world,
        options.on_bad_row == "skip", options.constrain, partitioned,
    )  # fmt: skip


def start_conversation(arguments: argparse.Namespace, world: World) -> None:
    """Answer messages, each after those before it."""
    if world.size > 1:
        raise UsageError("a conversation is with one process; several ranks divide the rows of --input")
    opened = _open_model(arguments, world)
    longest, positions = opened.config.data.max_length, position_limit(opened.loaded.model)
    if positions is not None:  # a long conversation is to leave room for an answer
        longest = min(longest, max(positions - arguments.max_new_tokens, positions // 2))
    converse(Chat(make_answerer(opened, arguments, world, longest), opened.config.data))


def answer_question(arguments: argparse.Namespace, world: World) -> None:
    """Answer ``--question``."""
    sample = from_prompt(arguments.question, arguments.context, *data_settings(arguments.source))
    if arguments.constrain:
        require_format(sample)
    question = Question(0, sample, {})
    with open_answer_file(arguments, world, lambda: _model(arguments)) as file:
        if file is not None:
            file.require_same([question])
        answerer = make_answerer(_open_model(arguments, world), arguments, world)
        ((_, answer),) = answerer.in_order([(0, sample)])
        answerer.report_control_tokens()
        if file is not None:
            file.add(question, answer)
            print(file.publish())
        elif world.is_main:
            print(printable(str(answer)), flush=True)


def answer_rows(arguments: argparse.Namespace, world: World) -> None:
    """Answer the rows of ``--input``, of which those in a begun file are left out."""
    source = source_of(arguments)
    with open_answer_file(arguments, world, lambda: _model(arguments)) as file:
        if file is not None:
            require_all_rows_fit(arguments, source)
        data, rendering = data_settings(arguments.source, arguments.input)
        questions = Questions(
            lambda: iter_rows(source), data, rendering, arguments.limit,
            arguments.on_bad_row == "skip", arguments.answer_column if arguments.output else None,
        )  # fmt: skip
        if file is not None:
            file.require_same(questions)
        check = _check_of(arguments, questions, dictionary_of(data) if arguments.verify else None)
        done: frozenset[int] = world.on_main(lambda: frozenset() if file is None else file.rows)
        answerer = make_answerer(_open_model(arguments, world), arguments, world)
        try:
            _take_answers(arguments, world, answerer, questions, done, file, check)
            answerer.report_control_tokens()
        except QuestionError as error:
            raise DataError(f"{error}; --on-bad-row skip leaves such questions out") from None
        if file is not None:
            print(file.publish())


def _take_answers(
    arguments: argparse.Namespace, world: World, answerer: Answerer, questions: Questions, done: frozenset[int],
    file: AnswerFile | None, check: Check | None = None,
) -> None:  # fmt: skip
    """Keep the answers to the questions that are not ``done`` as they are given, or print them in order.

    With a ``check`` they are checked, asked for again, and flagged.
    """
    asked: dict[int, Question] = {}
    flagged = 0

    def ask() -> Iterator[Question]:
        for question in questions:
            if question.row not in done:
                asked[question.row] = question
                yield question

    samples = ((question.row, question.sample) for question in ask())
    if check is not None:
        batches = checked_batches(answerer, ask(), check, arguments.verify_tries)
    elif arguments.output:
        batches = _unchecked(answerer.batches(samples))
    else:
        batches = _unchecked({row: answer} for row, answer in answerer.in_order(samples))
    is_silent = not arguments.output and sys.stdout.isatty()
    with ProgressBar("answering", 0 if is_silent else len(questions), "question", len(done), brief=True) as bar:
        answerer.on_token = lambda tokens: bar.advance(0, token=f"{tokens} of {answerer.max_new_tokens}")
        for batch in batches:
            for row, one in batch.items():
                question = asked.pop(row)
                flagged += bool(one.violations)
                if file is not None:
                    file.add(question, one.answer, one.columns() if check is not None else None)
                elif world.is_main and one.answer is not None and not arguments.output:
                    broken = "".join(f"\n! {violation}" for violation in one.violations)
                    print(printable(f"Q: {question.sample.question}\nA: {one.answer}{broken}\n"), flush=True)
            bar.advance(len(batch))
    if check is not None:
        log.info(
            "%d of %d answers break a rule after %d tries, and are flagged for a person (VERIFIED false). %s",
            flagged, len(questions) - len(done), arguments.verify_tries, RESEARCH_USE["en"],
        )  # fmt: skip


def _unchecked(batches: Iterable[dict[int, str | None]]) -> Iterator[dict[int, CheckedAnswer]]:
    for batch in batches:
        yield {row: CheckedAnswer(answer) for row, answer in batch.items()}


def _check_of(arguments: argparse.Namespace, questions: Questions, dictionary: Dictionary | None) -> Check | None:
    """Return the check that ``--verify`` asks for, and constrain answers to their format where they have one.

    Raises:
        UsageError: the task names no check.
    """
    if not arguments.verify:
        return None
    spec = questions.task.spec
    if spec.verify is None:
        raise UsageError(f"--verify needs a task that names its check (verify: …), and {spec.name} names none")
    arguments.constrain = arguments.constrain or spec.output != "text"
    return find_check(spec.verify, dictionary)


def require_all_rows_fit(arguments: argparse.Namespace, source: Source) -> None:
    """Raise UsageError if the output takes the input's place and would not hold all its rows, or in another form."""
    output = arguments.output
    if not output.exists() or not any(map(output.samefile, source.files)):
        return
    if arguments.limit or arguments.on_bad_row == "skip" or len(source.files) > 1 or output.suffix != ".jsonl":
        raise UsageError(
            f"--output {output} is a file of --input, of which rows would be lost, or their form: only the whole of "
            "one .jsonl file can be replaced by its answers; choose another --output"
        )


def _open_model(arguments: argparse.Namespace, world: World) -> OpenedModel:
    """Open the source that the command line names; of a run the same checkpoint on every rank."""
    is_alone = world.size == 1 and arguments.output is None  # then a run that goes on training may have removed it
    step = arguments.step if is_alone else world.on_main(lambda: _step(arguments))
    return open_model(arguments.source, step, arguments.base, arguments.trust_remote_code, arguments.dtype)


def _step(arguments: argparse.Namespace) -> Step | None:
    """Return the number of a run's checkpoint, which is chosen once; ``--step`` of another source."""
    if (Path(arguments.source) / "config.yaml").is_file():
        arguments.step = choose_checkpoint(Path(arguments.source), arguments.step).step
    step: Step | None = arguments.step
    return step


@contextmanager
def open_answer_file(
    arguments: argparse.Namespace, world: World, models: Callable[[], Mapping[str, object]]
) -> Iterator[AnswerFile | None]:
    """Open the file of ``--output`` on rank 0; None on others, and without one.

    ``models`` gives what tells the models that answer from others: source and step.
    """
    if arguments.output is None or not world.is_main:
        yield None
        return
    names = ("dtype", "split", "name", "revision", "encoding", "separator", "sheet", "max_new_tokens", "temperature",
             "top_p", "seed", "constrain", *(("verify", "verify_tries") if arguments.verify else ()))  # fmt: skip
    settings = {**{name: getattr(arguments, name) for name in names}, **models()}
    settings |= {name: place(getattr(arguments, name)) for name in ("base", "input")}
    with AnswerFile(arguments.output, settings, arguments.answer_column, arguments.overwrite) as file:
        yield file


def _model(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what tells the one model that answers from others."""
    return {"step": _step(arguments), "source": place(arguments.source)}


def place(name: str | None) -> object:
    """Return what tells a model or file from others of its name: where it is, and its files' sizes and times."""
    if name is None or not Path(name).exists():
        return name
    kinds = (".safetensors", ".json", ".jinja", ".py") if (Path(name) / "config.json").is_file() else (".safetensors",)
    files = (path for path in Path(name).glob("*") if path.suffix in kinds and path.is_file())
    return str(Path(name).resolve()), *sorted((path.name, path.stat().st_size, path.stat().st_mtime) for path in files)


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the rows that the command line names."""
    options = ReadOptions.of(arguments.encoding, arguments.separator, arguments.sheet)
    return Source(arguments.input, arguments.split, arguments.name, arguments.revision, options=options, key="--split")

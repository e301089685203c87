"""What ``frostline generate`` does: answer one question, the rows of a file, or the messages of a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from toolkit.checkpoint.choice import Step, choose_checkpoint
from toolkit.commands.conversation import converse
from toolkit.data.model_limits import position_limit
from toolkit.data.questions import Question, Questions, from_prompt
from toolkit.data.sources import ReadOptions, Source, iter_rows
from toolkit.engine.deepspeed.inference import PartitionedModel
from toolkit.inference.answer_file import AnswerFile
from toolkit.inference.answering import Answerer, QuestionError
from toolkit.inference.chat import Chat
from toolkit.inference.constrained import require_format
from toolkit.inference.open_model import OpenedModel, data_settings, open_model
from toolkit.inference.sampling import Sampling
from toolkit.models.float32_gradients import use_faster_forward
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.printable import printable
from toolkit.runtime.progress_bar import ProgressBar
from toolkit.tasks.sample import Sample


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
        questions = Questions(
            lambda: iter_rows(source), *data_settings(arguments.source, arguments.input), arguments.limit,
            arguments.on_bad_row == "skip", arguments.answer_column if arguments.output else None,
        )  # fmt: skip
        if file is not None:
            file.require_same(questions)
        done: frozenset[int] = world.on_main(lambda: frozenset() if file is None else file.rows)
        answerer = make_answerer(_open_model(arguments, world), arguments, world)
        try:
            _take_answers(arguments, world, answerer, questions, done, file)
            answerer.report_control_tokens()
        except QuestionError as error:
            raise DataError(f"{error}; --on-bad-row skip leaves such questions out") from None
        if file is not None:
            print(file.publish())


def _take_answers(
    arguments: argparse.Namespace, world: World, answerer: Answerer, questions: Questions, done: frozenset[int],
    file: AnswerFile | None,
) -> None:  # fmt: skip
    """Keep the answers to the questions that are not ``done`` as they are given, or print them in order."""
    asked: dict[int, Question] = {}

    def ask() -> Iterator[tuple[int, Sample]]:
        for question in questions:
            if question.row not in done:
                asked[question.row] = question
                yield question.row, question.sample

    if arguments.output:
        batches = answerer.batches(ask())
    else:
        batches = ({row: answer} for row, answer in answerer.in_order(ask()))
    is_silent = not arguments.output and sys.stdout.isatty()
    with ProgressBar("answering", 0 if is_silent else len(questions), "question", len(done), brief=True) as bar:
        answerer.on_token = lambda tokens: bar.advance(0, token=f"{tokens} of {answerer.max_new_tokens}")
        for batch in batches:
            for row, answer in batch.items():
                question = asked.pop(row)
                if file is not None:
                    file.add(question, answer)
                elif world.is_main and answer is not None and not arguments.output:
                    print(printable(f"Q: {question.sample.question}\nA: {answer}\n"), flush=True)
            bar.advance(len(batch))


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
             "top_p", "seed", "constrain")  # fmt: skip
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

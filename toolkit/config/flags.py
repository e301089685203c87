"""The command line of a run: one dotted flag per recipe key, made from the schema."""

from __future__ import annotations

import argparse
import math
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.recipe import build_config, did_you_mean, field_paths, merge, parse_yaml, read_recipe
from toolkit.config.schema import RunConfig
from toolkit.config.section import is_none, takes_none, union_members
from toolkit.runtime.errors import ConfigError
from toolkit.runtime.shipped import find_file


@dataclass(frozen=True)
class Invocation:
    """A parsed command line: the validated recipe with its flags, and the files that it came from."""

    config: RunConfig
    recipe: Path
    """The recipe file that was read."""
    recipe_was_given: bool
    """False if ``--config`` was left out, so that the default recipe is used."""
    deepspeed: Path | None
    """DeepSpeed JSON of ``--ds``; None trains with torch alone."""
    arguments: argparse.Namespace
    """All parsed arguments, with those that only one command has."""
    resume_override: bool
    """True if ``--resume-override`` was passed; False for commands without that flag."""
    shared_by: int = 1
    """Runs that read the same rows, this one included: with more than one, even one pass is worth caching."""


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--section.key`` for every recipe key, with its docstring and default as help."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for path, info in field_paths().items():
        section = path.split(".")[0]
        if section not in groups:
            summary = (RunConfig.model_fields[section].annotation.__doc__ or "").strip()
            groups[section] = parser.add_argument_group(section, summary)
        default = "none" if info.default is None else info.default
        members = union_members(info.annotation)
        groups[section].add_argument(
            f"--{path}",
            nargs="+" if takes_list(info.annotation) else None,
            metavar=_metavar(members),
            default=argparse.SUPPRESS,
            help=f"{info.description} Default: {default}.".replace("%", "%%"),
        )


def parse(parser: argparse.ArgumentParser, default_recipe: Path, argv: Sequence[str] | None = None) -> Invocation:
    """Parse a command line with ``--config``, ``--ds``, ``--local_rank`` and a flag for every recipe key.

    ``parser`` has the command's own flags; the others are added here. Without ``argv`` the process's are parsed.

    Raises:
        ConfigError: unknown flags, unknown keys and invalid values, all in one message.
    """
    parser.usage = "%(prog)s [--config FILE] [--ds FILE] [--section.key VALUE ...] [more options, below]"
    parser.add_argument(
        "--config", metavar="FILE", help=f"recipe; default: recipes/{default_recipe.name}, which comes with Frostline"
    )
    parser.add_argument(
        "--ds", "--deepspeed", "--deepspeed_config", dest="ds", metavar="FILE",
        help="DeepSpeed JSON (see ds_configs/); without it torch alone trains",
    )  # fmt: skip
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed by hand"
    )
    _add_recipe_flags(parser)
    arguments, unknown = parser.parse_known_args(argv)
    fields = field_paths()
    faults = [
        f"{word}: unknown flag{did_you_mean(word.split('=')[0].lstrip('-'), fields)}"
        for word in unknown
        if word.startswith("-")
    ]
    faults += [
        f"{word}: stands alone; flags are --section.key VALUE"
        + (f" (did you mean --config {word}?)" if word.endswith((".yaml", ".yml")) else "")
        for before, word in zip(["", *unknown], unknown, strict=False)
        if not word.startswith("-") and (not before.startswith("-") or "=" in before)
    ]
    recipe = find_file(arguments.config or default_recipe)
    flags = {
        key: parse_flag_value(key, fields[key].annotation, text, faults)
        for key, text in vars(arguments).items()
        if key in fields
    }
    source = f"recipe {recipe}" + (" and flags" if flags or unknown else "")
    config = build_config(merge(read_recipe(recipe), flags), source, faults)
    return Invocation(
        config=config,
        recipe=recipe,
        recipe_was_given=bool(arguments.config),
        deepspeed=find_file(arguments.ds) if arguments.ds else None,
        arguments=arguments,
        resume_override=getattr(arguments, "resume_override", False),
        shared_by=getattr(arguments, "shared_by", 1),
    )


def create_parser(description: str) -> argparse.ArgumentParser:
    """Create an argument parser that accepts no abbreviated flags and prints the description as written."""
    return argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_resume_override(parser: argparse.ArgumentParser) -> None:
    """Add ``--resume-override``, which ``Invocation.resume_override`` reads."""
    parser.add_argument(
        "--resume-override", action="store_true",
        help="go on with a run although harmless keys (learning rate, epochs, optimizer …) differ, and say which",
    )  # fmt: skip


def add_shared_by(parser: argparse.ArgumentParser) -> None:
    """Add ``--shared-by``, which ``Invocation.shared_by`` reads."""
    parser.add_argument(
        "--shared-by", type=positive_int, default=1, metavar="RUNS",
        help="runs that read the same rows, this one included: prefix.cache auto counts the passes of all; default: 1",
    )  # fmt: skip


def add_open_model_flags(parser: argparse.ArgumentParser, dtype_help: str) -> None:
    """Add ``--dtype``, ``--step``, ``--base`` and ``--trust-remote-code``, the arguments of ``open_model``."""
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=dtype_help)
    parser.add_argument(
        "--step", type=checkpoint_step, metavar="{N,latest,best}", default=None,
        help="checkpoint of a run: its step, latest, or best, which has the best validation score; default: latest",
    )  # fmt: skip
    parser.add_argument("--base", help="where the base model is, if it moved since training")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that ships with the model; with the base of a run or delta, if that was trained with it",
    )


def add_source_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Add the flags that say how rows are read, which are keys of a recipe's data section: ``--split`` and others."""
    for key, text in {
        "split": "split of a Hub data set, directory or archive; default: its only one, or train",
        "name": "configuration of a Hub data set, or folder of a directory; default: the only one",
        "revision": "branch, tag or commit of a Hub data set; default: main",
        "encoding": "encoding of text files, such as cp949; default: detected",
        "separator": "character between the fields of a CSV file; default: detected",
        "sheet": "sheet of an Excel workbook; default: the first visible one that is not empty",
    }.items():
        parser.add_argument(f"--{prefix}{key}", dest=key, help=text)


def positive_int(text: str) -> int:
    """Parse an integer of at least 1; for ``add_argument(type=…)``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def checkpoint_step(text: str) -> int | str:
    """Parse a checkpoint's step, ``latest`` or ``best``; for ``add_argument(type=…)``."""
    if text in ("latest", "best"):
        return text
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, latest or best") from None


def byte_size(text: str) -> int:
    """Return the bytes of the size given as ``--gpu-memory``, such as 24GiB, 80GB or 512MiB.

    Raises:
        ConfigError: the text is not a size, or the size is zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, flags=re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1))
    if not size:
        raise ConfigError([f"--gpu-memory is {text!r}; expected a size such as 24GiB or 80GB"], "command line")
    return size


def temperature(text: str) -> float:
    """Parse a sampling temperature of at least 0; for ``add_argument(type=…)``."""
    if not (value := _finite(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def probability(text: str) -> float:
    """Parse a number above 0 and up to 1; for ``add_argument(type=…)``."""
    if not 0 < (value := _finite(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def whole_number(text: str) -> int:
    """Parse an integer of at least 0; for ``add_argument(type=…)``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def name_or_mapping(text: str) -> Any:
    """Parse a name, or a mapping as YAML writes it in braces; for ``add_argument(type=…)``."""
    if not text.startswith("{"):
        return text
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {error}") from None


def row_count(text: str) -> int:
    """Parse a number of rows, or ``all``; for ``add_argument(type=…)``."""
    if text == "all":
        return sys.maxsize
    try:
        return whole_number(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def positive_number(text: str) -> float:
    """Parse a number above 0; for ``add_argument(type=…)``."""
    if not (value := _finite(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _finite(text: str) -> float:
    """Return the number that a text is; NaN, which compares with none, if it is none or not finite."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def takes_list(annotation: Any) -> bool:
    """Return whether a key of this type may have several values, so that its flag takes several words."""
    return any(typing.get_origin(member) in (list, tuple) for member in union_members(annotation))


def _metavar(members: list[Any]) -> str:
    """Return how the help shows the value of a flag: the allowed words, or the names of the union's members."""
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            return "{" + ",".join(map(str, typing.get_args(member))) + "}"
    names = [member.__name__ for member in members if member is not type(None) and isinstance(member, type)]
    return "|".join(names).upper() or "VALUE"


def parse_flag_value(key: str, annotation: Any, text: str | list[str], faults: list[str]) -> Any:
    """Return the value of a recipe key's flag, or its text after a fault is appended to ``faults``.

    Of a key that takes a list, ``text`` holds the words, where ``[…]`` and ``{…}`` are read as YAML.
    """
    if (
        isinstance(text, list)
        and len(text) == 1
        and str in union_members(annotation)
        and text[0][:1] + text[0][-1:] not in ("[]", "{}")
    ):
        text = text[0]  # of a key that takes one value or a list
    if isinstance(text, str):
        return None if takes_none(annotation) and is_none(text) else text

    def parse_word(word: str) -> Any:
        try:
            return parse_yaml(word)
        except ValueError as error:
            faults.append(f"--{key}: {word!r} is not valid YAML: {error}")
            return word

    if len(text) == 1 and text[0].startswith("["):
        return parse_word(text[0])
    return [parse_word(word) if word.startswith("{") else word for word in text]

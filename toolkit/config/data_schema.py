"""The ``data`` section of a recipe: which rows are learned from, and how they become tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from toolkit.config.retrieval_schema import RetrievalConfig
from toolkit.config.section import Section, parse_mapping, switch


def _number_if_numeric(value: Any) -> Any:
    """Turn a numeric string such as "0.1" into a float, because flags arrive as strings; keep paths."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", value):
        return float(value)
    return value


def _one_or_several(value: Any) -> Any:
    """Return the item of a list that has one, if it is text: a flag gives every path as a list; a mapping in a list."""
    if isinstance(value, dict):
        return [value]
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _branch(value: Any) -> str:
    """Return the tag of the type that a value is to be checked against, so that a fault is told once."""
    if isinstance(value, list):
        return "constrained-list"
    if isinstance(value, dict | PathEntry):
        return PathEntry.__name__
    return "float" if isinstance(value, int | float) else "str"


def _named_tab(value: Any) -> Any:
    """Turn the name of the tab, as it can be written on a command line, into the character."""
    return "\t" if value in ("tab", r"\t") else value


def _name_or_mapping(value: Any) -> Any:
    """Reject a task that is neither a name nor a mapping."""
    value = parse_mapping(value)
    if not isinstance(value, str | dict) or not value:
        raise ValueError(
            f"{value!r} is no task; expected auto, a name, a task file, or a mapping with name and columns"
        )
    return value


def _own_task(value: Any) -> Any:
    """Check the task of a source, which may have none."""
    return None if value is None else _name_or_mapping(value)


class PathEntry(Section):
    """One of several sources of rows."""

    path: str
    """As data.path: a file, directory, pattern or Hub id."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each training row of this source is taken in an epoch: 2 is twice, 0.5 is a random half of them, the
    same half in each epoch."""

    split: str | None = None
    """Split of this source; none takes data.split."""

    name: str | None = None
    """Configuration of a Hub data set, or folder of a directory; none takes data.name."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set; none takes data.revision."""

    task: Annotated[str | dict[str, Any] | None, BeforeValidator(_own_task)] = None
    """How a row of this source becomes a conversation or text, named as in data.task; none takes data.task."""


_Path = Annotated[str, Tag("str")]
_Entry = Annotated[_Path | Annotated[PathEntry, Tag("PathEntry")], Discriminator(_branch)]
_Entries = Annotated[list[_Entry], Field(min_length=1), Tag("constrained-list")]
Paths = str | list[str | PathEntry]
"""One source of rows, or several."""


class DataConfig(Section):
    """Which rows are learned from, and how they become tokens."""

    path: Annotated[_Path | _Entries, Discriminator(_branch), BeforeValidator(_one_or_several)] = (
        "examples/data/clinical_qa_ko.jsonl"
    )
    """Data set: a file (JSON, CSV, Parquet, Arrow, Excel, text), a directory or pattern of such files, or a Hub id
    (org/name); or a list of these and of {path, weight, split, name, revision, task} (docs/data.md)."""

    split: str | None = None
    """Split of a Hub data set, directory or archive; none takes its only one, or train. Other files have one, train."""

    name: str | None = None
    """Configuration of a Hub data set, such as pqa_labeled, or folder of a directory; none takes the only one."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set; none is main."""

    encoding: str | None = None
    """Encoding of text files, such as cp949; none detects UTF-8, UTF-16 and cp949, and says which."""

    separator: Annotated[str | None, BeforeValidator(_named_tab)] = None
    """Character between the fields of a CSV file; none detects comma, tab, ; and |, and says which."""

    sheet: str | None = None
    """Sheet of an Excel workbook; none takes the first visible one that is not empty."""

    limit: Annotated[int | None, Field(ge=1)] = None
    """Most training rows, drawn at random with train.seed before any is taken more than once; none takes all."""

    oversample: str | None = None
    """Column (or a path such as meta.label) of labels: training rows of rarer labels are taken more often, until each
    label is as frequent as the most frequent one; none takes rows as they are."""

    task: Annotated[str | dict[str, Any], BeforeValidator(_name_or_mapping)] = "auto"
    """How a row becomes a conversation or text: auto goes by the columns; long_answer, messages, sharegpt, alpaca,
    prompt_completion, text or choice; a task file; or a mapping with the name of one and what is otherwise, as in
    {name: long_answer, columns: {question: Q}} (docs/tasks.md)."""

    retrieval: Annotated[RetrievalConfig | None, BeforeValidator(parse_mapping)] = None
    """Passages that are added to each row, as in {corpus: DIR, passages: 5, query: [NOTE]}; the task's column passages
    takes them (docs/grounded-documents.md). none adds none."""

    train_on: Literal["all", "last"] | None = None
    """Which answers of a conversation are learned: all, or the last; none takes the task's, which is all unless a task
    file says otherwise. A message's own train: false or weight: 0 takes it out."""

    chat_template: str | None = None
    """Chat template in place of the model's own: a file, or chatml; none takes the model's. It is saved with the run
    and with what is exported."""

    template_kwargs: Annotated[dict[str, Any], BeforeValidator(parse_mapping)] = Field(default={})
    """Switches of the chat template, as in {enable_thinking: false}, in training and generation and in exports."""

    special_tokens: Literal["text", "parse"] = "text"
    """Control tokens in a row's text, such as the end of a turn: text encodes them as text, parse as the tokens
    themselves, with which a row can end its turn or forge another's."""

    normalize: Annotated[Literal["nfc", "off"], BeforeValidator(switch)] = "nfc"
    """Bring texts into Unicode's composed form, which turns Korean in separate letters (NFD, as macOS writes names)
    into syllables; the log counts such rows. off leaves texts as they are."""

    max_length: Annotated[int, Field(ge=16)] = 2048
    """Longest example in tokens; longer rows lose context, never question or answer."""

    validation: Annotated[
        Annotated[Annotated[float, Tag("float")] | _Path | _Entries, Discriminator(_branch)] | None,
        BeforeValidator(_number_if_numeric),
        BeforeValidator(_one_or_several),
    ] = None
    """Held-out rows: a fraction between 0 and 1 of the data, or rows of their own, named as data.path names them; none
    holds out nothing."""

    validation_split: str | None = None
    """Split of the rows that validation names; none takes their only one, or validation."""

    test: Annotated[
        Annotated[Annotated[float, Tag("float")] | _Path | _Entries, Discriminator(_branch)] | None,
        BeforeValidator(_number_if_numeric),
        BeforeValidator(_one_or_several),
    ] = None
    """Rows for a last report, which nothing is chosen by: a fraction of the data, or rows of their own, named as
    data.path names them. evaluate.py --part test alone computes on them, and they are refused if they are training or
    validation rows too."""

    test_split: str | None = None
    """Split of the rows that test names; none takes their only one, or test."""

    group_by: str | None = None
    """Column (a path such as meta.patient) of what belongs together, as a patient's notes: the rows of one value are
    all trained on, all validation rows or all test rows."""

    stratify_by: str | None = None
    """Column (a path such as meta.label) whose values have the same share on each side of a split that is drawn."""

    folds: Annotated[int, Field(ge=2)] | None = None
    """Train so many runs, into fold-0, fold-1 … of output.dir. Each holds out another part of the data, so that every
    row gets a loss from a run that did not see it (docs/data.md)."""

    fold: Annotated[int, Field(ge=0)] | None = None
    """Train this one of the folds alone, counted from 0, as a job of an array does; none trains all."""

    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used: error stops before training and names it, skip counts and lists it."""

    on_identifier: Literal["warn", "error", "mask"] = "warn"
    """Personal identifiers in the rows, found by patterns (docs/data-check.md): warn counts them, error stops before
    training, mask replaces each by its kind before anything else sees the row. Names are not found."""

    identifier_patterns: list[str] = Field(default=[])
    """Regular expressions of further identifiers, such as a hospital's patient numbers."""

    packing: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = "auto"
    """Lay the rows of a micro batch end to end instead of padding them: the same rows, steps and losses, without the
    cost of padding. auto does so where the model keeps them apart, on stops where it does not, off pads."""

    @model_validator(mode="after")
    def _check_parts(self) -> DataConfig:
        """Check the fractions that are held out, and that each split belongs to a data set; report all faults."""
        faults = []
        for name, part, split in (
            ("validation", self.validation, self.validation_split), ("test", self.test, self.test_split),
        ):  # fmt: skip
            if isinstance(part, float) and not 0 < part < 1:
                faults.append(f"{name} is {part}; as a fraction it lies between 0 and 1")
            if split is not None and not isinstance(part, str | list):
                faults.append(
                    f"{name}_split is {split!r}, but {name} is {part or 'none'}; "
                    "expected the Hub id there that has this split"
                )
            if isinstance(part, list) and any(isinstance(entry, PathEntry) and entry.weight != 1 for entry in part):
                faults.append(f"{name} has a source with a weight; each held-out row counts once, so leave it out")
        if self.separator is not None and len(self.separator) != 1:
            faults.append(f"separator is {self.separator!r}; expected one character, or tab")
        fractions = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if len(fractions) == 2 and not faults and sum(fractions) >= 1:
            faults.append(f"validation {fractions[0]} and test {fractions[1]} leave no row to train on")
        if self.folds is not None and self.test is not None:
            faults.append("folds and test are both set, but the part that a fold holds out is its test; leave out test")
        if self.fold is not None and (self.folds is None or self.fold >= self.folds):
            of = "folds is none" if self.folds is None else f"folds is {self.folds}"
            faults.append(f"fold is {self.fold}, but {of}; expected a number below folds, counted from 0")
        if self.group_by and self.folds is None and self.validation is None and self.test is None:
            faults.append("group_by is set, but nothing is held out; expected validation, test or folds")
        if self.stratify_by and self.folds is None and not fractions:
            faults.append(
                "stratify_by is set, but nothing is drawn; expected folds, or a fraction as validation or test"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @field_validator("identifier_patterns")
    @classmethod
    def _check_patterns(cls, patterns: list[str]) -> list[str]:
        """Check that each pattern is a regular expression that does not match nothing."""
        for pattern in patterns:
            try:
                matches_nothing = re.compile(pattern).match("") is not None
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
            if matches_nothing:
                raise ValueError(f"{pattern!r} matches the empty text; expected a pattern of an identifier")
        return patterns

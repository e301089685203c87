"""What a task file says, checked with the line of each fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import TemplateError, meta
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from toolkit.config import yaml_text
from toolkit.config.section import Section
from toolkit.runtime.errors import ConfigError, DataError
from toolkit.runtime.paths import read_regular
from toolkit.runtime.shipped import find_file
from toolkit.tasks.column_spec import ColumnSpec, as_column
from toolkit.tasks.columns import nearest
from toolkit.tasks.leaks import require_no_leak
from toolkit.tasks.templates import ENVIRONMENT, OWN_VARIABLES

Verify = Literal["sdtm_ae", "triage", "ae_triage", "grounded_document"]
"""Names of the checks of ``toolkit.clinical.verification.CHECKS``."""


class TurnSpec(Section):
    """A turn of the conversation that templates make."""

    role: Literal["system", "user", "assistant"]
    content: str
    """Template of its text; a turn whose text is empty is left out."""
    train: bool = True
    """False leaves an assistant's turn out of what is learned."""


class TagsSpec(Section):
    """Names of a data set's own in its messages, as in LLaMA-Factory's ``tags``."""

    role: str | None = None
    """Key of the role; none takes role or from."""
    content: str | None = None
    """Key of the text; none takes content or value."""
    roles: dict[str, Literal["system", "user", "assistant", "tool", "function_call"]] = Field(default={})
    """Our role by the data set's."""


class OutputSpec(Section):
    """Says what an answer may be."""

    labels: list[str] | None = None
    """The only answers that are allowed."""
    ordered: bool = False
    """True if the labels are in an order, lowest first, so that one beside the right one is better than one far off."""
    json_schema: Annotated[dict[str, Any] | str | None, Field(alias="schema")] = None
    """JSON schema that an answer keeps to, or a file that holds one."""

    @model_validator(mode="after")
    def _check_one(self) -> OutputSpec:
        """Require labels or a schema, and distinct labels."""
        if (self.labels is None) == (self.json_schema is None):
            raise ValueError("expected labels: [...] or schema: {...}")
        if self.ordered and self.labels is None:
            raise ValueError("ordered goes with labels; a schema's values have no order")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("labels has the same one twice, or fewer than two; expected different labels")
        return self


class TaskSpec(Section):
    """A task file: how a row becomes a conversation, or plain text, and what of it is learned."""

    name: str = "task"
    """Name for messages."""
    summary: str = ""
    """What the task is for."""
    columns: dict[str, Annotated[ColumnSpec, BeforeValidator(as_column)]]
    """Values of a row, by the name that templates use."""
    conversation: str | None = None
    """Column of kind messages that is the whole conversation."""
    text: str | None = None
    """Template of plain text, all of which is learned."""
    system: str | None = None
    """Template of the system prompt; for a conversation, where it has none of its own."""
    prompt: str | None = None
    """Template of what the user asks."""
    target: str | None = None
    """Template of the answer."""
    turns: list[TurnSpec] | None = None
    """Turns of the conversation, in place of system, prompt and target."""
    history: str | None = None
    """Column of kind pairs: earlier questions and answers, before prompt."""
    tools: str | None = None
    """Column that holds the functions which the assistant may call."""
    message_tools: str | None = None
    """As tools, but only of rows whose prompt and target are messages: texts are then rendered without."""
    cut: str | None = None
    """Column of kind texts that is cut where a row is too long."""
    output: Literal["text"] | OutputSpec = "text"
    """What an answer may be: any text, one of a list of labels, or JSON by a schema."""
    first_number: int | None = None
    """Number of the first option, in rows that give answers as numbers: 1 where nothing is said. Then an answer that is
    also the text of another option is a bad row."""
    primary_metric: str | None = None
    """Metric by which models are compared, declared before any is seen; None is accuracy for labels and options,
    exact_match for JSON, loss for text. The others are corrected for their number."""
    public_source: str | None = None
    """Public texts that the rows come from, such as PubMed: a base model may have seen them, which evaluation says."""
    verify: Verify | None = None
    """Name of the check that generated answers go through (``toolkit.clinical.verification.CHECKS``)."""
    leaks: list[str] = Field(default=[])
    """Columns of the rows that give the outcome away; what is asked may not use them (``toolkit.tasks.leaks``)."""
    train_on: Literal["all", "last"] = "all"
    """Answers of a conversation that are learned; data.train_on overrides it."""
    tags: TagsSpec = TagsSpec()
    """Names in the messages of a conversation."""

    @model_validator(mode="after")
    def _check_form(self) -> TaskSpec:
        """Require one way of making turns, and columns for what is named."""
        forms = [name for name in ("conversation", "text", "prompt", "turns") if getattr(self, name) is not None]
        if len(forms) != 1:
            found = " and ".join(forms) or "none"
            raise ValueError(f"expected one of conversation, text, prompt (with target) or turns; it has {found}")
        if (self.prompt is None) != (self.target is None):
            raise ValueError("expected prompt and target together")
        if self.turns is not None and self.turns[-1].role != "assistant":
            raise ValueError("turns ends with another than the assistant's; expected the answer last")
        kinds = {"conversation": "messages", "history": "pairs", "cut": "texts"}
        for key in (*kinds, "tools", "message_tools"):
            name = getattr(self, key)
            if name is not None and name not in self.columns:
                raise ValueError(f"{key} is {name}, which is no column; expected one of {', '.join(self.columns)}")
            if name is not None and key in kinds and self.columns[name].kind != kinds[key]:
                raise ValueError(f"{key} is {name}, of kind {self.columns[name].kind}; expected kind {kinds[key]}")
        for name, source in self.templates():
            _check_template(name, source, self.columns)
        require_no_leak({name: column.path for name, column in self.columns.items()}, self._askers(), self.leaks)
        return self

    def templates(self) -> list[tuple[str, str]]:
        """Return the templates, each with its key."""
        named = [(key, getattr(self, key)) for key in ("text", "system", "prompt", "target")]
        named += [(f"turns.{number}.content", turn.content) for number, turn in enumerate(self.turns or ())]
        return [(key, source) for key, source in named if source is not None]

    def _askers(self) -> dict[str, set[str]]:
        """Return the columns that each part of the question uses, by that part's key."""
        answer = "target" if self.turns is None else f"turns.{len(self.turns) - 1}.content"
        users = {key: used_variables(source) for key, source in self.templates() if key != answer}
        keys = ("conversation", "history", "tools", "message_tools", "cut")
        users |= {key: {getattr(self, key)} for key in keys if getattr(self, key) is not None}
        return users | {"the list of options": {name for name, one in self.columns.items() if one.kind == "options"}}

    @property
    def all_turns(self) -> tuple[TurnSpec, ...]:
        """Return the templates of all turns; none for a conversation column or plain text."""
        if self.turns is not None:
            return tuple(self.turns)
        if self.prompt is None or self.target is None:
            return ()
        system = [] if self.system is None else [TurnSpec(role="system", content=self.system)]
        return (
            *system, TurnSpec(role="user", content=self.prompt), TurnSpec(role="assistant", content=self.target),
        )  # fmt: skip

    def variables(self, with_answer: bool) -> set[str]:
        """Return what the templates and keys use, with or without the answer's."""
        turns = self.all_turns if with_answer else self.all_turns[:-1]
        sources = [turn.content for turn in turns] + [one for one in (self.text, self.system) if one is not None]
        used = {name for source in sources for name in used_variables(source)}
        return used | {name for name in (self.conversation, self.history, self.tools) if name is not None}


def used_variables(source: str) -> set[str]:
    """Return the variables that a template uses.

    Raises:
        jinja2.TemplateError: it is not valid.
    """
    return set(meta.find_undeclared_variables(ENVIRONMENT.parse(source)))


def _check_template(key: str, source: str, columns: Mapping[str, ColumnSpec]) -> None:
    """Raise ValueError if a template is not valid, or uses a variable that is no column."""
    try:
        used = used_variables(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(
            f"{key} is no valid template{f' (its line {line})' if line else ''}: {error.message}"
        ) from None
    for name in sorted(used - set(columns) - OWN_VARIABLES):
        near = nearest(name, columns)
        raise ValueError(
            f"{key} uses {name}, which is no column; expected one of {', '.join(columns)}"
            + (f" (did you mean {near}?)" if near else "")
        )


def read_task_file(path: str, key: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a task file, which ``key`` names; return its values, and the line of each of its keys by that one's path.

    Raises:
        DataError: there is no such file.
        ConfigError: it is not YAML, or not a mapping.
    """
    file = find_file(path)
    try:
        text = read_regular(Path(file), yaml_text.MOST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{key} is {path}, which cannot be read ({error})") from None
    try:
        node, values = yaml_text.compose(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([" ".join(str(error).split())[:300]], f"task file {path}") from None
    if not isinstance(values, dict):
        raise ConfigError(["line 1: expected a mapping with columns, prompt and target"], f"task file {path}")
    lines: dict[tuple[str, ...], int] = {}
    _note_lines(node, (), lines)
    return values, lines


def _note_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    """Note the line of each key and item below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, str(key.value))] = key.start_mark.line + 1
            _note_lines(value, (*path, str(key.value)), lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, str(number))] = value.start_mark.line + 1
            _note_lines(value, (*path, str(number)), lines)


def check_spec(values: Mapping[str, Any], source: str, lines: Mapping[tuple[str, ...], int]) -> TaskSpec:
    """Validate the values of a task file.

    Raises:
        ConfigError: lists all faults, each with its line where the values come from a file.
    """
    try:
        return TaskSpec.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        if any("OutputSpec" in str(fault["loc"]) for fault in found if isinstance(fault["input"], bool)):
            found = [fault for fault in found if fault["type"] != "literal_error"]  # of output, which may be 'text'
        faults = [_fault_text(fault, lines) for fault in found]
        raise ConfigError(list(dict.fromkeys(faults)), source) from None


def _fault_text(fault: Any, lines: Mapping[tuple[str, ...], int]) -> str:
    """Return a fault as one line of text, with the line of the key that it is about."""
    path = tuple(str(part) for part in fault["loc"] if "OutputSpec" not in str(part) and part != "literal['text']")
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    own_key = message.split(" ")[0].split(".")  # of a fault that concerns several keys, the one that it begins with
    where = path or (tuple(own_key) if tuple(own_key) in lines else ())
    while where and where not in lines:
        where = where[:-1]
    at = f"line {lines[where]}: " if where in lines else ""
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = nearest(path[-1], [*TaskSpec.model_fields, *ColumnSpec.model_fields, *TurnSpec.model_fields])
        return f"{at}{name}: unknown key{f' (did you mean {near}?)' if near else ''}"
    if isinstance(fault["input"], bool) and fault["type"] == "string_type":
        return f"{at}{name} is {json.dumps(fault['input'])}, as YAML reads yes, no, on and off; put it in quotes"
    if fault["type"] == "missing":
        return f"{at}{name} is missing"
    if fault["type"] == "value_error":
        return f"{at}{f'{name}: ' if name else ''}{message}"
    return f"{at}{name} is {json.dumps(fault['input'], default=str, ensure_ascii=False)[:80]}; expected {message}"

"""Red flags: rules, as data, that make a patient's report at least as urgent as they say, whatever a model answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from toolkit.clinical.negation import is_denied
from toolkit.config import yaml_text
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import read_regular

OWN_RULES = Path(__file__).with_name("red_flags.yaml")
"""The rules that come with Frostline; they show what rules look like, and nobody has validated them."""


@dataclass(frozen=True)
class RedFlag:
    """A rule that a report meets, or would meet if it did not deny it."""

    rule: str
    """Id of the rule."""
    name: str
    """What it looks for."""
    at_least: int
    """Number of the class, from the least urgent."""
    words: tuple[str, ...]
    """The words of the report that meet it, one for each group."""


@dataclass(frozen=True)
class _Rule:
    id: str
    at_least: int
    names: Mapping[str, str]
    groups: tuple[tuple[re.Pattern[str], ...], ...]

    def found(self, text: str, language: str) -> tuple[RedFlag | None, RedFlag | None]:
        """Return what meets the rule in a text, and what would if the text did not deny it; the former goes first."""
        name = self.names.get(language, next(iter(self.names.values()), self.id))
        asserted, mentioned = list[str](), list[str]()
        for group in self.groups:
            every = list(_mentions(group, text))
            held = next((words for words, denied in every if not denied), None)
            mentioned += [every[0][0]] if every else []
            asserted += [held] if held is not None else []
        count = len(self.groups)
        if len(asserted) == count:
            return RedFlag(self.id, name, self.at_least, tuple(asserted)), None
        return None, RedFlag(self.id, name, self.at_least, tuple(mentioned)) if len(mentioned) == count else None


@dataclass(frozen=True)
class RedFlags:
    """Rules, and the classes that they speak of."""

    classes: tuple[tuple[str, ...], ...]
    """Names of each class, from the least urgent: its key, then those in each language."""
    rules: tuple[_Rule, ...] = field(repr=False)

    def number(self, label: str) -> int | None:
        """Return the number of the class that a label names; None if it is none."""
        wanted = label.strip().casefold()
        return next((n for n, names in enumerate(self.classes) if wanted in map(str.casefold, names)), None)

    def find(self, text: str, language: str = "en") -> tuple[list[RedFlag], list[RedFlag]]:
        """Return the rules that a report meets, the most urgent first, and those whose words it denies."""
        pairs = [rule.found(text, language) for rule in self.rules]
        met = [flag for flag, _ in pairs if flag is not None]
        return sorted(met, key=lambda flag: -flag.at_least), [flag for _, flag in pairs if flag is not None]


@cache
def read_red_flags(path: Path = OWN_RULES) -> RedFlags:
    """Read rules from a YAML file of the form of ``red_flags.yaml``.

    Raises:
        DataError: it cannot be read, or a rule lacks a key, names no class, or holds no regular expression.
    """
    try:
        values = yaml_text.load(read_regular(path, yaml_text.MOST_BYTES))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"rules {path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, Mapping) or not isinstance(values.get("classes"), Mapping):
        raise DataError(f"rules {path} have no classes; expected the keys classes and rules, as in {OWN_RULES.name}")
    classes = {str(key): (str(key), *map(str, (names or {}).values())) for key, names in values["classes"].items()}
    rules = tuple(_rule(one, number, list(classes), path) for number, one in enumerate(values.get("rules") or (), 1))
    if len({rule.id for rule in rules}) < len(rules):
        raise DataError(f"rules {path} have an id twice; give each rule one of its own")
    return RedFlags(tuple(classes.values()), rules)


def _rule(values: Any, number: int, classes: list[str], path: Path) -> _Rule:
    """Read one rule, the one of this number from 1."""
    if not isinstance(values, Mapping) or not {"id", "at_least", "all"} <= values.keys():
        raise DataError(f"rules {path}: rule {number} lacks a key; expected id, at_least, name and all")
    of = f"rules {path}: {values['id']}"
    if values["at_least"] not in classes:
        raise DataError(f"{of} has at_least {values['at_least']}; expected one of {', '.join(classes)}")
    groups = values["all"]
    is_form = isinstance(groups, list) and groups and all(isinstance(group, list) and group for group in groups)
    if not is_form:
        raise DataError(f"{of} has no groups of words in all; expected a list of lists of regular expressions")
    compiled = tuple(tuple(_pattern(str(one), of) for one in group) for group in groups)
    names = values.get("name") or {}
    names = names if isinstance(names, Mapping) else {"en": str(names)}
    return _Rule(str(values["id"]), classes.index(values["at_least"]), names, compiled)


def _pattern(text: str, of: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise DataError(f"{of} has {text!r}, which is no regular expression ({error})") from None
    if pattern.match("") is not None:
        raise DataError(f"{of} has {text!r}, which matches the empty text; expected words")
    return pattern


def _mentions(group: tuple[re.Pattern[str], ...], text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words of a text that one of the patterns finds, and whether they are denied."""
    for pattern in group:
        own = any(sign in pattern.pattern for sign in ("안\\s", "못", "없", "않", "n(?:", "not", "unable"))
        for match in pattern.finditer(text):
            yield match.group(), is_denied(text, match.start(), match.end(), own)

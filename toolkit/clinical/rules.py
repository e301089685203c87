"""Check records of adverse events by rules that are data (``rules.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from toolkit.clinical.codelists import values_of
from toolkit.clinical.context import NOTHING_KNOWN, Context, Record, value
from toolkit.clinical.dates import parse_partial
from toolkit.clinical.records import CRITERIA
from toolkit.clinical.rule_checks import CHECKS
from toolkit.clinical.verification import Violation
from toolkit.config import yaml_text


@dataclass(frozen=True)
class Rule:
    """A rule of ``rules.yaml``."""

    id: str
    source: str
    """Publication that it restates, with its number in the open rules; Frostline for the project's own."""
    message: str
    field: str = ""
    when: Sequence[Mapping[str, Any]] = ()
    require: Sequence[Mapping[str, Any]] = ()
    absent: str | None = None
    check: str | None = None

    def breaks(self, record: Record) -> bool:
        """Return whether a record breaks the rule's conditions."""
        return all(holds(one, record) for one in self.when) and not all(holds(one, record) for one in self.require)


@cache
def rules() -> tuple[Rule, ...]:
    """Return all rules, in their order."""
    content = yaml_text.load((Path(__file__).parent / "rules.yaml").read_text(encoding="utf-8"))
    return tuple(_rule(values, content["sources"]) for values in content["rules"])


def _rule(values: Mapping[str, Any], sources: Mapping[str, str]) -> Rule:
    own = dict(values)
    core = own.pop("core", None)
    source = sources[own.pop("source")] + (f" ({core})" if core else "")
    if own.pop("yes_no", False):
        own["require"] = [{"field": own["field"], "in": ["Y", "N"], "or_empty": True}]
    return Rule(**own, source=source)


def check_records(
    records: Sequence[Record], contexts: Context | Sequence[Context] = NOTHING_KNOWN,
    rows: Sequence[int | str] | None = None, only: Sequence[str] | None = None,
) -> list[Violation]:  # fmt: skip
    """Return what some records break, by record and then by rule.

    Args:
        records: under SDTM's names (``records.to_sdtm``); a field that is there and empty counts for ``absent`` alone.
        contexts: of all records, or of each.
        rows: name of each record for messages; by default its number from 1.
        only: ids of the rules to apply; by default all.
    """
    names = list(range(1, len(records) + 1)) if rows is None else list(rows)
    of_records = [contexts] * len(records) if isinstance(contexts, Context) else list(contexts)
    found: list[tuple[int, int, Violation]] = []
    for order, rule in enumerate(one for one in rules() if only is None or one.id in only):
        if rule.absent is not None:
            places = [(at, rule.absent) for at, record in enumerate(records) if rule.absent in record][:1]
        elif rule.check is not None:
            places = CHECKS[rule.check](records, of_records)
        else:
            places = [(at, rule.field) for at, record in enumerate(records) if rule.breaks(record)]
        for at, name in places:
            value = str(records[at].get(name, ""))
            found.append((at, order, Violation(names[at], name, rule.id, value, rule.message)))
    return [violation for _, _, violation in sorted(found, key=lambda one: one[:2])]


def holds(condition: Mapping[str, Any], record: Record) -> bool:
    """Return whether a record meets a condition of ``rules.yaml``."""
    if "any_criterion" in condition:
        return any(value(record, name) == condition["any_criterion"] for name in CRITERIA)
    if "no_criterion" in condition:
        return all(value(record, name) != condition["no_criterion"] for name in CRITERIA)
    if "any" in condition:
        return any(holds(one, record) for one in condition["any"])
    if "all" in condition:
        return all(holds(one, record) for one in condition["all"])
    if "not_after" in condition:
        first, last = (parse_partial(value(record, name)) for name in condition["not_after"])
        return not first.is_after(last)
    found = value(record, condition["field"])
    if not found and ("empty" in condition or condition.get("or_empty")):
        return bool(condition.get("empty", True))
    if "empty" in condition:
        return not condition["empty"]
    if "in" in condition:
        return found in condition["in"]
    if "not_in" in condition:
        return found not in condition["not_in"]
    if "codelist" in condition:
        return found in values_of(condition["codelist"])
    return _is_date(found)


def _is_date(text: str) -> bool:
    """Return whether a text is a date of SDTM; of an interval, both its ends."""
    try:
        for part in text.split("/"):
            parse_partial(part)
    except ValueError:
        return False
    return bool(text)

"""Decide on a patient's report: the model's class, none where it is unsure, and red flags, which override both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from toolkit.clinical import RESEARCH_USE
from toolkit.clinical.red_flags import RedFlag, RedFlags, read_red_flags
from toolkit.clinical.verification import Violation
from toolkit.runtime.errors import DataError

ABSTAIN = {"ko": "판단 보류", "en": "abstain"}
"""What stands in place of a class where the model is unsure: a person decides. By language."""
DecidedBy = Literal["model", "rule", "nobody"]
_QUOTE = re.compile("“([^”]*)”")


@dataclass(frozen=True)
class TriageDecision:
    """States what is to be done with a report, who said so, and why."""

    label: str
    """The class, or ``ABSTAIN``."""
    decided_by: DecidedBy
    model_label: str
    """The likeliest class by the model alone."""
    confidence: float
    """Its probability among the classes."""
    red_flags: tuple[RedFlag, ...]
    """Rules that the report meets, the most urgent first."""
    denied: tuple[RedFlag, ...]
    """Rules whose words are in the report and denied there: what a reader of the report may want to check."""

    def as_columns(self, language: str = "en") -> dict[str, Any]:
        """Return the columns of an output row."""
        return {
            "DECISION": self.label, "DECIDED_BY": self.decided_by, "MODEL_CLASS": self.model_label,
            "CONFIDENCE": round(self.confidence, 4), "RED_FLAGS": [_shown(flag) for flag in self.red_flags],
            "DENIED": [_shown(flag) for flag in self.denied],
            "NOTICE": RESEARCH_USE.get(language, RESEARCH_USE["en"]),
        }  # fmt: skip


def decide(
    report: str, labels: Sequence[str], probabilities: Sequence[float], least_confidence: float, language: str = "en",
    rules: RedFlags | None = None,
) -> TriageDecision:  # fmt: skip
    """Decide on a report.

    A rule only ever makes a report more urgent. It decides where it asks for more than the model, and where it asks for
    the most urgent class, however unsure the model is; else an unsure model leaves the report to a person.

    Args:
        report: what the patient wrote.
        labels: classes from the least urgent, each named in ``rules``.
        probabilities: [labels] the model's.
        least_confidence: below it the model abstains.
        language: of names of rules and of the abstention: ko or en.
        rules: red flags. Defaults to those that come with Frostline.

    Raises:
        DataError: a label is none of the rules' classes, or they are in another order there.
    """
    rules = rules or read_red_flags()
    require_classes(labels, rules)
    met, denied = rules.find(report, language)
    top = int(np.argmax(probabilities))
    confidence, at_least = float(probabilities[top]), max((flag.at_least for flag in met), default=0)
    is_sure = confidence >= least_confidence
    by: DecidedBy
    if met and (at_least == len(labels) - 1 or (is_sure and at_least > top)):
        label = labels[at_least]
        by = "model" if is_sure and top >= at_least else "rule"
    else:
        label = labels[top] if is_sure else ABSTAIN.get(language, ABSTAIN["en"])
        by = "model" if is_sure else "nobody"
    return TriageDecision(label, by, labels[top], confidence, tuple(met), tuple(denied))


def decided(
    row: Mapping[str, Any], labels: Sequence[str], probabilities: Sequence[float], answer: str, least_confidence: float,
    rules: RedFlags | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the columns of a report: the decision (``decide``), the model's reason, and what its answer breaks."""
    language = str(row.get("LANGUAGE") or "en")
    report = next((str(row[name]) for name in ("NOTE", "note", "report") if row.get(name)), "")
    decision = decide(report, labels, probabilities, least_confidence, language, rules)
    return {
        **decision.as_columns(language),
        "PROBABILITIES": {label: round(float(p), 4) for label, p in zip(labels, probabilities, strict=True)},
        "MODEL_REASON": answer.strip().partition("\n")[2].strip(),
        "VIOLATIONS": [violation.as_dict() for violation in check_answer(answer, row)],
    }


def require_classes(labels: Sequence[str], rules: RedFlags) -> None:
    """Raise DataError unless a task's labels are the classes of the rules, from the least urgent."""
    if [rules.number(label) for label in labels] != list(range(len(rules.classes))):
        known = ", ".join(" / ".join(names) for names in rules.classes)
        raise DataError(
            f"the task's labels are {', '.join(labels)}, and the red flags have the classes {known}; expected the same "
            "ones in the same order: change the labels, or name rules with these classes"
        )


def check_answer(answer: str, row: Mapping[str, Any]) -> list[Violation]:
    """Return what an answer of the task ``triage`` breaks: a class in the first line, then the reason.

    TR01: the first line is no class. TR02: a red flag of the report asks for a more urgent one. TR03: the reason
    quotes what the report does not say. TR04: it quotes nothing.
    """
    rules, report = read_red_flags(), str(row.get("NOTE") or "")
    first, _, reason = answer.strip().partition("\n")
    number = rules.number(first)
    if number is None:
        expected = ", ".join(" / ".join(names[1:]) for names in rules.classes)
        return [Violation(None, "class", "TR01", first[:60], f"expected one of {expected}")]
    met, _ = rules.find(report, str(row.get("LANGUAGE") or "en"))
    found = [
        Violation(None, "class", "TR02", first, f"{flag.rule} ({flag.name}) asks for more: {', '.join(flag.words)}")
        for flag in met
        if flag.at_least > number
    ]
    quotes = _QUOTE.findall(reason)
    if not quotes:
        found.append(Violation(None, "reason", "TR04", reason.strip()[:60], "expected words of the report in “ ”"))
    wrong = [quote for quote in quotes if not quote.strip() or quote not in report]
    return found + [
        Violation(None, "reason", "TR03", quote, "expected words as the report has them") for quote in wrong
    ]


def _shown(flag: RedFlag) -> dict[str, Any]:
    return {**asdict(flag), "words": list(flag.words)}

"""Tell whether words of a report are denied in it: ``no chest pain``, ``가슴 통증은 없어요``.

Only forms of a short list count as a denial, and only next to the words, because what is denied is looked at no
further: "no relief from chest pain" and "흉통, 식욕 없음" deny no pain. A comma carries a denial on where ``or`` ends
the list, and never in Korean. History ("last year"), other people, conditions ("if I get") and irony are not told
apart from what is so.
"""

from __future__ import annotations

import re

_FILLERS = (
    r"(?:any|more|further|longer|real|new|actual|significant|of|had|have|has|having|been|got|get|getting|feel|feeling"
    r"|felt|notice|noticed|seen|see|a|an|the|my|his|her|this|that|signs?|symptoms?|sort|kind|either|sudden|really|yet)"
)
_CUES = (
    r"(?:no|not|never|without|den(?:y|ies|ied|ying)|neither|nor|negative\s+for|free\s+of|absence\s+of"
    r"|(?:do|does|did|have|has|had|is|was|are|were)n['’]?t)"
)
_ITEM = r"[\w'’-]+(?:\s+[\w'’-]+){0,2}"
_OR = r"(?:\s*,)?\s+(?:or|nor)\s+|\s*/\s*"
_BEFORE = re.compile(rf"\b{_CUES}(?:\s+{_FILLERS})*\s+(?:{_ITEM}(?:{_OR})(?:{_FILLERS}\s+)*)*$", re.IGNORECASE)
_BEFORE_IN_LIST = re.compile(
    rf"\b{_CUES}(?:\s+{_FILLERS})*\s+(?:{_ITEM}(?:\s*,\s*|{_OR})(?:{_FILLERS}\s+)*)*$", re.IGNORECASE
)
_OR_BEFORE = re.compile(r"\s(?:or|nor)\s+$", re.IGNORECASE)
_LIST_GOES_ON = re.compile(rf"^(?:\s*,\s*{_ITEM}){{0,4}}\s*,?\s+(?:or|nor)\s", re.IGNORECASE)
_AFTER = re.compile(r"^\s*(?:[:?=–-]|is|was)\s*(?:no\b|none\b|absent|negative|denied)|^\s*\(-\)", re.IGNORECASE)

_KOREAN_FILLERS = (
    r"(?:\s|[:?=()–-]|전혀|아직|지금|현재|오늘|특별히|따로|별로|다|모두|둘|그런|같은|것|거|건|게|증상|증세|소견|느낌|적|일|정도"
    r"|이나|나|은|는|이|가|도|을|를|의|지|진|한|픈|프지|차지|다는|다거나|생각|마음)*"
)
_KOREAN_ITEMS = (
    rf"(?:{_KOREAN_FILLERS}(?:이나|나|과|와|하고|이랑|랑|도|및|또는|·|/)\s*[가-힣A-Za-z]{{1,8}}(?:\s[가-힣]{{1,6}})?)*"
)
_AFTER_KOREAN = re.compile(
    rf"^{_KOREAN_ITEMS}{_KOREAN_FILLERS}(?:(?<!수\s)(?<!수가\s)없(?!어[졌지진]|애)|않(?!을까|나)|아니(?!야\?|라)|아닌|음성|부인)"
)
_NOT_BEFORE_VERB = re.compile(r"(?:^|\s)안\s")


def is_denied(text: str, start: int, end: int, has_own_negation: bool = False) -> bool:
    """Return whether a report denies its words from ``start`` to ``end``.

    Args:
        text: the report.
        start: where the words begin.
        end: where they end.
        has_own_negation: True if what found the words looks for a negation itself, as for ``can't breathe``.
    """
    sentence = max(text.rfind(mark, 0, start) for mark in (". ", "!", "? ", "\n", ";")) + 1
    before, after = text[sentence:start], text[end:]
    if not has_own_negation and _NOT_BEFORE_VERB.search(text[start:end]):
        return True
    listed = _BEFORE_IN_LIST if _LIST_GOES_ON.match(after) or _OR_BEFORE.search(before) else _BEFORE
    return bool(listed.search(before) or _AFTER.match(after) or _AFTER_KOREAN.match(after))

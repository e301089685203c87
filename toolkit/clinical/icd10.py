"""ICD-10-CM as a dictionary, by the package simple-icd-10-cm (an extra): retrieval is tried on something big."""

from __future__ import annotations

import warnings
from importlib import metadata

from toolkit.clinical.terms import Term
from toolkit.runtime.errors import UsageError


def read_icd10() -> tuple[str, list[Term]]:
    """Return version and terms: each code that may be assigned, its three-character category, its chapter.

    Codes are texts here, as in J18.9. The classification is of the US National Center for Health Statistics, and free.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it reads its data by importlib.resources.read_text
            import simple_icd_10_cm as icd
    except ImportError:
        raise UsageError('icd10cm needs simple-icd-10-cm: pip install -e ".[icd10]"') from None
    terms = []
    for code in icd.get_all_codes(with_dots=True):
        if not icd.is_leaf(code) or icd.is_chapter_or_block(code):
            continue
        category = code[:3]
        chapter = icd.get_ancestors(code)[-1]
        terms.append(Term(code, _text(icd, code), category, _text(icd, category), chapter, _text(icd, chapter)))
    return f"ICD-10-CM, simple-icd-10-cm {metadata.version('simple-icd-10-cm')}", terms


def _text(icd: object, code: str) -> str:
    return str(icd.get_description(code))  # type: ignore[attr-defined]

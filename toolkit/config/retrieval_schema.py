"""The ``data.retrieval`` section of a recipe: passages that are added to each row."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from toolkit.config.section import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RetrievalConfig(Section):
    """Passages that are found for each row, in training, evaluation and generation alike."""

    corpus: str
    """Directory of documents: txt, md, pdf, docx, hwpx (docs/grounded-documents.md)."""

    passages: Annotated[int, Field(ge=1, le=100)] = 5
    """Most passages that a row gets, the best first."""

    query: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=["NOTE"], min_length=1)
    """Columns (or paths such as AE.AETERM) whose texts are the query."""

    as_of: str | None = None
    """Column of an ISO date: passages that are not in force then are left out; none takes all."""

    dense: bool = False
    """Rank by dense vectors (WordLlama's) as well, and fuse both rankings."""

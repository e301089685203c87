"""The ``data.retrieval`` section of a recipe: passages that are added to each row."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.section import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class RetrievalConfig(Section):
    """Passages that are found for each row, in training, evaluation and generation alike."""

    corpus: str | None = None
    """Directory of documents: txt, md, pdf, docx, hwpx (docs/grounded-documents.md)."""

    dictionary: str | None = None
    """In its place a dictionary of adverse events, whose terms are found: a directory of MedDRA's .asc files, toy, or
    icd10cm (docs/coding.md)."""

    passages: Annotated[int, Field(ge=1, le=100)] = 5
    """Most passages that a row gets, the best first."""

    query: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=["NOTE"], min_length=1)
    """Columns (or paths such as AE.AETERM) whose texts are the query."""

    as_of: str | None = None
    """Column of an ISO date: passages that are not in force then are left out; none takes all."""

    dense: bool = False
    """Rank by dense vectors (WordLlama's) as well, and fuse both rankings."""

    @model_validator(mode="after")
    def _check_one(self) -> RetrievalConfig:
        """Require a corpus or a dictionary, and of a dictionary nothing that is a corpus's."""
        if (self.corpus is None) == (self.dictionary is None):
            raise ValueError("expected corpus: DIR or dictionary: PATH, one of the two")
        if self.dictionary is not None and (self.as_of is not None or self.dense):
            raise ValueError("as_of and dense go with a corpus; a dictionary's terms have no dates, and no vectors")
        return self

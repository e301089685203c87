"""Read and write tables of records: JSON lines, CSV, and SAS transport files of version 5 (XPT, by pyreadstat)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.clinical.records import NUMBERS, columns_of
from toolkit.runtime.errors import DataError, UsageError
from toolkit.runtime.json_text import to_json
from toolkit.runtime.paths import explain_refused_write, make_parent, replace_bytes, replace_text

ENDINGS = (".jsonl", ".csv", ".xpt")
"""Endings of the tables that are written."""
_LABELS = {
    "STUDYID": "Study Identifier", "DOMAIN": "Domain Abbreviation", "USUBJID": "Unique Subject Identifier",
    "AESEQ": "Sequence Number", "AETERM": "Reported Term for the Adverse Event", "AELLT": "Lowest Level Term",
    "AELLTCD": "Lowest Level Term Code", "AEDECOD": "Dictionary-Derived Term", "AEPTCD": "Preferred Term Code",
    "AEBODSYS": "Body System or Organ Class", "AEBDSYCD": "Body System or Organ Class Code",
    "AESOC": "Primary System Organ Class", "AESOCCD": "Primary System Organ Class Code",
    "AESEV": "Severity/Intensity", "AETOXGR": "Standard Toxicity Grade", "AESER": "Serious Event",
    "AESCAN": "Involves Cancer", "AESCONG": "Congenital Anomaly or Birth Defect",
    "AESDISAB": "Persist or Signif Disability/Incapacity", "AESDTH": "Results in Death",
    "AESHOSP": "Requires or Prolongs Hospitalization", "AESLIFE": "Is Life Threatening",
    "AESOD": "Occurred with Overdose", "AESMIE": "Other Medically Important Serious Event",
    "AEREL": "Causality", "AEACN": "Action Taken with Study Treatment", "AEOUT": "Outcome of Adverse Event",
    "AESTDTC": "Start Date/Time of Adverse Event", "AEENDTC": "End Date/Time of Adverse Event",
    "AEDICTVR": "Dictionary and Version",
}  # fmt: skip
_MOST_NAME, _MOST_BYTES = 8, 200
"""Longest name, and longest text in bytes, that a transport file of version 5 holds."""
MISSING_PYREADSTAT = 'XPT files need pyreadstat: pip install -e ".[clinical]"'


def read_xpt(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a SAS transport file, numbers as numbers and empty texts as empty.

    Raises:
        DataError: it cannot be read.
        UsageError: pyreadstat is not installed.
    """
    pyreadstat = _pyreadstat()
    try:
        columns, _ = pyreadstat.read_xport(str(path), output_format="dict")
    except (pyreadstat.ReadstatError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a SAS transport file (XPT)") from None
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_table(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records by the ending of the file's name: .jsonl, .csv, or .xpt as the data set AE.

    Raises:
        UsageError: the ending is another, or pyreadstat is needed and not installed.
        DataError: a text is too long for XPT, or a field's name.
        DiskError: the file cannot be written.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}; expected {', '.join(ENDINGS)}")
    make_parent(path)
    with explain_refused_write(path.parent):
        if path.suffix == ".xpt":
            replace_bytes(path, _xpt(path, records))
        elif path.suffix == ".csv":
            replace_text(path, _csv(records))
        else:
            replace_text(path, "".join(f"{to_json(record, ensure_ascii=False)}\n" for record in records))


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns_of(records), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _xpt(path: Path, records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a transport file of records; texts are in UTF-8."""
    import tempfile

    import pandas

    pyreadstat = _pyreadstat()
    names = columns_of(records)
    for name in names:
        if len(name) > _MOST_NAME:
            raise DataError(f"{path}: the field {name} has more than {_MOST_NAME} letters; XPT version 5 has no room")
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        is_number = name in NUMBERS and all(value is None or isinstance(value, int | float) for value in values)
        columns[name] = [float("nan") if value is None else float(value) for value in values] if is_number else [
            "" if value is None else str(value) for value in values
        ]  # fmt: skip
        for number, text in enumerate(columns[name], start=1):
            if isinstance(text, str) and len(text.encode()) > _MOST_BYTES:
                raise DataError(f"{path}: {name} of record {number} has more than {_MOST_BYTES} bytes; shorten it")
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder) / "ae.xpt"
        pyreadstat.write_xport(
            pandas.DataFrame(columns), str(staging), file_label="Adverse Events", table_name="AE",
            column_labels=[_LABELS.get(name, name) for name in names], file_format_version=5,
        )  # fmt: skip
        return staging.read_bytes()


def _pyreadstat() -> Any:
    try:
        import pyreadstat
    except ImportError:
        raise UsageError(MISSING_PYREADSTAT) from None
    return pyreadstat

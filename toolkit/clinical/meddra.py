"""Read MedDRA's distribution files (.asc), which a user with a licence has; nothing of them is kept or shipped.

Fields are separated by $. Read are, by their places: ``llt.asc`` (code, name, code of the preferred term, and at the
tenth Y or N for current), ``mdhier.asc`` (codes and names of PT, HLT, HLGT and SOC, and at the twelfth Y for the
primary path), or in its place ``pt.asc`` (its fourth is the primary SOC) and ``soc.asc``. The hierarchy between them
(``hlt_pt``, ``hlgt_hlt``, ``soc_hlgt``) tells a path that does not hold together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from toolkit.clinical.terms import Term
from toolkit.runtime.errors import DataError

_LLT, _PT, _SOC, _MDHIER = "llt.asc", "pt.asc", "soc.asc", "mdhier.asc"
_LINKS = ("hlt_pt.asc", "hlgt_hlt.asc", "soc_hlgt.asc")
_ENCODINGS = ("utf-8-sig", "cp949", "latin-1")
_ENGLISH = ("english", "medascii", "en", "eng")


def read_meddra(path: Path) -> tuple[str, list[Term]]:
    """Return version and terms of a directory that holds the files, or one of each language side by side.

    The directory of a language is any that has ``llt.asc``, at ``path`` or up to three folders below it. English names
    are the terms' own; those of other languages are added by code.

    Raises:
        DataError: a file is missing, cannot be read, has a line with too few fields, or names a code that is nowhere.
    """
    found = (file for depth in range(4) for file in path.glob("*/" * depth + "[lL][lL][tT].[aA][sS][cC]"))
    folders = sorted({file.parent for file in found})
    if not folders:
        raise DataError(f"dictionary {path} has no {_LLT}; expected the directory of MedDRA's .asc files")
    main = min(folders, key=lambda folder: (_is_other_language(folder, path), str(folder)))
    terms = _terms_of(main)
    for folder in folders:
        if folder != main:
            names = {line[0]: line[1] for line in _lines(folder, _LLT, 2)}
            terms = [
                replace(term, other_names=(*term.other_names, names[str(term.code)]))
                if str(term.code) in names and names[str(term.code)] not in term.names
                else term
                for term in terms
            ]
    return _version(path, main), terms


def _terms_of(folder: Path) -> list[Term]:
    """Return the terms of one language."""
    preferred = _preferred(folder)
    terms = []
    for line in _lines(folder, _LLT, 3):
        if line[2] not in preferred:
            raise DataError(f"{folder / _LLT}: the term {line[0]} has the preferred term {line[2]}, which is nowhere")
        pt, soc_code, soc = preferred[line[2]]
        is_current = len(line) < 10 or line[9].upper() != "N"
        terms.append(Term(_code(line[0]), line[1], _code(line[2]), pt, _code(soc_code), soc, is_current))
    return terms


def _preferred(folder: Path) -> Mapping[str, tuple[str, str, str]]:
    """Return name, and code and name of the primary SOC, of each preferred term by its code."""
    if _file(folder, _MDHIER) is not None:
        lines = list(_lines(folder, _MDHIER, 12))
        found = {line[0]: (line[4], line[3], line[7]) for line in lines if line[11].upper() == "Y"}
        if without := {line[0] for line in lines} - found.keys():
            raise DataError(f"{folder / _MDHIER}: the preferred term {min(without)} has no primary path")
    else:
        classes = {line[0]: line[1] for line in _lines(folder, _SOC, 2)}
        found = {}
        for line in _lines(folder, _PT, 4):
            if line[3] not in classes:
                raise DataError(f"{folder / _PT}: {line[0]} has the system organ class {line[3]}, which is nowhere")
            found[line[0]] = (line[1], line[3], classes[line[3]])
    _check_paths(folder, found)
    return found


def _check_paths(folder: Path, found: Mapping[str, tuple[str, str, str]]) -> None:
    """Raise DataError if the links between the levels, where there are such files, do not lead to the primary SOC."""
    if any(_file(folder, name) is None for name in _LINKS):
        return
    of_hlt, of_hlgt, of_soc = ({(line[1], line[0]) for line in _lines(folder, name, 2)} for name in _LINKS)
    up = [_by_lower(links) for links in (of_hlt, of_hlgt, of_soc)]
    for code, (name, soc, _) in found.items():
        level = {code}
        for links in up:
            level = {upper for lower in level for upper in links.get(lower, ())}
        if soc not in level:
            raise DataError(f"{folder}: {code} ({name}) does not lead to its system organ class {soc}")


def _by_lower(links: set[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for lower, upper in links:
        found.setdefault(lower, set()).add(upper)
    return found


def _lines(folder: Path, name: str, least: int) -> Iterator[list[str]]:
    """Yield the fields of each line of a file.

    Raises:
        DataError: there is no such file, or a line has fewer fields than ``least``.
    """
    file = _file(folder, name)
    if file is None:
        raise DataError(f"{folder} has no {name}; expected the .asc files of one MedDRA version")
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            fields = [field.strip() for field in line.split("$")]
            if len(fields) < least:
                raise DataError(f"{file} line {number} has {len(fields)} fields; expected {least} or more, between $")
            yield fields


def _text(file: Path) -> str:
    """Return a file's text: UTF-8, as current versions are, or what older ones of a language used."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error})") from None
    for encoding in _ENCODINGS[:-1]:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode(_ENCODINGS[-1])


def _file(folder: Path, name: str) -> Path | None:
    """Return a file by its name in either case."""
    return next((file for file in (folder / name, folder / name.upper()) if file.is_file()), None)


def _code(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _is_other_language(folder: Path, root: Path) -> bool:
    """Return whether a folder is of another language than English, by its path or by its first terms' letters."""
    names = [part.lower() for part in folder.relative_to(root).parts]
    if any(mark in name.replace("-", "_").split("_") for name in names for mark in _ENGLISH):
        return False
    return any(not line[1].isascii() for line, _ in zip(_lines(folder, _LLT, 2), range(50), strict=False))


def _version(path: Path, folder: Path) -> str:
    """Return the version that a release file or a folder's name states, as ``MedDRA 27.0``; or that none is."""
    release = _file(folder, "meddra_release.asc")
    if release is not None:
        first = _text(release).strip().split("$")[0].strip()
        if first:
            return f"MedDRA {first}"
    for part in reversed((path.resolve() / folder.relative_to(path)).parts):
        if found := re.search(r"(?<!\d)(\d{2})[._](\d)(?!\d)", part):
            return f"MedDRA {found[1]}.{found[2]}"
    return "MedDRA, version not stated"

"""A directory of documents as passages: read and cut once, and kept on disk under the fingerprint of its files.

Of a document are known, by its front matter (a YAML block between two lines of ``---`` at the beginning of txt and md)
or by ``manifest.yaml`` in the directory (``files: {name: {...}}``):

    id                stands before the slash in the ids of its passages; by default the file's name without ending
    title, source     for readers
    version           date of this version; by default a date in the file's name, as in ``sop_2026-03-01.pdf``
    effective_from    first day on which it is in force; by default ``version``
    effective_until   last such day; none while it is in force
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

import toolkit
from toolkit.config import yaml_text
from toolkit.retrieval.index import alone, root
from toolkit.retrieval.passages import Passage
from toolkit.retrieval.readers import READERS, DocumentLine, read_lines
from toolkit.retrieval.structure import cut
from toolkit.runtime.errors import DataError
from toolkit.runtime.paths import replace_text, sources_hash
from toolkit.runtime.shipped import find_file

log = logging.getLogger("frostline")

MANIFEST = "manifest.yaml"
_KEYS = ("id", "title", "source", "version", "effective_from", "effective_until")
_DATE_IN_NAME = re.compile(r"(?<!\d)(20\d\d|19\d\d)[-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01])(?!\d)")
_ID = re.compile(r"[^\s/\[\]]+")
_NOT_READ = ("README.md", MANIFEST)


@dataclass(frozen=True)
class Corpus:
    """The documents of a directory and of those below it."""

    directory: Path

    @classmethod
    def open(cls, path: str) -> Corpus:
        """Find a corpus.

        Raises:
            DataError: it is no directory, or holds no document.
        """
        corpus = cls(find_file(path))
        if not corpus.directory.is_dir():
            raise DataError(f"data.retrieval.corpus is {path}, which is no directory; expected one of documents")
        if not corpus._files:
            endings = ", ".join(READERS)
            raise DataError(f"data.retrieval.corpus is {path}, which holds no document; expected files of {endings}")
        return corpus

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """Content of each document and of the manifest, by its path below the directory, in order."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and path.suffix.lower() in READERS and path.name not in _NOT_READ and name[0] != ".":
                found[name] = _content(path)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files, and of the code that cuts them."""
        sha = hashlib.sha256(sources_hash(Path(toolkit.__file__).parent, "retrieval").encode())
        manifest = self.directory / MANIFEST
        for name, content in {**self._files, **({MANIFEST: _content(manifest)} if manifest.is_file() else {})}.items():
            sha.update(json.dumps([name, hashlib.sha256(content).hexdigest()]).encode())
        return sha.hexdigest()

    def passages(self) -> list[Passage]:
        """Return the passages of all documents, in the order of their files; read where no process has read them.

        Raises:
            DataError: a document cannot be read, its front matter is wrong, or two passages have one id.
            UsageError: the library for a kind of file is not installed.
        """
        path = root() / f"{self.fingerprint}.passages.json"
        try:
            if (kept := _load(path)) is None:
                with alone(path):
                    if (kept := _load(path)) is None:
                        kept = self._read()
                        replace_text(path, json.dumps([asdict(one) for one in kept], ensure_ascii=False), 0o600)
        except OSError as error:
            log.warning("%s cannot be used (%s): the corpus is read for this process alone", path.parent, error)
            kept = self._read()
        return kept

    def _read(self) -> list[Passage]:
        manifest = self._manifest()
        passages: dict[str, Passage] = {}
        undated = []
        for name, content in self._files.items():
            for passage in _read_document(self.directory / name, name, content, manifest.get(name, {})):
                if (other := passages.get(passage.id)) is not None:
                    raise DataError(
                        f"{self.directory}: {other.file} and {name} both hold a passage {passage.id}; give each "
                        "version of a document an id of its own"
                    )
                passages[passage.id] = passage
            undated += [name] if not passages or not list(passages.values())[-1].since else []
        log.info("corpus %s: %d passages of %d documents", self.directory, len(passages), len(self._files))
        if undated:
            log.warning("corpus %s: %s without a version date; always in force", self.directory, ", ".join(undated))
        return list(passages.values())

    def _manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        if not path.is_file():
            return {}
        files = (_yaml(_content(path).decode("utf-8", "replace"), str(path)) or {}).get("files")
        if not isinstance(files, Mapping) or not all(isinstance(one, Mapping) for one in files.values()):
            raise DataError(f"{path}: expected files: {{NAME: {{id: …, version: …}}}}")
        if unknown := sorted(set(files) - set(self._files)):
            raise DataError(f"{path}: names {unknown[0]}, which is no document there")
        return dict(files)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _load(path: Path) -> list[Passage] | None:
    try:
        return [Passage(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml_text.load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{source}: no valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise DataError(f"{source}: expected keys such as id and version")
    return values


def _read_document(path: Path, name: str, content: bytes, of_manifest: Mapping[str, Any]) -> list[Passage]:
    """Return the passages of a document."""
    lines = read_lines(path, content)
    front, lines = _front_matter(lines, str(path))
    about = _about(path, {**front, **of_manifest})
    title = about["title"]
    return [
        Passage(
            f"{about['id']}/{unit.key}", " ".join(filter(None, [title, unit.place.removeprefix(title).strip()])),
            unit.text, about["effective_from"], about["effective_until"], name, unit.page, about["source"],
        )
        for unit in cut(lines)
    ]  # fmt: skip


def _front_matter(lines: list[DocumentLine], source: str) -> tuple[dict[str, Any], list[DocumentLine]]:
    """Return the keys between two lines of ``---`` at the beginning of a document, and the lines after them."""
    if not lines or lines[0].text != "---":
        return {}, lines
    end = next((at for at, line in enumerate(lines) if at and line.text == "---"), None)
    if end is None:
        raise DataError(f"{source}: the front matter has no end; expected a second line of ---")
    return _yaml("\n".join(line.text for line in lines[1:end]), source), lines[end + 1 :]


def _about(path: Path, given: Mapping[str, Any]) -> dict[str, str]:
    """Return what is known of a document, each key of ``_KEYS`` as text."""
    if unknown := sorted(set(given) - set(_KEYS)):
        raise DataError(f"{path}: unknown key {unknown[0]}; expected {', '.join(_KEYS)}")
    values = {key: "" if given.get(key) is None else str(given[key]).strip() for key in _KEYS}
    values["id"] = values["id"] or re.sub(r"[\s/\[\]]+", "-", path.stem)
    if not _ID.fullmatch(values["id"]):
        raise DataError(f"{path}: id is {values['id']!r}; expected no blank, slash or bracket")
    if not values["version"] and (dated := _DATE_IN_NAME.search(path.stem)):
        values["version"] = "-".join(dated.groups())
    values["effective_from"] = values["effective_from"] or values["version"]
    for key in ("version", "effective_from", "effective_until"):
        try:
            values[key] = values[key] and datetime.date.fromisoformat(values[key]).isoformat()
        except ValueError:
            raise DataError(f"{path}: {key} is {values[key]!r}; expected a date such as 2026-03-01") from None
    if values["effective_until"] and values["effective_until"] < values["effective_from"]:
        raise DataError(f"{path}: effective_until is before effective_from; expected the last day in force")
    return values

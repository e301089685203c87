"""Write and verify a checkpoint's manifest, which lists every file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import toolkit
from toolkit.runtime.errors import CheckpointError
from toolkit.runtime.hashed_files import FileHash, as_json, hash_files, write_json

MANIFEST_FILE = "MANIFEST.json"
EVALUATION_FILE = "evaluation.json"
"""Written after the commit, so that the manifest does not list it (``toolkit.checkpoint.validation_score``)."""
_FORMAT = 1


class NewerVersionError(CheckpointError):
    """A checkpoint is whole, but only a newer version can read it: no older one may be taken in its place."""


class SealError(ValueError):
    """Error of a JSON file whose content does not match the SHA-256 that it states."""


def write_manifest(directory: Path, step: int, entries: Mapping[str, FileHash]) -> None:
    """Write the manifest of the files in ``directory``.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"format": _FORMAT, "step": step, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    write_json(directory / MANIFEST_FILE, sealed(content))


def verify(checkpoint: Path) -> None:
    """Compare every byte of a checkpoint with its manifest.

    A checksum detects accidents and careless changes, not deliberate ones: anybody can write a consistent manifest.

    Raises:
        CheckpointError: files are missing, unexpected or different; lists all of them.
    """
    files, _ = read_manifest(checkpoint)
    present = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()}
    faults = [
        f"{name} is not in {MANIFEST_FILE}" for name in sorted(present - {MANIFEST_FILE, EVALUATION_FILE} - set(files))
    ]
    for name, actual in hash_files(checkpoint, sorted(files)).items():
        expected = files[name]
        if isinstance(actual, str):
            faults.append(f"{name} {actual}")
        elif actual.size != expected.size:
            faults.append(f"{name} has {actual.size:,} bytes, expected {expected.size:,}")
        elif actual.sha256 != expected.sha256:
            faults.append(f"{name} has SHA-256 {actual.sha256[:12]}…, expected {expected.sha256[:12]}…")
    if faults:
        raise damaged(checkpoint, faults)


def read_manifest(checkpoint: Path) -> tuple[dict[str, FileHash], str]:
    """Return the files that the manifest lists, and its SHA-256, which identifies the checkpoint.

    Raises:
        CheckpointError: the manifest is missing, damaged, of another format, or of another step.
        NewerVersionError: its format is a newer one.
    """
    try:
        content, digest = read_sealed(checkpoint / MANIFEST_FILE)
        files = {str(name): FileHash(**entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise damaged(checkpoint, [f"{MANIFEST_FILE} is missing; expected a checkpoint of this version"]) from None
    except SealError as error:
        raise damaged(checkpoint, [f"{MANIFEST_FILE} has been changed: {error}"]) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(checkpoint, [f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"]) from None
    if isinstance(content.get("format"), int) and content["format"] > _FORMAT:
        raise newer_version(checkpoint, None, f"{MANIFEST_FILE} has format {content['format']}")
    if content.get("format") != _FORMAT:
        raise damaged(
            checkpoint, [f"{MANIFEST_FILE} has format {content.get('format')!r}; this version reads {_FORMAT}"]
        )
    if checkpoint.name != directory_name(content.get("step")):
        raise damaged(checkpoint, [f"{MANIFEST_FILE} belongs to step {content.get('step')!r}"])
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise damaged(checkpoint, [f"{MANIFEST_FILE} lists {outside[0]}, which lies outside"])
    return files, digest


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``content`` with its SHA-256 added, which ``read_sealed`` checks."""
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_sealed(path: Path) -> tuple[dict[str, Any], str]:
    """Read a JSON file written from ``sealed``; return its content and its SHA-256.

    Raises:
        SealError: the file has been changed.
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: the file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    as_written = text == as_json(content)
    digest = content.pop("sha256")
    if digest != sealed(content)["sha256"] or not as_written:
        raise SealError("it does not have the SHA-256 it states")
    return content, digest


def directory_name(step: object) -> str:
    """Return the name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}" if isinstance(step, int) else ""


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's directory name."""
    return int(checkpoint.name.removeprefix("step-"))


def damaged(checkpoint: Path, faults: list[str]) -> CheckpointError:
    """Return the error for a damaged checkpoint that lists its faults."""
    listed = "\n".join(f"  - {fault}" for fault in faults)
    return CheckpointError(f"checkpoint {checkpoint} is damaged:\n{listed}")


def newer_version(checkpoint: Path, writer: str | None, what: str) -> NewerVersionError:
    """Return the error for a checkpoint of a newer version, written by version ``writer``; ``what`` is unknown here."""
    return NewerVersionError(
        f"checkpoint {checkpoint} is of a newer version of frostline ({writer or 'unknown'}, this is "
        f"{toolkit.__version__}): its {what}, which this version does not know. "
        "Go on with a version that does, or start a new run with another --output.dir"
    )

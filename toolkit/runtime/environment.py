"""Check that the packages Frostline needs are installed; uses the standard library alone and runs on older Pythons."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_SAME_NAME = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "filelock", "huggingface_hub", "jinja2", "jsonschema",
    "matplotlib", "numpy", "openpyxl", "peft", "psutil", "pyarrow", "pydantic", "sacrebleu", "safetensors",
    "tensorboard", "torch", "tqdm", "transformers", "typing_extensions", "xxhash",
)  # fmt: skip
PACKAGES = {**{name: name for name in _SAME_NAME}, "pillow": "PIL", "pyyaml": "yaml"}
"""Module to import, by the name of the package that ``setup.cfg`` requires."""

OLDEST_PYTHON = (3, 11)
_PACKAGES_SHOWN = 5
"""Most missing packages that the message names."""


def require_packages() -> None:
    """Exit with code 2 and say how to install Frostline, unless every required package is found.

    Packages are only looked up. One that is installed but broken fails later, where it is imported, with its traceback.
    """
    problem = describe_missing(tuple(sys.version_info[:3]))
    if not problem:
        return
    if os.environ.get("RANK", "0") == "0":  # one message, not one per rank
        root = Path(__file__).resolve().parent.parent.parent
        print(f"error: {problem}; {installation_advice(root, Path(sys.prefix), Path.cwd())}", file=sys.stderr)
    sys.exit(2)


def describe_missing(version: tuple[int, ...]) -> str:
    """Say that this Python, of ``version`` (3, 11, 4), is too old or which packages it lacks; "" if neither."""
    interpreter = f"{sys.executable} (Python {'.'.join(map(str, version))})"
    if version < OLDEST_PYTHON:
        return f"{interpreter} is too old: expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    absent = sorted(package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None)
    if not absent:
        return ""
    more = f" and {len(absent) - _PACKAGES_SHOWN} more packages" if len(absent) > _PACKAGES_SHOWN else ""
    return f"{interpreter} lacks {', '.join(absent[:_PACKAGES_SHOWN])}{more}"


def installation_advice(root: Path, prefix: Path, here: Path) -> str:
    """Say which command to run so that the required packages are found.

    ``root`` is that of the checkout, ``prefix`` the interpreter's ``sys.prefix``, ``here`` the working directory.
    """
    if not (root / "Makefile").is_file():  # installed by pip
        return "run `python -m pip check`, then install what it names"
    environment = root / ".venv"
    activate = environment / "bin" / "activate"
    if activate.is_file() and environment.resolve() != prefix.resolve():
        shown = activate.relative_to(here) if here in activate.parents else activate
        return f"run `. {shown}`, then the same command again"
    return (
        f"run `make train` in {root} once, which installs everything into .venv, or in an environment of your own "
        'pip install -c constraints.txt -e ".[bundled]"'
    )

"""Check that this Python has what Frostline needs, with the standard library alone, on older Pythons too."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = {
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "filelock": "filelock",
    "huggingface_hub": "huggingface_hub",
    "numpy": "numpy",
    "pillow": "PIL",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "typing_extensions": "typing_extensions",
    "xxhash": "xxhash",
}
"""Module by name of the package, as ``setup.cfg`` requires them."""

OLDEST_PYTHON = (3, 11)
_SHOWN = 5


def require_packages(root: Path) -> None:
    """End the process with exit code 2, and name the command to run, unless all packages are installed.

    A package that is there and cannot be imported keeps its traceback.

    Args:
        root: of this checkout.
    """
    trouble = missing(tuple(sys.version_info[:3]))
    if not trouble:
        return
    if os.environ.get("RANK", "0") == "0":  # one of several ranks is enough
        print(f"error: {trouble}; {remedy(root, Path(sys.prefix), Path.cwd())}", file=sys.stderr)
    sys.exit(2)


def missing(version: tuple[int, ...]) -> str:
    """Return what this Python lacks, or an empty string.

    Args:
        version: of Python.
    """
    running = f"{sys.executable} (Python {'.'.join(map(str, version))})"
    if version < OLDEST_PYTHON:
        return f"{running} is too old: expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    absent = sorted(package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None)
    if not absent:
        return ""
    more = f" and {len(absent) - _SHOWN} more packages" if len(absent) > _SHOWN else ""
    return f"{running} lacks {', '.join(absent[:_SHOWN])}{more}"


def remedy(root: Path, prefix: Path, here: Path) -> str:
    """Return the command that helps.

    Args:
        root: of the checkout; where it is none, Frostline was installed by pip.
        prefix: of the environment that runs.
        here: the working directory.
    """
    if not (root / "Makefile").is_file():
        return "run `python -m pip check`, then install what it names"  # an installation
    environment = root / ".venv"
    activate = environment / "bin" / "activate"
    if activate.is_file() and environment.resolve() != prefix.resolve():
        shown = activate.relative_to(here) if here in activate.parents else activate
        return f"run `. {shown}`, then the same command again"
    return (
        f"run `make train` in {root} once, which installs everything into .venv, or in an environment of your own "
        'pip install -c constraints.txt -e ".[bundled]"'
    )

"""Find the recipes, DeepSpeed files and example rows that come with Frostline.

They are in the folders ``recipes``, ``ds_configs`` and ``examples/data`` of the package. In a checkout these are
symbolic links to the folders at its root; an installation has copies, because setuptools follows links.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from toolkit.runtime.unicode_names import as_spelled

PACKAGE = Path(__file__).resolve().parent.parent
"""Directory of the ``toolkit`` package."""

_SHIPPED_FOLDERS = ("recipes", "ds_configs", "examples")

QUICKSTART = "recipes/quickstart.yaml"
"""Recipe of a command without ``--config``."""

log = logging.getLogger("frostline")


def shipped_file(name: str) -> Path:
    """Return the path of a file that comes with Frostline, as ``recipes/quickstart.yaml``."""
    return (PACKAGE / name).resolve()


def launch_script(verb: str) -> Path | None:
    """Return the launch script of a verb; None in an installation, which has no ``launch`` directory."""
    script = PACKAGE.parent / "launch" / f"{verb.replace('-', '_')}.py"
    return script if script.is_file() else None


def command_line(verb: str) -> str:
    """Return the command that runs a verb: its launch script in a checkout, else the ``frostline`` command."""
    return f"python launch/{verb.replace('-', '_')}.py" if launch_script(verb) else f"frostline {verb}"


def find_file(path: str | Path) -> Path:
    """Return ``path`` if it exists (``as_spelled``), else the shipped file or folder of that name, and log its use.

    A path that exists in neither place is returned unchanged, so that the caller's attempt to open it reports it.
    """
    path = as_spelled(path)
    try:
        if not path.parts or path.parts[0] not in _SHIPPED_FOLDERS or path.exists() or not (PACKAGE / path).exists():
            return path
    except (OSError, ValueError):  # too long, or a NUL in it
        return path
    shipped = shipped_file(str(path))
    _log_once(f"{path} is not in {Path.cwd()}; using {shipped}, which comes with Frostline")
    return shipped


@cache
def _log_once(text: str) -> None:
    log.info("%s", text)

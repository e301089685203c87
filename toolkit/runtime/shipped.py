"""Find the recipes, DeepSpeed files and example rows that come with Frostline.

They lie in the folders ``recipes``, ``ds_configs`` and ``examples/data`` of the package. In a checkout these are links
to the folders at its top, and an installation holds copies, because setuptools follows links.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

_FOLDERS = ("recipes", "ds_configs", "examples")

QUICKSTART = "recipes/quickstart.yaml"
"""The recipe of a command that names none."""

log = logging.getLogger("frostline")


def shipped_file(name: str) -> Path:
    """Return the path of a file that comes with Frostline.

    Args:
        name: such as ``recipes/quickstart.yaml``.
    """
    return (PACKAGE / name).resolve()


def launch_script(verb: str) -> Path | None:
    """Return the launch script of a verb in this checkout, or None in an installation, which has none."""
    script = PACKAGE.parent / "launch" / f"{verb}.py"
    return script if script.is_file() else None


def command_line(verb: str) -> str:
    """Return how a verb is run here: by its launch script, or by the ``frostline`` command where there is none."""
    return f"python launch/{verb}.py" if launch_script(verb) else f"frostline {verb}"


def find_file(path: str | Path) -> Path:
    """Return ``path`` where it exists from here, else the file of that name that comes with Frostline, which is logged.

    A path that neither has is returned as it is, so that whoever opens it reports it.
    """
    path = Path(path)
    try:
        if not path.parts or path.parts[0] not in _FOLDERS or path.exists() or not (PACKAGE / path).is_file():
            return path
    except (OSError, ValueError):  # too long, or a NUL in it
        return path
    found = shipped_file(str(path))
    _log_once(f"{path} is not in {Path.cwd()}; using {found}, which comes with Frostline")
    return found


@cache
def _log_once(text: str) -> None:
    log.info("%s", text)

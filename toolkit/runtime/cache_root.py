"""Where caches are kept."""

from __future__ import annotations

import os
from pathlib import Path

from toolkit.runtime.privacy import private_temporary_directory


def cache_root() -> Path:
    """Return the cache directory: $FROSTLINE_CACHE, else $XDG_CACHE_HOME/frostline, else ~/.cache/frostline.

    Where no home directory is known, as for a user without an entry in passwd, it is one of this user's in $TMPDIR.
    """
    if configured := os.environ.get("FROSTLINE_CACHE"):
        return Path(configured)
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured) / "frostline"
    try:
        return Path.home() / ".cache" / "frostline"
    except RuntimeError:
        return private_temporary_directory() / "frostline"

"""Count what an activation store has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStatistics:
    """Counts of one process since it opened its store."""

    hits: int = 0
    """Entries read."""
    misses: int = 0
    """Reads that found no entry."""
    computed: int = 0
    """Entries passed to ``write``."""
    stored: int = 0
    """Entries of those that were written."""
    failed: int = 0
    """Entries of those that were not: there was no room, or the disk refused."""
    damaged: int = 0
    """Entries or whole shards that were changed, unreadable, or of another namespace."""
    evicted: int = 0
    """Shards evicted to keep to the limit."""
    read_bytes: int = 0
    """Bytes of the entries read."""
    written_bytes: int = 0
    """Bytes of the shards written, headers included."""

    def __str__(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.hits} read ({mebibytes(self.read_bytes)}), {self.misses} missed, {self.computed} computed, "
            f"{self.stored} stored ({mebibytes(self.written_bytes)}), {self.failed} not stored, "
            f"{self.damaged} damaged, {self.evicted} shards evicted"
        )


def mebibytes(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"

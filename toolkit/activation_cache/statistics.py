"""Count what an activation store has done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStatistics:
    """Counts of one process since its store was opened."""

    hits: int = 0
    """Entries read."""
    misses: int = 0
    """Reads that found nothing."""
    computed: int = 0
    """Entries handed in to be stored."""
    stored: int = 0
    """Of those, the ones that are on disk."""
    failed: int = 0
    """Of those, the ones that are not: no room, or the disk refused."""
    damaged: int = 0
    """Entries, or whole shards, that were not what had been stored, or belonged elsewhere."""
    evicted: int = 0
    """Shards removed to keep to the limit."""
    read_bytes: int = 0
    """Of the entries read."""
    written_bytes: int = 0
    """Of the shards written, headers included."""

    def __str__(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.hits} read ({mebibytes(self.read_bytes)}), {self.misses} missed, {self.computed} computed, "
            f"{self.stored} stored ({mebibytes(self.written_bytes)}), {self.failed} not stored, "
            f"{self.damaged} damaged, {self.evicted} shards evicted"
        )


def mebibytes(count: int) -> str:
    """Return bytes as text."""
    return f"{count / 2**20:.1f} MiB"

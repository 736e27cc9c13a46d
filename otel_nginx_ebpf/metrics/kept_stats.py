"""Keeps an emitter's counts in a file that outlives it, so that the next emitter continues from them."""

import json
import os

from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.losses import lost_traces

# One page. The kernel writes a page completely or not at all, even if the writer is killed.
_BYTES = 4096


class KeptStats:
    """Saves `Stats` to a file. Owns the file's descriptor."""

    def __init__(self, descriptor: int, stats: Stats) -> None:
        """Loads the last emitter's counts into `stats`. Make the exporter afterwards: it adds the traces on disk."""
        self._descriptor = descriptor
        self._stats = stats
        self._never_received = 0
        """How many of the lost traces were never received."""
        self._last = False
        """There was an emitter before."""
        if raw := os.pread(descriptor, _BYTES, 0):
            self._last = True
            stats.received, stats.exported, lost, self._never_received = json.loads(raw)
            stats.lost |= lost
        self._received = stats.received

    def settle(self) -> None:
        """Counts the traces that the last emitter held, except those on disk, as lost. Make the exporter before."""
        stored, self._stats.received = self._stats.received - self._received, self._received
        if self._last:
            lost = lost_traces(self._stats.lost) - self._never_received
            held = self._received - self._stats.exported - lost - stored
            self._stats.lose("lost_emitter_killed", max(held, 0))
        else:
            self._stats.received += stored

    def lose_unread(self, cause: str, count: int) -> None:
        """Counts traces that were lost before they were received."""
        self._stats.lose(cause, count)
        self._never_received += lost_traces({cause: count})

    def write(self) -> None:
        """Saves the counts for the next emitter."""
        stats = self._stats
        counts = stats.received, stats.exported, stats.lost.copy(), self._never_received
        os.pwrite(self._descriptor, json.dumps(counts).encode().ljust(_BYTES), 0)

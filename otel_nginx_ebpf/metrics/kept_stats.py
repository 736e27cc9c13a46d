"""Keeps an emitter's counts in a file that outlives it, so that the next emitter continues from them."""

import json
import os

from otel_nginx_ebpf.metrics.stats import Deliveries, Stats
from otel_nginx_ebpf.traces.losses import lost_traces

# One page. The kernel writes a page completely or not at all, even if the writer is killed.
_BYTES = 4096


class _Kept:
    """The counts of the traces, or of the log records."""

    def __init__(self, counts: Deliveries) -> None:
        self._counts = counts
        self.never_received = 0
        """How many of the lost were never received."""
        self._received = counts.received

    def load(self, received: int, exported: int, lost: dict[str, int], never_received: int) -> None:
        counts = self._counts
        counts.received, counts.exported, self.never_received = received, exported, never_received
        counts.lost |= lost
        self._received = received

    def saved(self) -> tuple[object, ...]:
        counts = self._counts
        return counts.received, counts.exported, counts.lost.copy(), self.never_received

    def settle(self, *, last: bool) -> None:
        """`last`: there was an emitter before."""
        counts = self._counts
        stored, counts.received = counts.received - self._received, self._received
        if last:
            lost = lost_traces(counts.lost) - self.never_received
            held = self._received - counts.exported - lost - stored
            counts.lose("lost_emitter_killed", max(held, 0))
        else:
            counts.received += stored


class KeptStats:
    """Saves `Stats` to a file. Owns the file's descriptor."""

    def __init__(self, descriptor: int, stats: Stats) -> None:
        """Loads the last emitter's counts into `stats`. Make the exporter afterwards: it adds what is on disk."""
        self._descriptor = descriptor
        self._stats = stats
        self._traces = _Kept(stats)
        self._kept = [self._traces, *([_Kept(stats.logs)] if stats.logs else [])]
        self._last = False
        """There was an emitter before."""
        if raw := os.pread(descriptor, _BYTES, 0):
            self._last = True
            for kept, saved in zip(self._kept, json.loads(raw), strict=False):
                kept.load(*saved)

    def settle(self) -> None:
        """Counts what the last emitter held, except what is on disk, as lost. Make the exporter before."""
        for kept in self._kept:
            kept.settle(last=self._last)

    def lose_unread(self, cause: str, count: int) -> None:
        """Counts traces that were lost before they were received."""
        self._stats.lose(cause, count)
        self._traces.never_received += lost_traces({cause: count})

    def write(self) -> None:
        """Saves the counts for the next emitter."""
        counts = [kept.saved() for kept in self._kept]
        os.pwrite(self._descriptor, json.dumps(counts).encode().ljust(_BYTES), 0)

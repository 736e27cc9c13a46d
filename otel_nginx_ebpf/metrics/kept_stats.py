"""What an emitter has counted, in a file that outlives it: the next one goes on where it was killed."""

import json
import os

from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.losses import lost_traces

# One page: the kernel writes it whole even where the writer is killed.
_BYTES = 4096


class KeptStats:
    """`Stats` that are kept. Owns the file's descriptor."""

    def __init__(self, descriptor: int, stats: Stats) -> None:
        """Takes on what the last emitter has counted. An exporter that is made after that finds what it has stored."""
        self._descriptor = descriptor
        self._stats = stats
        self._never_received = 0
        """Of what was lost."""
        self._last = False
        """Whether there was an emitter before."""
        if raw := os.pread(descriptor, _BYTES, 0):
            self._last = True
            stats.received, stats.exported, lost, self._never_received = json.loads(raw)
            stats.lost |= lost
        self._received = stats.received

    def settle(self) -> None:
        """Once the exporter is made: what the last emitter held is lost, but for what it had stored."""
        stored, self._stats.received = self._stats.received - self._received, self._received
        if self._last:
            lost = lost_traces(self._stats.lost) - self._never_received
            held = self._received - self._stats.exported - lost - stored
            self._stats.lose("lost_emitter_killed", max(held, 0))
        else:
            self._stats.received += stored

    def lose_unread(self, cause: str, count: int) -> None:
        """Counts what was lost before it was received."""
        self._stats.lose(cause, count)
        self._never_received += lost_traces({cause: count})

    def write(self) -> None:
        """For the next emitter."""
        stats = self._stats
        counts = stats.received, stats.exported, stats.lost.copy(), self._never_received
        os.pwrite(self._descriptor, json.dumps(counts).encode().ljust(_BYTES), 0)

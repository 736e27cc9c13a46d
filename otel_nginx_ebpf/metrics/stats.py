"""Counters of received and exported traces, and of every loss by its cause."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from otel_nginx_ebpf.metrics.connections import ConnectionCounts
from otel_nginx_ebpf.metrics.totals import RequestDurations
from otel_nginx_ebpf.traces.losses import lost_traces

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Size:
    """The size of one or more messages to the collector."""

    traces: int = 0
    spans: int = 0
    bytes: int = 0

    def remove(self, other: "Size") -> None:
        self.traces -= other.traces
        self.spans -= other.spans
        self.bytes -= other.bytes


class Deliveries:
    """Counters of what goes to a collector or an output: traces, or log records.

    Each counter has one thread that writes it. Any thread may read it.
    """

    def __init__(self) -> None:
        self.received = 0
        """What came from the kernel or a capture file, and what an earlier run left in the queue directory."""
        self.exported = 0
        self.kept = 0
        """What is left in the queue directory for the next run."""
        self.lost: dict[str, int] = {}
        """Losses by cause."""
        self.queued = Size()
        """The messages that wait for the collector in memory."""
        self.stored_bytes = 0
        """The size of the messages that wait on disk."""
        self.sent: Callable[[float], None] = lambda seconds: None
        """Called with the time in seconds that each message to the collector took."""

    def lose(self, cause: str, count: int = 1) -> None:
        self.lost[cause] = self.lost.get(cause, 0) + count

    def reject(self, count: int) -> None:
        """Counts log records that the collector rejected when it took the others of their message."""
        self.exported -= count
        self.lose("lost_export_rejected", count)

    def lose_damaged(self, error: Exception) -> None:
        self.lose("lost_damaged_record")
        _log.warning("a damaged record was left out: %s", error)

    def summary(self) -> str:
        """Returns a line such as `received 10, exported 9, lost 1 (lost_queue_full 1)`."""
        causes = {cause: count for cause, count in sorted(self.lost.items()) if count}
        total = lost_traces(causes)
        detail = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        kept = f", kept for the next run {self.kept}" if self.kept else ""
        lost = f", lost {total}" + (f" ({detail})" if detail else "")
        return f"received {self.received}, exported {self.exported}{kept}{lost}"


class Stats(Deliveries):
    """Counters of one run. All count traces, except the `partial_*` causes, which count missing parts of traces.

    `lost` has the kernel's losses, too. They are added when its probes are abandoned.
    """

    def __init__(self, *, logs: bool = False) -> None:
        super().__init__()
        self.logs = Deliveries() if logs else None
        """The log records; `None`: no log records are sent."""
        self.lost_in_kernel: dict[str, int] = {}
        """The kernel's losses by cause since the current probes were attached, as of the last sweep."""
        self.ring_buffer_fill = 0.0
        """The fill of the fullest ring buffer before the last read, from 0 to 1."""
        self.probe_hits: dict[str, float] = {}
        """Hits of each probe per second, when the kernel last counted them."""
        self.cost_s: float | None = None
        """The processor time, in seconds, that tracing cost for each request in the last measurement."""
        self.detachments = 0
        """How often the probes were detached because a limit was exceeded."""
        self.durations = RequestDurations()
        """The durations of all requests, including requests that are not traced."""
        self.connections = ConnectionCounts()

    def reject(self, count: int) -> None:
        """Counts spans that the collector rejected when it took the others of their message."""
        self.lose("partial_export_rejected", count)

    def lose_log_lines(self, count: int) -> None:
        if count:
            self.lose("partial_log_lines_missing", count)

    def losses(self) -> dict[str, int]:
        """Returns all losses by cause, including the kernel's since the current probes were attached."""
        lost, in_kernel = self.lost.copy(), self.lost_in_kernel
        return lost | {cause: lost.get(cause, 0) + count for cause, count in in_kernel.items()}

    def summary(self) -> str:
        """Returns the line of the traces and, if log records are sent, `; log records: ` with theirs."""
        traces = super().summary()
        return f"{traces}; log records: {self.logs.summary()}" if self.logs else traces

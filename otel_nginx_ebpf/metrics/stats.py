"""What was seen, what was exported and every loss by its cause."""

from collections.abc import Callable
from dataclasses import dataclass

from otel_nginx_ebpf.metrics.totals import RequestDurations
from otel_nginx_ebpf.traces.losses import lost_traces


@dataclass(slots=True)
class Size:
    """Of a message to the collector, or of several."""

    traces: int = 0
    spans: int = 0
    bytes: int = 0

    def remove(self, other: "Size") -> None:
        self.traces -= other.traces
        self.spans -= other.spans
        self.bytes -= other.bytes


class Stats:
    """Counters of one run. Traces, except the `partial_*` causes. One thread writes each; any may read."""

    def __init__(self) -> None:
        self.received = 0
        """Records taken from the kernel or a capture file; traces that an earlier run left in the queue directory."""
        self.exported = 0
        self.kept = 0
        """Left in the queue directory for the next run."""
        self.lost: dict[str, int] = {}
        """By cause, user space's own and the kernel's; the latter come when what they are of is let go."""
        self.lost_in_kernel: dict[str, int] = {}
        """The kernel's counters of what is attached, as they were at the last sweep."""
        self.ring_buffer_fill = 0.0
        """The fullest ring buffer before it was last read, 0 to 1."""
        self.probe_hits: dict[str, float] = {}
        """Of each probe, a second, when the kernel last counted them."""
        self.cost_s: float | None = None
        """Processor time that tracing took a request, when it was last measured."""
        self.detachments = 0
        """Because a limit was passed."""
        self.queued = Size()
        """What waits for the collector in memory."""
        self.stored_bytes = 0
        """What waits on disk."""
        self.sent: Callable[[float], None] = lambda seconds: None
        """Called with the time that each message to the collector took."""

        self.durations = RequestDurations()
        """Of all requests, also of those that are not traced."""

    def lose(self, cause: str, count: int = 1) -> None:
        self.lost[cause] = self.lost.get(cause, 0) + count

    def losses(self) -> dict[str, int]:
        """By cause, the kernel's of what is attached included."""
        lost, in_kernel = self.lost.copy(), self.lost_in_kernel
        return lost | {cause: lost.get(cause, 0) + count for cause, count in in_kernel.items()}

    def summary(self) -> str:
        """One line: `received 10, exported 9, lost 1 (queue_full 1)`."""
        causes = {cause: count for cause, count in sorted(self.lost.items()) if count}
        total = lost_traces(causes)
        detail = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        kept = f", kept for the next run {self.kept}" if self.kept else ""
        lost = f", lost {total}" + (f" ({detail})" if detail else "")
        return f"received {self.received}, exported {self.exported}{kept}{lost}"

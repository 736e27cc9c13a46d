"""What was seen, what was exported and every loss by its cause."""

from otel_nginx_ebpf.record import c_enum

LOSS_CAUSES: tuple[str, ...] = tuple(
    name.lower() for name, index in sorted(c_enum("loss").items(), key=lambda item: item[1]) if name != "LOSS_CAUSES"
)
"""Names of the kernel's loss counters, in the order of their index."""


class Stats:
    """Counters of one run. Traces, except `*_spans` and the `partial_*` causes."""

    def __init__(self) -> None:
        self.received = 0
        """Records taken from the kernel or a capture file; traces that an earlier run left in the queue directory."""
        self.exported = 0
        self.kept = 0
        """Left in the queue directory for the next run."""
        self.lost: dict[str, int] = {}
        """By cause, user space's own and the kernel's."""

    def lose(self, cause: str, count: int = 1) -> None:
        self.lost[cause] = self.lost.get(cause, 0) + count

    def summary(self) -> str:
        """One line: `received 10, exported 9, lost 1 (queue_full 1)`."""
        causes = {cause: count for cause, count in sorted(self.lost.items()) if count}
        total = sum(count for cause, count in causes.items() if not cause.startswith(("partial_", "began_", "not_")))
        detail = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        kept = f", kept for the next run {self.kept}" if self.kept else ""
        lost = f", lost {total}" + (f" ({detail})" if detail else "")
        return f"received {self.received}, exported {self.exported}{kept}{lost}"

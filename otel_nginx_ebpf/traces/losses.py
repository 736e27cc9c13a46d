"""What a loss cause means: a trace that is lost, one that is left out on purpose, or one that comes incomplete.

A cause says so by how its name begins.
"""

from collections.abc import Mapping

from otel_nginx_ebpf.traces.abi import c_enum

KERNEL_CAUSES: tuple[str, ...] = tuple(
    name.lower() for name, index in sorted(c_enum("loss").items(), key=lambda item: item[1]) if name != "LOSS_CAUSES"
)
"""Names of the kernel's loss counters, in the order of their index."""

LOST = ("lost_",)
LEFT_OUT = ("not_", "began_")
INCOMPLETE = ("partial_",)


def of_kind(counts: Mapping[str, int], kind: tuple[str, ...]) -> dict[str, int]:
    """Returns the counts of a kind of cause: `LOST`, `LEFT_OUT` or `INCOMPLETE`."""
    return {cause: count for cause, count in counts.items() if cause.startswith(kind)}


def lost_traces(counts: Mapping[str, int]) -> int:
    """Returns how many traces are lost, of the counts by cause."""
    return sum(of_kind(counts, LOST).values())

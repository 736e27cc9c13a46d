"""The kinds of loss causes: a trace is lost, is left out on purpose, or is incomplete.

The beginning of a cause's name tells its kind.
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
    """Returns the counts of all causes of one kind: `LOST`, `LEFT_OUT` or `INCOMPLETE`."""
    return {cause: count for cause, count in counts.items() if cause.startswith(kind)}


def lost_traces(counts: Mapping[str, int]) -> int:
    """Returns how many traces are lost. `counts` has the counts by cause."""
    return sum(of_kind(counts, LOST).values())

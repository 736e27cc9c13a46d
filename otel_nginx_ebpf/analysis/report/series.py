"""Rows by time: as many as fit, each of as much time as that takes."""

from otel_nginx_ebpf.analysis.tally import Row

SLOTS_MAX = 120
_FIRST_WIDTH_NS = 100_000_000


class Series:
    """Rows of equal time, one after the other; where nothing came there is none."""

    def __init__(self) -> None:
        self.width_ns = _FIRST_WIDTH_NS
        self.start_unix_ns = 0
        self.rows: dict[int, Row] = {}
        """By how many widths after the start."""

    def at(self, unix_ns: int) -> Row:
        """The row of a time. What is before the first counts as first."""
        if not self.rows:
            self.start_unix_ns = unix_ns
        slot = max(unix_ns - self.start_unix_ns, 0) // self.width_ns
        while slot >= SLOTS_MAX:
            self._widen()
            slot //= 2
        return self.rows.setdefault(slot, Row())

    def _widen(self) -> None:
        self.width_ns *= 2
        before, self.rows = self.rows, {}
        for slot, row in before.items():
            self.rows.setdefault(slot // 2, Row()).merge(row)

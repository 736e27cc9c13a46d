"""Rows of equal length in time. The length grows, so that the whole time needs at most `SLOTS_MAX` rows."""

from otel_nginx_ebpf.analysis.tally import Row

SLOTS_MAX = 120
_FIRST_WIDTH_NS = 100_000_000


class Timeline:
    """Rows of equal length in time. A time without requests has no row."""

    def __init__(self) -> None:
        self.width_ns = _FIRST_WIDTH_NS
        self.start_unix_ns = 0
        self.rows: dict[int, Row] = {}
        """The rows by their number, counted from the start."""

    def at(self, unix_ns: int) -> Row:
        """Returns the row of a time. A time before the start belongs to the first row."""
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

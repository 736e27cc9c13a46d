"""Shows a tally in the terminal: where the time went, a table of locations and a table of upstreams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rich.text import Text

from otel_nginx_ebpf.analysis.tally import OTHERS, PHASES, Row, Tally
from otel_nginx_ebpf.export.console import clip
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.settings.model import Sort

PERCENTILES = (50, 95, 99)
SORTS: tuple[Sort, ...] = get_args(Sort)

WIDE = 178
"""A terminal of this many columns has room for every percentile."""

_MIDDLING = 92
_WORDY = 120
_CELL = 6
_LABEL_CELLS_MAX = 60

# The columns of durations and their phases; None stands for the whole request.
_DURATIONS = tuple(
    zip(("TOTAL", "READ", "CONN", "WAIT", "XFER", "WRITE", "NGINX"), (None, *range(len(PHASES))), strict=True)
)
_STYLES = ("blue", "yellow", "magenta", "bright_magenta", "cyan", "green")


@dataclass(slots=True)
class View:
    """What the tables show, and in which order."""

    sort: int = 0
    """An index of `SORTS`."""
    percentile: int = 1
    """An index of `PERCENTILES`. Rows are sorted by this percentile. A narrow table shows only this one."""
    peers: bool = False
    """Each peer of an upstream block has its own row."""
    filter: str = ""
    """Only rows whose name contains this text are shown."""


def short_duration(nanoseconds: int) -> str:
    """Formats a duration in at most five columns: `0.6µs`, `85µs`, `1.2ms`, `640ms`, `12s`, `3h`."""
    value, unit = nanoseconds / 1e3, "µs"
    for larger in ("ms", "s"):
        if value >= 999.5:
            value, unit = value / 1e3, larger
    if value >= 999.5:
        value, unit = value / 3600, "h"
    return f"{value:.{int(value < 9.95)}f}{unit}"


def short_number(number: float) -> str:
    """Formats a number in at most five columns: `0.2`, `85.1`, `9999`, `12.3k`, `640k`, `1.2M`."""
    if number < 9999.5:
        return f"{number:.{int(0 < number < 99.95)}f}"
    value, unit = (number / 1e3, "k") if number < 999.5e3 else (number / 1e6, "M")
    return f"{value:.{int(value < 99.95)}f}{unit}"


def share(part: int, whole: int) -> str:
    """Formats a share in at most five columns: `<0.1%`, `0.4%`, `12%`; `-` for 0."""
    share = 100 * part / whole if whole else 0
    if not share:
        return "-"
    return "<0.1%" if share < 0.1 else f"{share:.{int(share < 9.95)}f}%"


def rows_of(tally: Tally, view: View) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Returns the rows of both tables with their names, filtered and sorted as `view` says."""
    servers = {server for server, location in tally.locations if (server, location) != OTHERS}
    locations = {
        f"{server} {location or '(none)'}".strip() if len(servers) > 1 else location or "(none)": row
        for (server, location), row in tally.locations.items()
    }
    upstreams: dict[str, Row] = {}
    for (block, peer), row in tally.peers.items():
        name = f"{block} {peer}".strip() if view.peers else block or peer
        upstreams.setdefault(name or "(unknown)", Row()).merge(row)
    return _chosen(locations, view), _chosen(upstreams, view)


def _chosen(rows: dict[str, Row], view: View) -> list[tuple[str, Row]]:
    def key(named: tuple[str, Row]) -> tuple[float, int, str]:
        name, row = named
        value: float = row.count
        if view.sort == 1:
            value = row.failed / row.count
        elif view.sort > 1:
            durations = _durations(row, _DURATIONS[view.sort - 2][1])
            value = durations[view.percentile] if durations else -1
        return -value, -row.count, name

    return sorted(((printable(name), row) for name, row in rows.items() if view.filter in name), key=key)


def _durations(row: Row, phase: int | None) -> list[int] | None:
    histogram = row.length if phase is None else row.phases[phase]
    return histogram.percentiles(percentile / 100 for percentile in PERCENTILES)


def where_time_went(row: Row, width: int, *, bar: bool) -> list[Text]:
    """Returns lines with each phase's share of the time, as text and, with `bar`, as a bar."""
    whole = sum(row.time_ns)
    line, legend = Text(" "), Text()
    reached_ns = filled = 0
    for phase, time_ns in enumerate(row.time_ns):
        reached_ns += time_ns
        end = round(reached_ns / whole * (width - 2)) if whole else 0
        line.append("█" * (end - filled), style=_STYLES[phase])
        filled = end
        name = PHASES[phase] if width >= _WORDY else _DURATIONS[1 + phase][0]
        legend.append(" ■ ", style=_STYLES[phase]).append(f"{name} {share(time_ns, whole)}")
    return [line, legend] if bar else [legend]


def beside_phases(tally: Tally) -> list[Text]:
    """Returns a line for each kind of time that no phase has, if there were any."""
    lines = []
    for name, histogram in (("TLS handshakes", tally.handshakes), ("requests in a blocked worker", tally.blocked)):
        if durations := histogram.percentiles(percentile / 100 for percentile in PERCENTILES):
            shown = (f"p{each} {short_duration(ns)}" for each, ns in zip(PERCENTILES, durations, strict=True))
            lines.append(Text(f" {name}: {histogram.count}, {', '.join(shown)}"))
    return lines


def screen(
    title: str, tally: Tally, seconds: float, view: View, width: int, height: int | None = None, *, bar: bool = True
) -> list[Text]:
    """Returns the lines of the whole screen: where the time went, and both tables.

    Args:
        title: Which requests these are, such as `the last 10 s`.
        tally: The requests.
        seconds: The length of the time in which they came.
        view: What to show, and in which order.
        width: The number of columns. Below 80, lines are cut.
        height: The largest number of lines. A line says how many rows had no room. None: no limit.
        bar: Whether to draw a bar. Without colours a bar shows nothing.
    """
    total = tally.total()
    locations, upstreams = rows_of(tally, view)
    cells = _Cells(width, seconds, view)
    shown = f"p{PERCENTILES[view.percentile]} of " * (not cells.all_percentiles)
    lines = [Text(f" {shown}{title}: {total.count} requests in {seconds:.1f} s", style="bold")]
    lines += where_time_went(total, width, bar=bar)
    lines += beside_phases(tally)
    for_locations, for_upstreams = len(locations), len(upstreams)
    if height is not None:
        headers = 2 * len(cells.header("")) + 3
        room = max(height - len(lines) - headers, 2)
        for_upstreams = min(for_upstreams, max(room // 2, room - for_locations))
        for_locations = min(for_locations, room - for_upstreams)
    lines += [Text(), *cells.header("LOCATION")]
    if not view.filter:
        lines.append(cells.row("(all)", total, style="bold"))
    lines += cells.rows(locations, for_locations)
    if upstreams:
        lines += [Text(), *cells.header("UPSTREAM PEER" if view.peers else "UPSTREAM")]
        lines += cells.rows(upstreams, for_upstreams)
    return lines


class _Cells:
    """Formats the lines of a table, with the columns that have room."""

    def __init__(self, width: int, seconds: float, view: View) -> None:
        self._width = width
        self._seconds = seconds
        self._view = view
        self._middling = width >= _MIDDLING
        self.all_percentiles = width >= WIDE
        self._percentiles = range(len(PERCENTILES)) if self.all_percentiles else (view.percentile,)
        durations = _CELL * len(self._percentiles) * len(_DURATIONS)
        counts = _CELL * 2 + (_CELL + 9) * self._middling
        self._label_cells = min(_LABEL_CELLS_MAX, max(width - durations - counts - 2, 8))

    def _line(self, label: Text, style: str = "") -> Text:
        label.truncate(self._label_cells, pad=True)
        return Text(style=style).append(" ").append(label).append(" ")

    def header(self, label: str) -> list[Text]:
        """Returns the lines above a table. A second line names the percentiles if all of them are shown."""
        view = self._view

        def mark(sort: int, text: str) -> str:
            return f"{'▾' + text if sort == view.sort else text:>{_CELL}}"

        line, below = self._line(Text(label), "bold"), self._line(Text())
        counts = f"{'REQS':>9}" * self._middling + mark(0, "REQ/S") + "   4xx" * self._middling + mark(1, "5xx")
        line.append(counts)
        below.append(" " * len(counts))
        for index, (name, phase) in enumerate(_DURATIONS):
            style = "" if phase is None else _STYLES[phase]
            if not self.all_percentiles:
                line.append(mark(index + 2, name), style=style)
                continue
            line.append(f"{name:>{_CELL * len(self._percentiles)}}", style=style)
            for percentile in self._percentiles:
                sort = index + 2 if percentile == view.percentile else -1
                below.append(mark(sort, f"p{PERCENTILES[percentile]}"), style=style)
        return [line, below] if self.all_percentiles else [line]

    def row(self, name: str, row: Row, style: str = "") -> Text:
        line = self._line(Text(clip(name, self._label_cells)), style)
        if self._middling:
            line.append(f"{row.count:>9}")
        line.append(f"{short_number(row.count / self._seconds) if self._seconds else '-':>{_CELL}}")
        if self._middling:
            line.append(f"{share(row.refused, row.count):>{_CELL}}", style="yellow" if row.refused else "dim")
        line.append(f"{share(row.failed, row.count):>{_CELL}}", style="bold red" if row.failed else "dim")
        for _, phase in _DURATIONS:
            durations = _durations(row, phase)
            for percentile in self._percentiles:
                text = short_duration(durations[percentile]) if durations else "-"
                line.append(f"{text:>{_CELL}}", style="" if durations else "dim")
        return line

    def rows(self, rows: Sequence[tuple[str, Row]], room: int) -> list[Text]:
        if room >= len(rows):
            return [self.row(name, row) for name, row in rows]
        hidden = len(rows) - room + 1
        return [
            *(self.row(name, row) for name, row in rows[: room - 1]),
            self._line(Text(f"… and {hidden} more"), "dim"),
        ]

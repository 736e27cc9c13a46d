"""Adds up requests by location and by upstream peer: how many, how many failed, and how long each phase took.

The phases come from `traces.phases`. Here an exchange is divided in two, and nginx's own time is one more phase.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from otel_nginx_ebpf.analysis.histogram import Histogram
from otel_nginx_ebpf.traces.phases import (
    DOWNSTREAM_READ,
    DOWNSTREAM_WRITE,
    UPSTREAM_CONNECT,
    UPSTREAM_EXCHANGE,
    Phase,
    phases_of,
    time_to_first_byte_ns,
)
from otel_nginx_ebpf.traces.record import Attempt, Request

PHASES = ("client read", "connect", "upstream wait", "upstream transfer", "client write", "nginx")
"""The names of the phases.

`upstream wait` lasts from the first byte sent to the first byte received, or to the end of an attempt without a
response. `upstream transfer` is the rest of the exchange. `nginx` is the time outside all other phases: nginx's own
work, and its own waits (for a limit, a resolver, a disk, another request for the same cache entry).
"""

READ, CONNECT, WAIT, TRANSFER, WRITE, NGINX = range(len(PHASES))
_INTERVAL_OF = {DOWNSTREAM_READ: READ, UPSTREAM_CONNECT: CONNECT, DOWNSTREAM_WRITE: WRITE}

ROWS_MAX = 200

OTHERS = ("", "(others)")
"""The row for keys that came when there were `ROWS_MAX` rows already."""

_CLIENT_CLOSED_REQUEST = 499

Interval = tuple[int, int, int]
"""Start and end in CLOCK_MONOTONIC nanoseconds, and the index of the phase in `PHASES`."""


@dataclass(slots=True)
class Row:
    """The sums of some requests, or of some attempts of a peer."""

    count: int = 0
    refused: int = 0
    """How many had a status of 4xx."""
    failed: int = 0
    """How many had a status of 5xx. An attempt without a status counts here, or as 4xx if the client left."""
    length: Histogram = field(default_factory=Histogram)
    """The durations. An attempt lasts from the beginning of its connect to the end of its exchange."""
    phases: tuple[Histogram, ...] = field(default_factory=lambda: tuple(Histogram() for _ in PHASES))
    """The durations of each phase. A phase that did not happen adds no duration."""
    time_ns: list[int] = field(default_factory=lambda: [0] * len(PHASES))
    """How the requests' time divides among the phases. If phases overlap, the first in `PHASES` has the time."""

    def merge(self, other: "Row") -> None:
        """Adds the sums of another row."""
        self.count += other.count
        self.refused += other.refused
        self.failed += other.failed
        self.length.merge(other.length)
        for mine, others in zip(self.phases, other.phases, strict=True):
            mine.merge(others)
        self.add_time(other.time_ns)

    def add(self, refused: bool, failed: bool, length_ns: int | None, intervals: Iterable[Interval]) -> None:
        """Counts a request or an attempt. `length_ns` is `None` if it has no phases."""
        self.count += 1
        self.refused += refused
        self.failed += failed
        if length_ns is not None:
            self.length.add(length_ns)
        for start_ns, end_ns, phase in intervals:
            self.phases[phase].add(end_ns - start_ns)

    def add_time(self, time_ns: Iterable[int]) -> None:
        self.time_ns = [mine + others for mine, others in zip(self.time_ns, time_ns, strict=True)]


class Tally:
    """The sums of a period's requests, in bounded memory."""

    def __init__(self) -> None:
        self.locations: dict[tuple[str, str], Row] = {}
        """By the first name of the server block and the name of the location; empty: no name."""
        self.peers: dict[tuple[str, str], Row] = {}
        """Attempts, by upstream and by the peer's address.

        The upstream is the name of the upstream block, or the host of a `proxy_pass` that uses no upstream block.
        """
        self.handshakes = Histogram()
        """How long the TLS handshakes before the connections' first requests took, from the accept on."""
        self.blocked = Histogram()
        """The longest turn of the worker's event loop in a request, for requests with one of 10 ms or more."""

    def add(self, request: Request, *also: Row) -> int:
        """Counts a request, also in the caller's rows. Returns how long the request took, in nanoseconds."""
        (start_ns, end_ns, *_), *phases = phases_of(request)
        intervals, of_attempts = _intervals(request, phases)
        time_ns = _divide(start_ns, end_ns, intervals)
        for row in (_row(self.locations, (request.server_name or "", request.location or "")), *also):
            row.add(400 <= request.status < 500, 500 <= request.status < 600, end_ns - start_ns, intervals)
            row.add_time(time_ns)
            row.phases[NGINX].add(time_ns[NGINX])
        for attempt, own in zip(request.attempts, of_attempts, strict=True):
            row = _row(self.peers, (attempt.upstream or "", attempt.peer or ""))
            status = attempt.status or (_CLIENT_CLOSED_REQUEST if request.status == _CLIENT_CLOSED_REQUEST else 502)
            row.add(400 <= status < 500, 500 <= status < 600, own[-1][1] - own[0][0] if own else None, own)
        for histogram, ns in ((self.handshakes, request.handshake_ns), (self.blocked, request.longest_turn_ns)):
            if ns is not None:
                histogram.add(ns)
        return end_ns - start_ns

    def merge(self, other: "Tally") -> None:
        """Adds the sums of another tally."""
        for mine, others in ((self.locations, other.locations), (self.peers, other.peers)):
            for key, row in others.items():
                _row(mine, key).merge(row)
        self.handshakes.merge(other.handshakes)
        self.blocked.merge(other.blocked)

    def total(self) -> Row:
        """Returns the sums of all requests."""
        total = Row()
        for row in self.locations.values():
            total.merge(row)
        return total


def _row(rows: dict[tuple[str, str], Row], key: tuple[str, str]) -> Row:
    row = rows.get(key)
    if row is None:
        row = rows.setdefault(key if len(rows) < ROWS_MAX else OTHERS, Row())
    return row


def _intervals(request: Request, phases: Iterable[Phase]) -> tuple[list[Interval], list[list[Interval]]]:
    """Returns the intervals of a request's phases, and the intervals of each attempt."""
    whole: list[Interval] = []
    of_attempts: list[list[Interval]] = [[] for _ in request.attempts]
    for start_ns, end_ns, kind, number, _ in phases:
        if kind == UPSTREAM_EXCHANGE:
            found = _exchange(request.attempts[number - 1], start_ns, end_ns)
        else:
            found = [(start_ns, end_ns, _INTERVAL_OF[kind])]
        whole += found
        if number:
            of_attempts[number - 1] += found
    return whole, of_attempts


def _exchange(attempt: Attempt, start_ns: int, end_ns: int) -> list[Interval]:
    if first_byte_ns := time_to_first_byte_ns(attempt):
        middle_ns = start_ns + first_byte_ns
    elif attempt.header_ms is not None:
        # If the time of the first byte is not known, nginx's own clock tells when the header was complete.
        middle_ns = (attempt.connect_start_mono_ns or start_ns) + attempt.header_ms * 1_000_000
    else:
        middle_ns = end_ns
    middle_ns = min(max(middle_ns, start_ns), end_ns)
    both = (start_ns, middle_ns, WAIT), (middle_ns, end_ns, TRANSFER)
    return [interval for interval in both if interval[1] > interval[0]]


def _divide(start_ns: int, end_ns: int, intervals: Iterable[Interval]) -> list[int]:
    """Returns how much of the time each phase has. If phases overlap, the first in `PHASES` has the time."""
    time_ns = [0] * len(PHASES)
    last_ns = start_ns
    for begin_ns, stop_ns, phase in sorted(intervals):
        if begin_ns < last_ns:
            return _divide_overlapping(start_ns, end_ns, intervals)
        time_ns[phase] += stop_ns - begin_ns
        last_ns = stop_ns
    time_ns[NGINX] = max(end_ns - start_ns - sum(time_ns), 0)
    return time_ns


def _divide_overlapping(start_ns: int, end_ns: int, intervals: Iterable[Interval]) -> list[int]:
    time_ns = [0] * len(PHASES)
    under_way = [0] * len(PHASES)
    under_way[NGINX] = 1
    turns = [(begin_ns, phase, 1) for begin_ns, _, phase in intervals]
    turns += [(stop_ns, phase, -1) for _, stop_ns, phase in intervals]
    now_ns = start_ns
    for turn_ns, phase, change in sorted(turns):
        if turn_ns > now_ns:
            time_ns[_first(under_way)] += turn_ns - now_ns
            now_ns = turn_ns
        under_way[phase] += change
    time_ns[NGINX] += max(end_ns - now_ns, 0)
    return time_ns


def _first(under_way: list[int]) -> int:
    for phase, number in enumerate(under_way):
        if number:
            return phase
    return NGINX

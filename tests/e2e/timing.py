"""Checks a trace's times against nginx's times: order, nesting, and nginx's millisecond clock.

nginx reads the clock once in each turn of its event loop. Every time that nginx logs is this cached reading, cut to
milliseconds. So the cached clock is never ahead of the true clock (except for rounding). It is behind by as long as
the turn has lasted: microseconds on an idle machine. If the scheduler takes a worker off the processor in the middle
of a turn, the clock is behind by the whole pause. Tests share two cores with an upstream, a client and the agent, and
pauses of several scheduler slices were seen. LAG_MAX_MS allows such pauses, and so does the time that the kernel
counted for the workers (NginxServer.off_processor_ms). The medians show that pauses are rare.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from statistics import median

from e2e.agent_process import Span, Trace
from e2e.nginx_server import PATIENCE, LogLine
from e2e.oracle import LoggedAttempt, TracedAttempt, pair_attempts, traced_attempts

EARLY_MAX_MS = 2.0
"""How far a true time may lie before nginx's time: both ends of a difference are cut to a millisecond."""
LAG_MAX_MS = 50.0
"""The limit beyond the pauses that the kernel counted: for pauses that only the machine's hypervisor knows."""
LONG_TURN_MS = 1000.0
"""The limit for responses so large that nginx writes them in a single long turn."""
MEDIAN_MAX_MS = 3.0
MEDIAN_SAMPLES_MIN = 5
"""With fewer samples one unlucky turn decides the median, so only LAG_MAX_MS applies."""


@dataclass(frozen=True)
class Slack:
    """Says where nginx's times and the trace's times mean different moments, and why.

    Milliseconds are for a real machine. An emulated machine has PATIENCE times as many."""

    end_early: bool = False
    """nginx logs later than the response's last byte: it waits for the request's body, or for a mirror."""
    header_early: bool = False
    """The upstream's first byte arrives long before its header is complete."""
    first_byte_unseen: bool = False
    """A TLS upstream may send a session ticket before its answer; the socket does not show which bytes are which."""
    response_early: bool = False
    """nginx gives the upstream up some time after its last byte: a timeout, or the client has left."""
    write_early: bool = False
    """The client got bytes before the upstream answered: 100 Continue, or a page made of several responses."""
    client_status: int | None = None
    """The status that the client got, if nginx logs the status of a post_action instead."""
    early_max_ms: float = EARLY_MAX_MS
    """How early a start may be if it comes from nginx's own clocks."""
    late_max_ms: float = LAG_MAX_MS
    median_max_ms: float = MEDIAN_MAX_MS


NO_SLACK = Slack()
CROWDED = Slack(late_max_ms=100)
"""Many clients at once, on the cores that nginx uses: some turns are long, but the medians do not change."""
ONE_TURN = Slack(late_max_ms=100, median_max_ms=15)
"""One turn of the event loop handles many requests. nginx's clock stands still during the turn."""


@dataclass
class Lags:
    """True time minus nginx's time, in milliseconds, for every checked request."""

    values_ms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, lag_ms: float, low_ms: float, high_ms: float) -> Iterator[str]:
        """Add a lag. A lag without a lower limit says nothing about nginx's clock, so the median leaves it out."""
        if low_ms > -inf:
            self.values_ms.setdefault(name, []).append(lag_ms)
        if not low_ms <= lag_ms <= high_ms:
            yield f"{name}: {lag_ms:+.3f} ms from nginx's, not within {low_ms} to {high_ms}"

    def check_medians(self, max_ms: float = MEDIAN_MAX_MS) -> list[str]:
        return [
            f"{name}: median lag {median(map(abs, lags)):.3f} ms over {len(lags)}"
            for name, lags in self.values_ms.items()
            if len(lags) >= MEDIAN_SAMPLES_MIN and median(map(abs, lags)) > max_ms * PATIENCE
        ]


def _check_order(trace: Trace, slack: Slack) -> Iterator[str]:
    server = trace.server
    for span in trace.spans:
        if span.end_unix_ns <= span.start_unix_ns:
            yield f"{span.name} lasts {span.end_unix_ns - span.start_unix_ns} ns"
        if span.start_unix_ns < server.start_unix_ns or span.end_unix_ns > server.end_unix_ns:
            after_ns, before_ns = (
                span.start_unix_ns - server.start_unix_ns,
                server.end_unix_ns - span.end_unix_ns,
            )
            yield f"{span.name} leaves its parent: starts {after_ns} ns after it, ends {before_ns} ns before it"
    for read in trace.named("downstream read"):
        if read.start_unix_ns != server.start_unix_ns:
            yield f"downstream read starts {read.start_unix_ns - server.start_unix_ns} ns after SERVER"
    previous_end = 0
    for attempt in traced_attempts(trace):
        if attempt.connect and attempt.exchange and attempt.connect.end_unix_ns > attempt.exchange.start_unix_ns:
            yield "the exchange starts before its connect ends"
        if attempt.spans[0].start_unix_ns < previous_end:
            yield "an attempt starts before the one before it ended"
        previous_end = attempt.spans[-1].end_unix_ns
    answered = [
        attempt.exchange
        for attempt in traced_attempts(trace)
        if attempt.exchange and "http.response.status_code" in attempt.exchange.attributes
    ]
    for exchange in answered:
        if _first_byte_unix_ns(exchange) is None and not slack.first_byte_unseen:
            yield "an answered exchange has no time to its first byte"
    first_byte_unix_ns = _first_byte_unix_ns(answered[-1]) if answered and not slack.write_early else None
    for write in trace.named("downstream write"):
        if first_byte_unix_ns is not None and write.start_unix_ns < first_byte_unix_ns:
            yield "downstream write starts before the upstream's answer"


def _first_byte_unix_ns(exchange: Span) -> int | None:
    after_ns: int | None = exchange.attributes.get("nginx.upstream.time_to_first_byte_ns")
    return None if after_ns is None else exchange.start_unix_ns + after_ns


def _milliseconds(seconds: str) -> float | None:
    return None if seconds == "-" else float(seconds) * 1000


def _check_attempt(attempt: TracedAttempt, logged: LoggedAttempt, slack: Slack, lags: Lags) -> Iterator[str]:
    """Compare durations from the attempt's start. The clock may lag at either end, so nginx's time may be longer."""
    start_unix_ns = attempt.spans[0].start_unix_ns
    connect_ms, header_ms = _milliseconds(logged.connect_time), _milliseconds(logged.header_time)
    response_ms = _milliseconds(logged.response_time)

    def compare(name: str, end_unix_ns: int, logged_ms: float, early: bool = False) -> Iterator[str]:
        low_ms = -inf if early else -slack.late_max_ms
        return lags.add(name, (end_unix_ns - start_unix_ns) / 1e6 - logged_ms, low_ms, slack.late_max_ms)

    if connect_ms is not None and attempt.connect:
        yield from compare("connect", attempt.connect.end_unix_ns, connect_ms)
    elif connect_ms is not None and connect_ms > slack.late_max_ms:
        yield f"reused connection, but nginx took {connect_ms} ms to connect"
    first_byte_unix_ns = _first_byte_unix_ns(attempt.exchange) if attempt.exchange else None
    if first_byte_unix_ns is not None and header_ms is not None:
        yield from compare("header", first_byte_unix_ns, header_ms, slack.header_early)
    if response_ms is not None:
        yield from compare("response", attempt.spans[-1].end_unix_ns, response_ms, slack.response_early)


def check_times(trace: Trace, log: LogLine, lags: Lags, slack: Slack) -> list[str]:
    """Return every violation as text; add the lags to `lags`."""
    violations = list(_check_order(trace, slack))
    end_ms = round(float(log["msec"]) * 1000)
    start_ms = end_ms - round(float(log["request_time"]) * 1000)
    # Subtract integers first: a Unix time in nanoseconds does not fit in a float.
    end_lag_ms = (trace.server.end_unix_ns - end_ms * 1_000_000) / 1e6
    start_lag_ms = (trace.server.start_unix_ns - start_ms * 1_000_000) / 1e6
    violations += lags.add("end", end_lag_ms, -inf if slack.end_early else -EARLY_MAX_MS, slack.late_max_ms)
    violations += lags.add("start", start_lag_ms, -slack.early_max_ms, slack.late_max_ms)
    for attempt, logged in pair_attempts(trace, log):
        violations += _check_attempt(attempt, logged, slack, lags)
    return violations

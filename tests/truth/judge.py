"""Judges whether a trace is true, by nginx's log, what the client knows, and what the upstream saw."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from e2e.agent_process import Span, Trace
from e2e.nginx_server import LogLine
from e2e.oracle import check_facts, logged_attempts
from e2e.timing import LAG_MAX_MS, Lags, Slack, check_times

from truth.knowledge import Known
from truth.pauses import Pauses
from truth.witness import Seen

CLOCK_NS = 1_000_000
"""How far the trace's clock and the clocks of the processes may differ."""
CLIENT_LAG_MS = 100.0
"""The clients are threads of one interpreter, so each waits for its turn."""
NO_STATUS_LINE = 9
"""The status that nginx gives to an HTTP/0.9 answer from an upstream, and passes on."""
UPSTREAM_LAG_MS = 60.0
"""One process serves all upstreams, one request after another."""


@dataclass
class Case:
    """All that is known of a request that nginx logged."""

    log: LogLine
    trace: Trace
    known: Known | None
    seen: list[Seen]
    """The upstreams' requests with this id. Requests that nginx sends to itself share their id."""
    subrequests: list[LogLine]
    features: frozenset[str]
    """Features of the requested location, and of the locations that the request leads to."""
    lag_ms: float = LAG_MAX_MS
    violations: list[str] = field(default_factory=list)
    """What `judge` found."""

    @property
    def complete(self) -> bool:
        """Whether the client got the whole response or, if the client cannot know, whether nginx says so."""
        known = self.known
        if known and known.whole and not known.by_the_end:
            return True  # with slices and limit_rate nginx does not always say so
        cut_off = (
            known is not None
            and not (known.whole or known.left_ns or known.problem)
            # If nginx closes a connection while the client still sends, it is reset, and bytes in flight are lost.
            and (known.http2 or not (known.shared or known.ask.body))
        )
        return self.log["request_completion"] == "OK" and not cut_off

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.log["request_uri"]).query)


def kind_of(violation: str) -> str:
    """Return the violation without the parts that differ between requests."""
    text = re.sub(r"'[^']*'", "'…'", violation)
    text = re.sub(r"\['…'(, '…')*\]", "['…']", text)
    text = re.sub(r"\b(unix:\S+|\[?[\w:.]+\]?:\d+)", "PEER", text)
    return re.sub(r"[-+]?\d+(\.\d+)?", "N", text)[:160]


def judge(case: Case, pauses: Pauses) -> list[str]:
    """Return every violation as text."""
    case.lag_ms = LAG_MAX_MS + pauses.between_ms(*_between(case))
    known = case.known
    log = dict(case.log)
    if known:
        # After an internal redirect nginx's variables belong to the other location.
        log |= {"request_method": known.ask.method}
        if "post_action" in case.features:  # nginx logs the status of the action
            traced = case.trace.server.attributes.get("http.response.status_code", 0)
            log |= {"status": str(traced if known.status is None else known.status)}
    violations = []
    try:
        violations += [text for text in check_facts(case.trace, log) if case.complete or not _is_status(text)]
        violations += check_times(case.trace, log, Lags(), _slack(case))
    except ValueError as error:  # the facts already have a wrong number of attempts; report other errors here
        violations += [f"the oracle: {error}"] if not violations else []
    violations += _check_end(case)
    violations += _check_subrequests(case)
    if known:
        violations += _check_client(case, known)
    violations += _check_upstream(case)
    return violations


def _between(case: Case) -> tuple[int, int]:
    """Return the time from the request's beginning to the last event that anybody recorded."""
    end_ns = round(float(case.log["msec"]) * 1000) * 1_000_000
    begin_ns = end_ns - round(float(case.log["request_time"]) * 1000) * 1_000_000
    known = case.known
    told = [known.first_byte_ns, known.last_byte_ns, known.left_ns, known.all_sent_ns] if known else []
    told += [each.first_byte_ns for each in case.seen]
    return begin_ns, max(end_ns, case.trace.server.end_unix_ns, *(at_ns for at_ns in told if at_ns))


def _is_status(text: str) -> bool:
    return text.startswith(("error.type:", "span status:"))


def _slack(case: Case) -> Slack:
    features, query = case.features, case.query
    known = case.known
    expect = known is not None and known.ask.body_mode == "expect"
    put_together = features & {"parts", "hints", "filter", "cache", "post_action", "slice"} or "ssi" in features
    slow_client = (known is not None and known.ask.slow_reader) or bool(features & {"limit_rate"})
    return Slack(
        # A whole response ends with its last byte, which the client knows. nginx logs later, when all is done.
        end_early=case.complete or known is None,
        header_early="head_ms" in query or expect,
        first_byte_unseen="tls_upstream" in features,
        response_early=("unbuffered" in features and (slow_client or "parts" in features))
        or bool(features & {"grpc", "memcached"}),
        write_early=bool(expect or put_together or "early" in query),
        late_max_ms=case.lag_ms,
    )


def _check_end(case: Case) -> Iterator[str]:
    """Check that an incomplete response shows a failure, and that a complete response shows no failure."""
    server = case.trace.server
    told = server.attributes.get("nginx.termination")
    failed = server.status == "ERROR"
    status = int(case.log["status"])
    if case.complete:
        whole = case.known is None or (case.known.whole and not case.known.by_the_end)
        # A mirror ends when the client leaves. If the length of the response is unknown, nothing shows that it was
        # whole.
        if told and whole and not (told == "client_closed_request" and case.features & {"mirror", "post_action"}):
            yield f"complete, but nginx.termination is {told}"
        return
    if status >= 400:
        return  # the status shows the failure, as with `return 444`
    if not told and not failed:
        why = "its client left" if case.known and case.known.left_ns else "nobody knows why"
        why = "its upstream broke off" if _upstream_broke(case) else why
        yield f"incomplete response, {why}: looks well, status {status}"
    ends = set(case.query.get("end", []))
    if _upstream_broke(case) and not failed:
        yield "the upstream broke the response off: no error"
    left_ns = case.known.left_ns if case.known else None
    if left_ns and left_ns < server.end_unix_ns and failed and not {"truncate", "abort", "garble"} & ends:
        yield f"the client left: an error, {server.error}"


def _upstream_broke(case: Case) -> bool:
    """Return whether the upstream broke off after it began to answer, while the client stayed to the end."""
    known = case.known
    if (
        known is None
        or known.left_ns
        or known.whole
        or (known.shared and not known.http2)
        or case.log["status"] >= "400"
    ):
        return False
    broken = bool({"truncate", "abort"} & set(case.query.get("end", [])))
    return broken and any(not seen.sub and seen.sent_bytes for seen in case.seen)


def _check_subrequests(case: Case) -> Iterator[str]:
    """Check attempts of subrequests. nginx logs the subrequests that ended by themselves."""
    logged = Counter(
        (line["uri"], each.peer) for line in case.subrequests for each in logged_attempts(line) if ":" in each.peer
    )
    traced: Counter[tuple[str, str]] = Counter()
    spans = [span for span in case.trace.spans if span.name.startswith("upstream")]
    for span in {span.attributes["nginx.upstream.attempt"]: span for span in spans}.values():
        uri = span.attributes.get("nginx.subrequest.uri", "")
        # An attempt without a status still ran when the request ended, and so did its subrequest.
        if uri.startswith("/sub/") and "nginx.upstream.status" in span.attributes:
            traced[uri, span.attributes["nginx.upstream.peer"]] += 1
    missing, surplus = logged - traced, traced - logged
    if case.trace.server.attributes.get("nginx.upstream.attempts_lost"):
        return
    for (uri, peer), count in missing.items():
        yield f"subrequest {uri}: {count} attempts at {peer} are logged and not traced"
    if case.known and case.known.whole and not case.known.http2 and case.complete:
        for (uri, peer), count in surplus.items():
            yield f"subrequest {uri}: {count} attempts at {peer} are traced and not logged"


def _check_client(case: Case, known: Known) -> Iterator[str]:
    trace, lag_ns = case.trace, round((case.lag_ms + CLIENT_LAG_MS) * 1e6)
    server, status = trace.server, int(case.log["status"])
    late_children = [span for span in trace.spans[1:] if span.name.startswith("upstream")]

    def outside(what: str, at_ns: int, low_ns: int | None, high_ns: int | None) -> Iterator[str]:
        if low_ns is not None and at_ns < low_ns:
            yield f"{what}: {(low_ns - at_ns) / 1e6:.1f} ms too early"
        if high_ns is not None and at_ns > high_ns:
            yield f"{what}: {(at_ns - high_ns) / 1e6:.1f} ms too late"

    if known.sent_ns is None or status == NO_STATUS_LINE:
        return  # the client could not tell one answer from the next
    # There is no upper limit here: a request may wait for nginx. The check with nginx's clock covers that.
    yield from outside(
        "SERVER starts, by the client's first byte", server.start_unix_ns, known.sent_ns - CLOCK_NS, None
    )
    acted = "post_action" in case.features  # nginx logs the result of the post action
    if known.status is not None and status not in (444, 499) and known.status != status and not acted:
        yield f"the client got {known.status}, nginx logged {status}"
    for read in trace.named("downstream read"):
        # nginx reads a large body when it needs it, but a stream's frames as they arrive.
        done_ns = known.all_sent_ns if known.http2 or not (known.shared or known.ask.body) else None
        done_ns = done_ns and max(done_ns, server.start_unix_ns)
        yield from outside(
            "downstream read ends, by the client's last byte", read.end_unix_ns, None, done_ns and done_ns + lag_ns
        )
    for write in trace.named("downstream write"):
        if known.first_byte_ns:
            yield from outside(
                "downstream write starts, by the client", write.start_unix_ns, None, known.first_byte_ns + CLOCK_NS
            )
        elif known.left_ns is None and not known.problem and not known.shared and known.ask.body_mode != "expect":
            yield "downstream write, but the client got nothing"
        if known.last_byte_ns:
            busy = known.all_sent_ns is None or write.end_unix_ns < known.all_sent_ns
            slow = known.ask.slow_reader or known.shared or busy
            low_ns = None if slow else known.last_byte_ns - lag_ns
            yield from outside(
                "downstream write ends, by the client", write.end_unix_ns, low_ns, known.last_byte_ns + lag_ns
            )
    if known.last_byte_ns and not trace.named("downstream write"):
        yield "the client got a whole response, but no downstream write"
    if known.last_byte_ns and case.complete:
        ends = [known.last_byte_ns, *(span.end_unix_ns for span in late_children)]
        yield from outside("SERVER ends, by the client's last byte", server.end_unix_ns, None, max(ends) + lag_ns)


def _check_upstream(case: Case) -> Iterator[str]:
    """Check exchanges by what the upstreams recorded: which requests they saw, when, and how many bytes."""
    lag_ns = round((case.lag_ms + UPSTREAM_LAG_MS) * 1e6)
    addresses = {seen.address for seen in case.seen}
    exchanges = [
        span
        for span in sorted(case.trace.named("upstream exchange"), key=lambda span: span.start_unix_ns)
        if span.attributes["nginx.upstream.peer"] in addresses
    ]
    begun = [span for span in exchanges if span.attributes.get("http.request.size")]
    if len(begun) < len(case.seen):
        peers = [(seen.sub, seen.address) for seen in case.seen]
        yield f"upstreams saw {len(case.seen)} requests, the trace has {len(begun)} exchanges: {peers}"
        return
    for seen, span in _pairs(case.seen, begun):
        begun.remove(span)
        yield from _check_exchange(case, span, seen, lag_ns)
    for span in begun:
        if span.attributes.get("http.response.status_code"):
            yield f"an answered exchange that no upstream saw, {span.attributes['nginx.upstream.peer']}"


def _pairs(seen: list[Seen], spans: list[Span]) -> list[tuple[Seen, Span]]:
    """Pair each request that an upstream saw with an exchange of the same subrequest, peer and size.

    Several such requests are paired in order of time. If the numbers differ, a request gets the exchange that began
    nearest to it.
    """
    pairs: list[tuple[Seen, Span]] = []
    rest, left = list(spans), []
    for key in dict.fromkeys((each.sub, each.address, each.received_bytes) for each in seen):
        same = [each for each in seen if (each.sub, each.address, each.received_bytes) == key]
        own = [span for span in rest if _key(span) == key]
        if len(same) == len(own):
            pairs += zip(same, own, strict=True)
            rest = [span for span in rest if span not in own]
        else:
            left += same
    for each in left:
        candidates = [span for span in rest if span.attributes["nginx.upstream.peer"] == each.address]

        def distance(span: Span, each: Seen = each) -> tuple[bool, int]:
            return _key(span)[0] != each.sub, abs(span.start_unix_ns - each.first_byte_ns)

        if nearest := min(candidates, key=distance, default=None):
            rest.remove(nearest)
            pairs.append((each, nearest))
    return pairs


def _key(span: Span) -> tuple[str, str, int]:
    attributes = span.attributes
    uri = attributes.get("nginx.subrequest.uri", "")
    sub = uri.removeprefix("/sub/") if uri.startswith("/sub/") else ""
    return sub, attributes["nginx.upstream.peer"], attributes["http.request.size"]


def _check_exchange(case: Case, span: Span, seen: Seen, lag_ns: int) -> Iterator[str]:
    attributes = span.attributes
    early_ms = (seen.first_byte_ns - span.start_unix_ns) / 1e6
    ready_ns = max(span.start_unix_ns, seen.ready_ns) if seen.number > 1 else span.start_unix_ns
    if early_ms < -CLOCK_NS / 1e6 or seen.first_byte_ns > ready_ns + lag_ns:
        yield f"exchange starts {early_ms:.1f} ms before its upstream saw it"
    reused = attributes.get("nginx.upstream.connection.reused")
    if reused is not (seen.number > 1):
        yield f"reused is {reused}, the upstream says it was the connection's request {seen.number}"
    if not reused and span.start_unix_ns < seen.accepted_ns - lag_ns:
        yield "exchange starts before its upstream saw the connection"
    answered = seen.first_sent_ns is not None
    first_ns = attributes.get("nginx.upstream.time_to_first_byte_ns")
    if first_ns is not None and not answered:
        yield "time to first byte, but the upstream never answered"
    elif first_ns is not None and seen.first_sent_ns is not None:
        late_ms = (span.start_unix_ns + first_ns - seen.first_sent_ns) / 1e6
        if not -CLOCK_NS / 1e6 <= late_ms <= lag_ns / 1e6 and "tls_upstream" not in case.features:
            yield f"first byte of the answer: {late_ms:.1f} ms after its upstream sent it"
    size = attributes.get("http.request.size", 0)
    if size != seen.received_bytes and (seen.kept or size < seen.received_bytes):
        yield f"sent upstream: {size} bytes, the upstream received {seen.received_bytes}"
    if attributes.get("http.response.size", 0) > seen.sent_bytes:
        yield f"received upstream: {attributes['http.response.size']} bytes, the upstream sent {seen.sent_bytes}"
    if seen.kept and case.complete and seen.last_sent_ns:
        quick = not case.features & {"unbuffered", "limit_rate", "parts"} and not (
            case.known and case.known.ask.slow_reader
        )
        late_ms = (span.end_unix_ns - seen.last_sent_ns) / 1e6
        if late_ms > lag_ns / 1e6 and quick and attributes.get("http.response.size") == seen.sent_bytes < 200_000:
            yield f"exchange ends {late_ms:.1f} ms after its upstream's last byte"

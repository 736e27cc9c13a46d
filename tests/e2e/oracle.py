"""Checks the exact facts of a trace against the line that nginx itself logged for the request.

`timing.py` checks times. Every check returns its violations as text, so that one run shows all violations.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from e2e.agent_process import Span, Trace
from e2e.nginx_server import NGINX, LogLine, nginx_build
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.layouts import layout_for
from otel_nginx_ebpf.planner.plan import tells_limit_statuses

CHILDREN = {"downstream read", "upstream connect", "upstream exchange", "downstream write"}
KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"}

# An HTTP/0.9 request has no version in its text.
PROTOCOL_VERSIONS = {"HTTP/1.0": "1.0", "HTTP/1.1": "1.1", "HTTP/2.0": "2", "HTTP/3.0": "3"}

ATTEMPTS_MAX = 32
"""Further attempts have no spans. nginx.upstream.attempts_lost counts them."""
URI_BYTES_MAX, USER_AGENT_BYTES_MAX = 4096, 1024
"""Longer values are cut, and named in nginx.truncated_attributes."""


GIVEN_UP = {"client_closed_request", "timeout"}
"""Values of nginx.termination if the client was the cause. Then no span is an ERROR, even without an answer."""
FAULTS = {"upstream_incomplete", "upstream_timeout", "shutdown", "aborted"}
"""Values of nginx.termination if nginx did not complete a response. The access log does not show this."""


@dataclass(frozen=True)
class LoggedAttempt:
    """An element of the `$upstream_*` lists, in nginx's text. `-` and empty mean no value."""

    peer: str
    status: str
    connect_time: str
    header_time: str
    response_time: str
    bytes_sent: str
    bytes_received: str


def logged_attempts(log: LogLine) -> list[LoggedAttempt]:
    """Split nginx's lists, in order of time. `, ` separates peers, ` : ` the groups of an internal redirect."""
    names = ("addr", "status", "connect_time", "header_time", "response_time", "bytes_sent", "bytes_received")
    if not log["upstream_addr"]:
        return []
    columns = [re.split(r", | : ", log[f"upstream_{name}"]) for name in names]
    return [LoggedAttempt(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class TracedAttempt:
    """The spans of an attempt. At least one of them exists."""

    connect: Span | None
    exchange: Span | None

    @property
    def spans(self) -> list[Span]:
        return [span for span in (self.connect, self.exchange) if span]


def traced_attempts(trace: Trace, subrequests: bool = False) -> list[TracedAttempt]:
    """Return the attempts of the main request, or of the subrequests, in the order of their numbers."""
    numbered: dict[int, dict[str, Span]] = {}
    for span in _attempt_spans(trace):
        if ("nginx.subrequest.uri" in span.attributes) == subrequests:
            numbered.setdefault(span.attributes["nginx.upstream.attempt"], {})[span.name] = span
    return [
        TracedAttempt(spans.get("upstream connect"), spans.get("upstream exchange"))
        for _, spans in sorted(numbered.items())
    ]


def _attempt_spans(trace: Trace) -> list[Span]:
    return trace.named("upstream connect") + trace.named("upstream exchange")


def _differ(what: str, traced: Any, logged: Any) -> Iterator[str]:
    if traced != logged:
        yield f"{what}: trace says {traced!r}, nginx logged {logged!r}"


def _cache_status(log: LogLine) -> str | None:
    if not nginx_build().startswith("nginx version: nginx/"):
        return None  # a fork may keep it elsewhere
    return log.get("upstream_cache_status") or None


@functools.cache
def _limits_are_told() -> bool:
    return tells_limit_statuses(layout_for(Binary(NGINX)))


def _check_server(server: Span, log: LogLine) -> Iterator[str]:
    attributes = server.attributes
    status, length = int(log["status"]), int(log["request_length"])
    yield from _differ("kind", server.kind, "SERVER")
    if not any(log[header] for header in ("http_traceparent", "http_b3", "http_x_b3_traceid")):
        yield from _differ("parent", server.parent_span_id, None)
    # 000 and 009: nginx sent no status. A module made up any other status outside 100 to 599.
    yield from _differ("status", attributes.get("http.response.status_code"), status if 100 <= status < 600 else None)
    yield from _differ("request size", attributes.get("http.request.size"), length if length >= 0 else None)
    yield from _differ("response size", attributes.get("http.response.size"), int(log["bytes_sent"]))
    yield from _differ("connection", attributes.get("nginx.connection.id"), int(log["connection"]))
    yield from _differ(
        "connection requests", attributes.get("nginx.connection.requests"), int(log["connection_requests"])
    )
    yield from _differ("cache", attributes.get("nginx.cache.status"), _cache_status(log))
    for limit in ("limit_req", "limit_conn"):
        told = log.get(f"{limit}_status") or None if _limits_are_told() else None
        yield from _differ(limit, attributes.get(f"nginx.{limit}.status"), told)
    yield from _differ("worker", attributes.get("nginx.worker.pid"), int(log["pid"]))
    if "nginx.tls.handshake.duration_ns" in attributes and (
        not log["ssl_protocol"] or log["connection_requests"] != "1"
    ):
        yield "a handshake, but not of a connection's first request over TLS"
    blocked_ns = attributes.get("nginx.worker.longest_turn_ns")
    if blocked_ns is not None and not 10_000_000 <= blocked_ns <= server.end_unix_ns - server.start_unix_ns:
        yield f"a turn of {blocked_ns} ns in a request of {server.seconds} s"
    termination = attributes.get("nginx.termination")
    if termination not in GIVEN_UP | FAULTS | {None}:
        yield f"nginx.termination is {termination!r}"
    if status == 499 and log["bytes_sent"] == "0":
        yield from _differ("termination", termination, "client_closed_request")
    error = str(status) if 500 <= status < 600 else termination if termination in FAULTS else None
    yield from _differ("error.type", attributes.get("error.type"), error)
    yield from _differ("span status", server.status, "ERROR" if error else "UNSET")

    # A request has no method, version and URI if nginx could not read its first line. An internal redirect overwrites
    # $request_method, but not $request.
    method, route = log["request_method"] and log["request"].partition(" ")[0], attributes.get("http.route")
    original = attributes.get("http.request.method_original")
    if status in (400, 505) and attributes.get("http.request.method") == "_OTHER" and original is None:
        method = ""  # with error_page, nginx logs GET
    known = method if method in KNOWN_METHODS else "_OTHER"
    yield from _differ("method", attributes.get("http.request.method"), known)
    yield from _differ("original method", original, method if method and known == "_OTHER" else None)
    name = method if method in KNOWN_METHODS else "HTTP"
    yield from _differ("name", server.name, f"{name} {route}" if route else name)
    version = PROTOCOL_VERSIONS.get(log["server_protocol"], "0.9" if method and not log["server_protocol"] else None)
    yield from _differ("protocol", attributes.get("network.protocol.version"), version)
    path, query = attributes.get("url.path", ""), attributes.get("url.query", "")
    agent, truncated = attributes.get("user_agent.original", ""), set(attributes.get("nginx.truncated_attributes", ()))
    texts = (
        ("url.query" if query else "url.path", f"{path}?{query}" if query else path, "request_uri", URI_BYTES_MAX),
        ("user_agent.original", agent, "http_user_agent", USER_AGENT_BYTES_MAX),
    )
    for name, traced, logged, bytes_max in texts:
        whole = log[logged].encode()
        # An empty query is absent.
        kept = whole[:bytes_max].decode("utf-8", "backslashreplace").removesuffix("?")
        yield from _differ(name, traced, kept)
        yield from _differ(f"{name} truncated", name in truncated, len(whole) > bytes_max)

    if log["remote_addr"] == "unix:":
        yield from _differ("client port", attributes.get("client.port"), None)
    else:
        yield from _differ("client address", attributes.get("client.address"), log["remote_addr"])
        # An address from a header (realip) has no port.
        port = int(log["remote_port"]) if log["remote_port"] else None
        yield from _differ("client port", attributes.get("client.port"), port)
    if not (log["http_forwarded"] or log["http_x_forwarded_proto"]):  # nginx itself does not look there
        yield from _differ("scheme", attributes.get("url.scheme"), "https" if log["ssl_protocol"] else "http")


def _check_tree(trace: Trace) -> Iterator[str]:
    ids = [span.span_id for span in trace.spans]
    if len(set(ids)) != len(ids):
        yield f"span ids repeat: {ids}"
    if not re.fullmatch("[0-9a-f]{32}", trace.trace_id) or not any(int(id_, 16) for id_ in [trace.trace_id]):
        yield f"trace id {trace.trace_id}"
    if [span.kind for span in trace.spans].count("SERVER") != 1:
        yield "not exactly one SERVER span"
    for name in ("downstream read", "downstream write"):
        if len(trace.named(name)) > 1:
            yield f"{len(trace.named(name))} spans {name}"
    for span in trace.spans[1:]:
        if span.name not in CHILDREN:
            yield f"a span {span.name!r}"
        # A connect that failed is all that a peer saw of the request.
        asks = span.name == "upstream exchange" or (span.name == "upstream connect" and span.status == "ERROR")
        yield from _differ(f"{span.name} kind", span.kind, "CLIENT" if asks else "INTERNAL")
        yield from _differ(f"{span.name} parent", span.parent_span_id, trace.server.span_id)
    for span in trace.spans:
        error = span.attributes.get("error.type")
        if span.error != error or span.status != ("ERROR" if error else "UNSET"):
            yield f"{span.name}: status {span.status} {span.error!r}, error.type {error!r}"


def _check_attempt_numbers(trace: Trace) -> Iterator[str]:
    """Check that the trace's attempts have the numbers 1, 2, …, each with at most one connect and one exchange."""
    spans = _attempt_spans(trace)
    numbers = {span.attributes.get("nginx.upstream.attempt") for span in spans}
    count = trace.server.attributes.get("nginx.upstream.attempts", 0)
    yield from _differ("attempt numbers", numbers, set(range(1, count + 1)))
    if len({(span.name, span.attributes.get("nginx.upstream.attempt")) for span in spans}) != len(spans):
        yield "an attempt has two spans of one name"


def _check_attempt(attempt: TracedAttempt, logged: LoggedAttempt | None, given_up: bool) -> Iterator[str]:
    """Check an attempt's facts.

    Args:
        attempt: The spans.
        logged: The log element; `None` for a subrequest's attempt, which nginx's log does not show.
        given_up: The attempt may have ended because the client left.
    """
    connect, exchange = attempt.connect, attempt.exchange
    for span in attempt.spans:
        peer = span.attributes.get("nginx.upstream.peer", "")
        host, _, port = peer.rpartition(":")
        unix = peer.startswith("unix:")
        expected = (peer.removeprefix("unix:") or None, None) if unix else (host.strip("[]"), port)
        number = span.attributes.get("network.peer.port")
        traced = span.attributes.get("network.peer.address"), None if number is None else str(number)
        yield from _differ(f"{span.name} peer address", traced, expected)
        for name in ("http.request.method", "server.address"):
            yield from _differ(f"{span.name} has {name}", name in span.attributes, span.kind == "CLIENT")
        if logged:
            yield from _differ(f"{span.name} peer", peer, logged.peer)
    if connect and (connect.status == "ERROR") != (exchange is None) and not given_up:
        yield f"connect is {connect.status}, {'with' if exchange else 'without'} an exchange"
    if logged and logged.connect_time == "-" and exchange:
        yield f"an exchange on a connection that nginx never had ready: {logged}"
    if not exchange:
        if logged and (logged.bytes_received not in ("0", "-") or logged.header_time != "-"):
            yield f"no exchange, but nginx logged {logged}"
        return
    yield from _differ("reused", exchange.attributes.get("nginx.upstream.connection.reused"), connect is None)
    status = exchange.attributes.get("http.response.status_code")
    broken = exchange.error in ("timeout", "incomplete_response")
    answered = logged is not None and logged.header_time != "-"
    # For an answer without a status line nginx logs no status if it caches, else 009.
    made_up = logged is not None and answered and not (logged.status.isdigit() and 100 <= int(logged.status) < 600)
    if not (given_up and status is None) and not broken and not made_up:
        yield from _differ("exchange fails", exchange.status, "ERROR" if status is None or status >= 400 else "UNSET")
    if logged:
        known = int(logged.status) if answered and not made_up else None
        yield from _differ("exchange status", status, known)
        yield from _differ("sent upstream", exchange.attributes.get("http.request.size"), int(logged.bytes_sent))
        yield from _differ(
            "received upstream", exchange.attributes.get("http.response.size"), int(logged.bytes_received)
        )


def pair_attempts(trace: Trace, log: LogLine) -> list[tuple[TracedAttempt, LoggedAttempt]]:
    """Return each attempt of the main request with its log element.

    nginx logs the upstream's own name if no peer is live. Such an element has no spans, because nginx sent nothing.
    """
    tried = [each for each in logged_attempts(log) if ":" in each.peer][:ATTEMPTS_MAX]
    return list(zip(traced_attempts(trace), tried, strict=True))


def check_facts(trace: Trace, log: LogLine) -> list[str]:
    """Check everything except times. An empty list means that the trace agrees with nginx's log."""
    violations = [*_check_tree(trace), *_check_server(trace.server, log), *_check_attempt_numbers(trace)]
    if violations:
        return violations
    tried = [each.peer for each in logged_attempts(log) if ":" in each.peer]
    lost = trace.server.attributes.get("nginx.upstream.attempts_lost", 0)
    violations += _differ("attempts without spans", lost, len(tried[ATTEMPTS_MAX:]))
    traced = [attempt.spans[0].attributes.get("nginx.upstream.peer") for attempt in traced_attempts(trace)]
    if traced != tried[:ATTEMPTS_MAX]:
        return [f"peers: trace says {traced}, nginx logged {log['upstream_addr']!r}"]
    given_up = "nginx.termination" in trace.server.attributes
    for attempt, logged in pair_attempts(trace, log):
        violations += _check_attempt(attempt, logged, given_up)
    for attempt in traced_attempts(trace, subrequests=True):
        violations += _check_attempt(attempt, None, given_up)
    return violations

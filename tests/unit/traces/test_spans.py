"""What a trace says about a request: whole traces, stated literally."""

import socket
import struct
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.settings.model import OptInAttribute
from otel_nginx_ebpf.traces.abi import STRING_KINDS
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.error_log import LogLine
from otel_nginx_ebpf.traces.model import AttributeValue, Event, Span, Trace
from otel_nginx_ebpf.traces.record import CACHE_STATUSES, Attempt, Request
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from otel_nginx_ebpf.traces.url import redact_query

OFFSET_NS = 10**18
CLIENT = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 51234) + bytes([192, 0, 2, 7]) + bytes(8)
BALANCER = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 40000) + bytes([192, 0, 2, 8]) + bytes(8)
LISTENER = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 8080) + bytes([192, 0, 2, 1]) + bytes(8)

REQUEST = Request(
    accepted_mono_ns=900,
    first_read_mono_ns=1_000,
    created_mono_ns=1_100,
    last_read_mono_ns=None,
    first_write_mono_ns=5_000,
    last_write_mono_ns=6_000,
    ended_mono_ns=6_100,
    rc=0,
    connection=7,
    connection_requests=3,
    request_bytes=80,
    sent_bytes=240,
    nginx_start_unix_ms=0,
    http_version=1001,
    status=200,
    worker_pid=4711,
    upstream_states=0,
    tls=False,
    multiplexed=False,
    attempts=(),
    attempts_lost=0,
    unseen_peers=(),
    method_bit=2,
    requests_seen=3,
    method="GET",
    uri="/api/users?id=1",
    cut=(),
    host="example.com",
    user_agent="curl/8",
    location="/api/",
    server_name="example.com",
    client_sockaddr=CLIENT,
    local_sockaddr=LISTENER,
    trace_id=0xABC,
    parent_span_id=None,
    trace_flags=1,
    kept=None,
    trace_state=None,
    ending=None,
    ends_with_write=True,
    peer_sockaddr=BALANCER,
)

ATTEMPT = Attempt(
    connect_start_mono_ns=1_200,
    connected_mono_ns=1_500,
    connect_failed_mono_ns=None,
    first_write_mono_ns=1_500,
    last_write_mono_ns=1_600,
    first_read_mono_ns=3_000,
    last_read_mono_ns=4_000,
    ended_mono_ns=4_100,
    connect_ms=0,
    header_ms=0,
    response_ms=0,
    sent_bytes=70,
    received_bytes=300,
    status=200,
    connect_errno=0,
    tls=False,
    subrequest=False,
    peer="127.0.0.1:9000",
    upstream="backend",
    subrequest_uri=None,
    span_id=None,
    outcome=None,
    ends_with_read=True,
    protocol="http_1",
    method_bit=2,
    upstream_request=1,
    sent_line="GET /users?id=1 HTTP/1.0",
    sent_host="backend.example",
)


class CountingIds:
    """1, 2, 3, … in the order they are asked for."""

    def __init__(self) -> None:
        self._last = 0

    def generate_span_id(self) -> int:
        self._last += 1
        return self._last


def build(request: Request, **chosen: Any) -> Trace:
    return build_trace(request, OFFSET_NS, CountingIds(), choices=SpanChoices(**chosen))


def children(request: Request) -> list[tuple[str, int, int, str | None]]:
    """Name, start and end (monotonic) and error of each child span."""
    return [
        (span.name, span.start_unix_ns - OFFSET_NS, span.end_unix_ns - OFFSET_NS, span.error)
        for span in build(request).spans[1:]
    ]


def test_a_proxied_request() -> None:
    trace = build(replace(REQUEST, attempts=(ATTEMPT,), upstream_states=1))
    upstream = {
        "nginx.upstream.attempt": 1,
        "nginx.upstream.peer": "127.0.0.1:9000",
        "network.peer.address": "127.0.0.1",
        "network.peer.port": 9000,
        "nginx.upstream.name": "backend",
        "nginx.upstream.status": 200,
    }
    assert trace.trace_id == 0xABC
    assert trace.spans == (
        Span(
            name="GET /api/",
            kind=SpanKind.SERVER,
            span_id=1,
            parent_span_id=None,
            start_unix_ns=OFFSET_NS + 1_000,
            end_unix_ns=OFFSET_NS + 6_000,
            attributes={
                "http.request.method": "GET",
                "url.scheme": "http",
                "url.path": "/api/users",
                "url.query": "id=1",
                "http.route": "/api/",
                "http.response.status_code": 200,
                "network.protocol.version": "1.1",
                "user_agent.original": "curl/8",
                "client.address": "192.0.2.7",
                "network.peer.address": "192.0.2.8",
                "network.peer.port": 40000,
                "server.address": "example.com",
                "server.port": 8080,
                "nginx.connection.id": 7,
                "nginx.connection.requests": 3,
                "nginx.server_name": "example.com",
                "nginx.worker.pid": 4711,
                "nginx.upstream.attempts": 1,
            },
        ),
        Span("downstream read", SpanKind.INTERNAL, 2, 1, OFFSET_NS + 1_000, OFFSET_NS + 1_100, {}),
        Span("upstream connect", SpanKind.INTERNAL, 3, 1, OFFSET_NS + 1_200, OFFSET_NS + 1_500, upstream),
        Span(
            "upstream exchange",
            SpanKind.CLIENT,
            4,
            1,
            OFFSET_NS + 1_500,
            OFFSET_NS + 4_000,
            upstream
            | {
                "http.request.method": "GET",
                "http.response.status_code": 200,
                "network.protocol.version": "1.0",
                "server.address": "backend.example",
                "server.port": 80,
                "url.full": "http://backend.example/users?id=1",
                "nginx.upstream.connection.reused": False,
                "nginx.upstream.time_to_first_byte_ns": 1_500,
            },
        ),
        Span("downstream write", SpanKind.INTERNAL, 5, 1, OFFSET_NS + 5_000, OFFSET_NS + 6_000, {}),
    )


def test_a_reused_upstream_connection_has_no_connect_span() -> None:
    reused = replace(ATTEMPT, connect_start_mono_ns=None, connected_mono_ns=None)
    trace = build(replace(REQUEST, attempts=(reused,)))
    assert [span.name for span in trace.spans[1:]] == ["downstream read", "upstream exchange", "downstream write"]
    assert trace.spans[2].attributes["nginx.upstream.connection.reused"] is True


def test_a_pipelined_request_whose_bytes_had_come_before_has_no_downstream_read() -> None:
    assert children(replace(REQUEST, first_read_mono_ns=None)) == [("downstream write", 5_000, 6_000, None)]


def test_spans_of_one_start_one_end_and_one_id_stay_in_order() -> None:
    class OneId:
        def generate_span_id(self) -> int:
            return 7

    trace = build_trace(replace(REQUEST, attempts=(ATTEMPT, replace(ATTEMPT, peer="other"))), 0, OneId())
    peers = [span.attributes.get("nginx.upstream.peer") for span in trace.spans if span.name == "upstream exchange"]
    assert peers == [ATTEMPT.peer, "other"]


def test_a_slow_request_body_belongs_to_downstream_read() -> None:
    assert children(replace(REQUEST, last_read_mono_ns=4_800))[0] == ("downstream read", 1_000, 4_800, None)


def test_a_refused_connection_is_a_failed_connect_and_no_exchange() -> None:
    refused = replace(
        ATTEMPT,
        connected_mono_ns=None,
        connect_failed_mono_ns=1_400,
        connect_errno=111,
        first_write_mono_ns=None,
        last_write_mono_ns=None,
        first_read_mono_ns=None,
        last_read_mono_ns=None,
        header_ms=None,
        status=502,
    )
    request = replace(REQUEST, attempts=(refused, ATTEMPT), upstream_states=2)
    assert children(request)[1:4] == [
        ("upstream connect", 1_200, 1_400, "ECONNREFUSED"),
        ("upstream connect", 1_200, 1_500, None),
        ("upstream exchange", 1_500, 4_000, None),
    ]


def logged(time_ns: int, attempt: int | None, message: str = "x", level: str = "error", number: int = 0) -> LogLine:
    return LogLine(time_ns, level, number, attempt, message)


def test_a_line_of_the_error_log_is_on_the_span_that_it_is_about() -> None:
    """The first attempt was refused, the second was connected and then failed."""
    refused = replace(ATTEMPT, connected_mono_ns=None, connect_failed_mono_ns=1_180, first_write_mono_ns=None,
                      connect_start_mono_ns=1_150, header_ms=None, status=502)  # fmt: skip
    lines = (
        logged(1_120, None, "of the request"),
        logged(1_190, 1, "refused", number=111),
        logged(1_195, 1, "temporarily disabled", level="warn"),
        logged(1_300, 2, "while connecting"),
        logged(4_050, 2, "while reading"),
        logged(4_060, 3, "of an attempt without spans"),
    )
    trace = build(replace(REQUEST, attempts=(refused, ATTEMPT), upstream_states=2, log_lines=lines))
    found = [
        (
            span.name,
            [(event.time_unix_ns - OFFSET_NS, event.attributes["nginx.error.message"]) for event in span.events],
        )
        for span in trace.spans
    ]
    assert found == [
        ("GET /api/", [(1_120, "of the request"), (4_060, "of an attempt without spans")]),
        ("downstream read", []),
        ("upstream connect", [(1_190, "refused"), (1_195, "temporarily disabled")]),
        ("upstream connect", [(1_300, "while connecting")]),
        ("upstream exchange", [(4_050, "while reading")]),
        ("downstream write", []),
    ]
    first, second = trace.spans[2].events
    assert first == Event(
        "nginx.error_log",
        OFFSET_NS + 1_190,
        {"log.severity": "error", "nginx.error.message": "refused", "nginx.error.errno": 111},
    )
    assert second.attributes == {"log.severity": "warn", "nginx.error.message": "temporarily disabled"}


@pytest.mark.parametrize("status", [None, *CACHE_STATUSES.values()])
def test_what_the_cache_said(status: str | None) -> None:
    trace = build(replace(REQUEST, cache_status=status))
    assert trace.spans[0].attributes.get("nginx.cache.status") == status
    assert all("nginx.cache.status" not in span.attributes for span in trace.spans[1:])


def test_a_request_that_waited_for_the_cache() -> None:
    server, *others = build(replace(REQUEST, waited_for_cache=True)).spans
    assert server.attributes["nginx.cache.lock_waited"] is True
    for span in (build(REQUEST).spans[0], *others):
        assert "nginx.cache.lock_waited" not in span.attributes


def test_what_limits_said() -> None:
    server, *others = build(replace(REQUEST, limit_req_status="DELAYED", limit_conn_status="PASSED")).spans
    told = {name: value for name, value in server.attributes.items() if name.startswith("nginx.limit_")}
    assert told == {"nginx.limit_req.status": "DELAYED", "nginx.limit_conn.status": "PASSED"}
    assert not any(
        name.startswith("nginx.limit_") for span in (build(REQUEST).spans[0], *others) for name in span.attributes
    )


@pytest.mark.parametrize(("query", "shown"), [(True, "/a?sig=REDACTED"), (False, "/a")])
def test_the_query_in_a_line_of_the_error_log(query: bool, shown: str) -> None:
    request = replace(REQUEST, log_lines=(logged(1_120, None, "/a?sig=x"),))
    trace = build_trace(request, OFFSET_NS, CountingIds(), choices=SpanChoices(query=query))
    assert trace.spans[0].events[0].attributes["nginx.error.message"] == shown


def test_a_connect_that_never_ended_lasts_as_long_as_its_attempt() -> None:
    never = {"connect_ms": None, "header_ms": None, "status": 504}
    timed_out = replace(ATTEMPT, connected_mono_ns=None, first_write_mono_ns=None, **never)
    assert children(replace(REQUEST, attempts=(timed_out,)))[1] == ("upstream connect", 1_200, 4_100, "timeout")


def test_a_failed_tls_handshake_is_a_failed_connect() -> None:
    """Its bytes were sent upstream, and no request was."""
    refused = replace(ATTEMPT, tls=True, connect_ms=None, header_ms=None, status=502)
    assert children(replace(REQUEST, attempts=(refused,)))[1:] == [
        ("upstream connect", 1_200, 4_100, "_OTHER"),
        ("downstream write", 5_000, 6_000, None),
    ]


def test_an_upstream_timeout_ends_the_exchange_with_the_attempt() -> None:
    silent = replace(
        ATTEMPT, first_read_mono_ns=None, last_read_mono_ns=None, header_ms=None, status=504, ends_with_read=False
    )
    trace = build(replace(REQUEST, status=504, attempts=(silent,)))
    exchange = trace.spans[3]
    assert (exchange.name, exchange.end_unix_ns, exchange.error) == ("upstream exchange", OFFSET_NS + 4_100, "timeout")
    assert "http.response.status_code" not in exchange.attributes
    assert exchange.attributes["nginx.upstream.status"] == 504
    assert (trace.spans[0].error, trace.spans[0].attributes["error.type"]) == ("504", "504")


@pytest.mark.parametrize(("status", "server_error", "client_error"), [(404, None, "404"), (503, "503", "503")])
def test_errors_are_the_servers_from_500_and_the_clients_from_400(
    status: int, server_error: str | None, client_error: str
) -> None:
    trace = build(replace(REQUEST, status=status, attempts=(replace(ATTEMPT, status=status),)))
    assert (trace.spans[0].error, trace.spans[3].error) == (server_error, client_error)


def test_where_nothing_was_written_the_request_ends_when_nginx_ends_it() -> None:
    aborted = replace(
        REQUEST,
        status=499,
        rc=499,
        first_write_mono_ns=None,
        last_write_mono_ns=None,
        ended_mono_ns=9_000,
        ending="client_closed_request",
        ends_with_write=False,
    )
    server = build(aborted).spans[0]
    assert server.end_unix_ns == OFFSET_NS + 9_000
    assert server.attributes["nginx.termination"] == "client_closed_request"


def test_a_tunnel_ends_when_nginx_ends_it() -> None:
    exchange = replace(ATTEMPT, status=101, ended_mono_ns=8_900, ends_with_read=False)
    tunnel = replace(REQUEST, status=101, ended_mono_ns=9_000, attempts=(exchange,), ends_with_write=False)
    trace = build(tunnel)
    assert trace.spans[0].end_unix_ns == OFFSET_NS + 9_000
    assert trace.spans[3].end_unix_ns == OFFSET_NS + 8_900


def test_a_mirror_that_outlasts_the_response_extends_the_server_span() -> None:
    mirror = replace(ATTEMPT, subrequest=True, subrequest_uri="/mirror", last_read_mono_ns=7_000, ended_mono_ns=7_100)
    trace = build(replace(REQUEST, attempts=(ATTEMPT, mirror), upstream_states=1))
    assert trace.spans[0].end_unix_ns == OFFSET_NS + 7_000
    upstream = [span for span in trace.spans if span.name.startswith("upstream")]
    assert [span.attributes.get("nginx.subrequest.uri") for span in upstream] == [None, "/mirror", None, "/mirror"]


def test_session_tickets_are_not_taken_for_the_response() -> None:
    tls = replace(ATTEMPT, tls=True, header_ms=300, first_read_mono_ns=2_000, last_read_mono_ns=300_000_000)
    exchange = build(replace(REQUEST, attempts=(tls,))).spans[3]
    assert "nginx.upstream.time_to_first_byte_ns" not in exchange.attributes
    assert exchange.end_unix_ns == OFFSET_NS + 300_000_000


def test_no_live_peer_is_said_where_no_attempt_could_be_made() -> None:
    server = build(replace(REQUEST, status=502, upstream_states=1, unseen_peers=("backend",))).spans[0]
    assert server.attributes["nginx.upstream.no_live_peers"] == 1
    assert not {"nginx.upstream.attempts", "nginx.upstream.attempts_lost"} & server.attributes.keys()


def test_a_peer_whose_attempt_was_not_seen_is_lost_and_not_called_dead() -> None:
    request = replace(REQUEST, attempts=(ATTEMPT,), upstream_states=2, unseen_peers=("127.0.0.1:9001",))
    server = build(request).spans[0]
    assert (server.attributes["nginx.upstream.attempts"], server.attributes["nginx.upstream.attempts_lost"]) == (1, 1)
    assert "nginx.upstream.no_live_peers" not in server.attributes


@pytest.mark.parametrize(
    ("outcome", "ending", "client_error", "server_error"),
    [
        ("incomplete", "upstream_incomplete", "incomplete_response", "upstream_incomplete"),
        ("timeout", "upstream_timeout", "timeout", "upstream_timeout"),
        ("abandoned", "client_closed_request", None, None),
        ("abandoned", "timeout", None, None),
        ("abandoned", "shutdown", None, "shutdown"),
    ],
)
def test_a_response_that_is_not_whole_is_an_error_of_who_is_at_fault(
    outcome: str, ending: str, client_error: str | None, server_error: str | None
) -> None:
    attempt = replace(ATTEMPT, outcome=outcome, ends_with_read=False, ended_mono_ns=8_900)
    trace = build(replace(REQUEST, attempts=(attempt,), ending=ending, ends_with_write=False, ended_mono_ns=9_000))
    server, exchange = trace.spans[0], trace.spans[3]
    assert (server.end_unix_ns, exchange.end_unix_ns) == (OFFSET_NS + 9_000, OFFSET_NS + 8_900)
    assert (server.attributes["nginx.termination"], server.error, exchange.error) == (
        ending,
        server_error,
        client_error,
    )


@pytest.mark.parametrize("status", [0, 9])
def test_what_nginx_logs_for_no_status_is_no_status_code(status: int) -> None:
    assert "http.response.status_code" not in build(replace(REQUEST, status=status)).spans[0].attributes


@pytest.mark.parametrize(
    ("method", "name", "attribute"),
    [("GET", "GET /api/", "GET"), ("BREW", "HTTP /api/", "_OTHER"), (None, "HTTP /api/", "_OTHER")],
)
def test_unknown_methods_do_not_make_span_names(method: str | None, name: str, attribute: str) -> None:
    server = build(replace(REQUEST, method=method)).spans[0]
    assert (server.name, server.attributes["http.request.method"]) == (name, attribute)
    original = method if method == "BREW" else None
    assert server.attributes.get("http.request.method_original") == original


def test_the_users_list_of_known_methods_replaces_all_of_ours() -> None:
    brewing = {"known_methods": frozenset({"BREW", "Get"})}
    server = build(replace(REQUEST, method="BREW"), **brewing).spans[0]
    assert (server.name, server.attributes["http.request.method"]) == ("BREW /api/", "BREW")
    server = build(REQUEST, **brewing).spans[0]
    assert (server.name, server.attributes["http.request.method"]) == ("HTTP /api/", "_OTHER")
    assert server.attributes["http.request.method_original"] == "GET"


@pytest.mark.parametrize(
    ("host", "address", "port"),
    [
        ("example.com:8443", "example.com", 8443),
        ("example.com", "example.com", 8080),
        ("[::1]:8443", "::1", 8443),
        ("[::1]", "::1", 8080),
        (None, "192.0.2.1", 8080),
        ("user:secret@example.com:1", "example.com", 1),
    ],
)
def test_the_server_is_the_one_the_client_named(host: str | None, address: str, port: int) -> None:
    attributes = build(replace(REQUEST, host=host)).spans[0].attributes
    assert (attributes["server.address"], attributes["server.port"]) == (address, port)


@pytest.mark.parametrize(
    ("query", "redacted"),
    [
        ("a=1&sig=secret&b=2", "a=1&sig=REDACTED&b=2"),
        ("AWSAccessKeyId=AK&Signature=s%3D", "AWSAccessKeyId=REDACTED&Signature=REDACTED"),
        ("X-Goog-Signature=x", "X-Goog-Signature=REDACTED"),
        ("SIG=1&sig&signature=2", "SIG=1&sig&signature=2"),
        ("", ""),
    ],
)
def test_sensitive_query_parameters_are_redacted(query: str, redacted: str) -> None:
    assert redact_query(query) == redacted


def test_without_query() -> None:
    attributes = build(REQUEST, query=False).spans[0].attributes
    assert attributes["url.path"] == "/api/users"
    assert "url.query" not in attributes
    exchange = build(replace(REQUEST, attempts=(ATTEMPT,)), query=False).spans[3]
    assert exchange.attributes["url.full"] == "http://backend.example/users"


def test_a_cut_uri_says_so() -> None:
    assert build(replace(REQUEST, cut=("STRING_URI",))).spans[0].attributes["nginx.truncated_attributes"] == (
        "url.query",
    )


times = st.none() | st.integers(1_000, 9_000)


@given(
    st.tuples(times, times, times, times),
    st.tuples(times, times, times, times, times, times),
    st.sampled_from([0, 408, 499, -1]),
    st.sampled_from([0, 101, 200, 404, 502, 504]),
)
def test_whatever_was_seen_no_span_is_empty_or_leaves_its_parent(
    own: tuple[int | None, ...], upstream: tuple[int | None, ...], rc: int, status: int
) -> None:
    first_read, last_read, first_write, last_write = own
    start, connected, failed, sent, first, last = upstream
    attempt = replace(
        ATTEMPT,
        connect_start_mono_ns=start,
        connected_mono_ns=connected,
        connect_failed_mono_ns=failed,
        first_write_mono_ns=sent,
        first_read_mono_ns=first,
        last_read_mono_ns=last,
        ended_mono_ns=9_500,
    )
    request = replace(
        REQUEST,
        first_read_mono_ns=1_000 if first_read else None,
        created_mono_ns=1_000 if first_read is None else 1_001,
        last_read_mono_ns=last_read,
        first_write_mono_ns=first_write,
        last_write_mono_ns=last_write,
        ended_mono_ns=10_000,
        rc=rc,
        status=status,
        attempts=(attempt,),
    )
    server, *others = build_trace(request, OFFSET_NS, RandomIds()).spans
    assert len({span.span_id for span in (server, *others)}) == 1 + len(others)
    for span in others:
        assert server.start_unix_ns <= span.start_unix_ns < span.end_unix_ns <= server.end_unix_ns
        assert span.parent_span_id == server.span_id


def test_every_string_that_can_be_cut_has_an_attribute_to_name() -> None:
    # The first is sent whole or not at all; the second is only counted; the others are apart from the other strings.
    headers = {"STRING_REQUEST_HEADER", "STRING_RESPONSE_HEADER", "STRING_HEADER_VALUE"}
    cut = tuple(STRING_KINDS.keys() - {"STRING_TRACESTATE", "STRING_UNSEEN_PEER", *headers})
    trace = build(replace(REQUEST, cut=cut))
    names = trace.spans[0].attributes["nginx.truncated_attributes"]
    assert isinstance(names, tuple)
    assert len(names) == len(set(names))
    assert all(build(replace(REQUEST, cut=(each,))).spans[0].attributes["nginx.truncated_attributes"] for each in cut)


def test_an_exchange_that_a_leaving_client_ended_is_no_error() -> None:
    waiting = replace(
        ATTEMPT, header_ms=None, status=None, outcome="abandoned", ends_with_read=False, ended_mono_ns=6_050
    )
    left = replace(REQUEST, status=499, sent_bytes=0, first_write_mono_ns=None, last_write_mono_ns=None)
    trace = build(replace(left, attempts=(waiting,), ending="client_closed_request", ends_with_write=False))
    assert trace.spans[0].attributes["nginx.termination"] == "client_closed_request"
    assert (trace.spans[3].end_unix_ns, trace.spans[3].error) == (OFFSET_NS + 6_050, None)


def test_an_upstreams_own_499_is_no_termination() -> None:
    assert "nginx.termination" not in build(replace(REQUEST, status=499)).spans[0].attributes


@pytest.mark.parametrize("status", [0, 9, 99, 600, 1234])
def test_a_status_that_is_none_of_https_is_no_status_and_no_error(status: int) -> None:
    trace = build(replace(REQUEST, status=status, attempts=(replace(ATTEMPT, status=status),)))
    exchange = trace.spans[3]
    for span in (trace.spans[0], exchange):
        assert not {"http.response.status_code", "error.type"} & span.attributes.keys()
        assert span.error is None
    assert exchange.attributes["nginx.upstream.status"] == status


def test_a_size_below_0_is_none() -> None:
    request = replace(REQUEST, request_bytes=None, attempts=(replace(ATTEMPT, received_bytes=None),))
    trace = build(request, opt_in=frozenset({"http.request.size", "http.response.size"}))
    assert "http.request.size" not in trace.spans[0].attributes
    assert "http.response.size" not in trace.spans[3].attributes
    assert trace.spans[0].attributes["http.response.size"] == REQUEST.sent_bytes


UNIX_LISTENER = struct.pack("=H", socket.AF_UNIX) + b"/run/nginx.sock\0"
UNNAMED = struct.pack("=H", socket.AF_UNIX)


def server(request: Request, **chosen: Any) -> dict[str, AttributeValue]:
    return dict(build(request, **chosen).spans[0].attributes)


def test_what_the_conventions_leave_out_by_default_can_be_chosen() -> None:
    request = replace(REQUEST, attempts=(ATTEMPT,))
    without, chosen = build(request), build(request, opt_in=frozenset(get_args(OptInAttribute)))
    added = [
        {name: value for name, value in some.attributes.items() if name not in less.attributes}
        for less, some in zip(without.spans, chosen.spans, strict=True)
    ]
    assert added[0] == {
        "client.port": 51234,
        "http.request.size": 80,
        "http.response.size": 240,
        "network.local.address": "192.0.2.1",
        "network.local.port": 8080,
        "network.transport": "tcp",
    }
    assert added[3].items() >= {"http.request.size": 70, "http.response.size": 300}.items()
    assert [added[index] for index in (1, 2, 4)] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("listener", "version", "transport"),
    [(LISTENER, 1001, "tcp"), (LISTENER, 3000, "udp"), (UNIX_LISTENER, 2000, "unix")],
)
def test_the_transport(listener: bytes, version: int, transport: str) -> None:
    chosen = frozenset({"network.transport", "network.local.address", "network.local.port"})
    attributes = server(replace(REQUEST, local_sockaddr=listener, http_version=version), opt_in=chosen)
    assert attributes["network.transport"] == transport
    path = "/run/nginx.sock" if listener is UNIX_LISTENER else "192.0.2.1"
    assert attributes["network.local.address"] == path
    assert ("network.local.port" in attributes) == (listener is LISTENER)


@pytest.mark.parametrize("peer", [None, UNNAMED])
def test_a_peer_without_a_name_is_not_named(peer: bytes | None) -> None:
    attributes = server(replace(REQUEST, peer_sockaddr=peer, client_sockaddr=UNNAMED))
    assert not {"network.peer.address", "network.peer.port", "client.port"} & attributes.keys()
    assert attributes["client.address"] == "unix:"


def test_a_unix_socket_is_named_by_its_path() -> None:
    attributes = server(replace(REQUEST, peer_sockaddr=UNIX_LISTENER, local_sockaddr=UNIX_LISTENER, host=None))
    assert attributes["network.peer.address"] == attributes["server.address"] == "/run/nginx.sock"
    assert not {"network.peer.port", "server.port"} & attributes.keys()


@pytest.mark.parametrize(
    ("target", "address", "port"),
    [
        ("http://asked.example:81/a?b HTTP/1.1", "asked.example", 81),
        ("HTTP://asked.example HTTP/1.1", "asked.example", 8080),
        ("http://user:secret@[::1]:82/ HTTP/1.1", "::1", 82),
        ("http:///a HTTP/1.1", "example.com", 8080),
    ],
)
def test_the_target_in_absolute_form_wins_over_host(target: str, address: str, port: int) -> None:
    attributes = server(replace(REQUEST, request_target=target))
    assert (attributes["server.address"], attributes["server.port"]) == (address, port)
    assert "secret" not in str(attributes)


TOLD = replace(REQUEST, forwarded="for=192.0.2.9;proto=https;host=shop.example")


@pytest.mark.parametrize(
    ("proxies", "told"),
    [
        (("192.0.2.0/24",), True),
        (("198.51.100.1", "192.0.2.8"), True),
        (("192.0.2.7",), False),
        (("unix:", "2001:db8::/32"), False),
        ((), False),
    ],
)
def test_only_the_sockets_peer_can_be_a_trusted_proxy(proxies: tuple[str, ...], told: bool) -> None:
    """The client's address (192.0.2.7) comes from a header, too."""
    attributes = server(TOLD, trusted_proxies=proxies)
    asked = [attributes[name] for name in ("url.scheme", "server.address", "server.port")]
    assert asked == (["https", "shop.example", 443] if told else ["http", "example.com", 8080])


def test_who_the_peer_is_must_be_known_to_trust_it() -> None:
    unknown = replace(TOLD, peer_sockaddr=None)
    assert server(unknown, trusted_proxies=("0.0.0.0/0", "::/0", "unix:"))["url.scheme"] == "http"


def test_peers_of_unix_sockets_and_mapped_addresses_are_trusted() -> None:
    mapped = (
        struct.pack("=H", socket.AF_INET6)
        + struct.pack("!HI", 1, 0)
        + socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.8")
        + bytes(4)
    )
    for peer, proxy in ((UNNAMED, "unix:"), (mapped, "192.0.2.8/32"), (mapped, "192.0.2.9/24")):
        assert server(replace(TOLD, peer_sockaddr=peer), trusted_proxies=(proxy,))["url.scheme"] == "https"


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({"x_forwarded_proto": "https"}, ("https", "example.com", 443)),
        ({"x_forwarded_proto": "https", "host": "example.com:8443"}, ("https", "example.com", 8443)),
        ({"x_forwarded_host": "shop.example:81"}, ("http", "shop.example", 81)),
        ({"x_forwarded_host": "shop.example", "tls": True}, ("https", "shop.example", 443)),
        ({"x_forwarded_proto": "https", "host": None}, ("https", "192.0.2.1", 8080)),
        ({"x_forwarded_host": "", "x_forwarded_proto": "gopher"}, ("http", "example.com", 8080)),
        ({"forwarded": "proto=https", "cut": ("STRING_FORWARDED",)}, ("http", "example.com", 8080)),
    ],
)
def test_what_a_trusted_proxy_says(headers: dict[str, Any], asked: tuple[str, str, int]) -> None:
    attributes = server(replace(REQUEST, **headers), trusted_proxies=("192.0.2.8",))
    assert tuple(attributes[name] for name in ("url.scheme", "server.address", "server.port")) == asked


def exchange(request: Request = REQUEST, /, **facts: Any) -> dict[str, AttributeValue]:
    (span,) = [
        span
        for span in build(replace(request, attempts=(replace(ATTEMPT, **facts),))).spans
        if span.name == "upstream exchange"
    ]
    return dict(span.attributes)


@pytest.mark.parametrize(
    ("facts", "method", "original"),
    [
        ({"sent_line": "POST / HTTP/1.1", "method_bit": 2}, "POST", None),
        ({"sent_line": "BREW / HTTP/1.1", "method_bit": 1}, "_OTHER", "BREW"),
        ({"sent_line": None, "method_bit": 8}, "POST", None),
        ({"sent_line": None, "method_bit": 0x400}, "_OTHER", "PROPFIND"),
        ({"sent_line": None, "method_bit": 1}, "_OTHER", None),
        ({"sent_line": None, "method_bit": 0}, "HEAD", None),
        ({"sent_line": "GET /s HTTP/1.0", "subrequest": True}, "GET", None),
        ({"sent_line": None, "method_bit": 2, "subrequest": True}, "GET", None),
        ({"sent_line": None, "method_bit": 4, "subrequest": True}, "HEAD", None),
        ({"sent_line": None, "method_bit": 0, "subrequest": True}, "_OTHER", None),
    ],
)
def test_the_method_is_what_the_peer_was_sent(facts: dict[str, Any], method: str, original: str | None) -> None:
    attributes = exchange(replace(REQUEST, method="HEAD", method_bit=4), **facts)
    assert attributes["http.request.method"] == method
    assert attributes.get("http.request.method_original") == original


def test_an_unknown_method_of_the_clients_is_sent_on() -> None:
    brewing = replace(REQUEST, method="BREW", method_bit=1)
    attributes = exchange(brewing, sent_line=None, method_bit=1)
    assert (attributes["http.request.method"], attributes["http.request.method_original"]) == ("_OTHER", "BREW")
    other = exchange(brewing, sent_line=None, method_bit=1, subrequest=True)
    assert "http.request.method_original" not in other


@pytest.mark.parametrize(
    ("facts", "name", "version"),
    [
        ({"sent_line": "GET / HTTP/1.1"}, None, "1.1"),
        ({"sent_line": "GET / HTTP/1.0"}, None, "1.0"),
        ({"sent_line": "GET /" + "a" * 500}, None, None),
        ({"sent_line": "GET / HTTP/9"}, None, None),
        ({"protocol": "http_2", "sent_line": None}, None, "2"),
        ({"protocol": None, "sent_line": None}, None, None),
        *(({"protocol": each, "sent_line": None}, each, None) for each in ("fastcgi", "uwsgi", "scgi", "memcached")),
    ],
)
def test_the_protocol_of_the_upstream(facts: dict[str, Any], name: str | None, version: str | None) -> None:
    attributes = exchange(**facts)
    assert attributes.get("network.protocol.name") == name
    assert attributes.get("network.protocol.version") == version


@pytest.mark.parametrize(
    ("facts", "server"),
    [
        ({"sent_host": "asked.example:81"}, ("asked.example", 81)),
        ({"sent_host": "asked.example"}, ("asked.example", 80)),
        ({"sent_host": "asked.example", "tls": True}, ("asked.example", 443)),
        ({"sent_host": "[::1]:9"}, ("::1", 9)),
        ({"sent_host": "user:secret@asked.example"}, ("asked.example", 80)),
        ({"sent_line": "GET http://far.example:3128/a HTTP/1.1"}, ("far.example", 3128)),
        ({"sent_host": None}, ("backend", 9000)),
        ({"sent_host": None, "upstream": None}, ("127.0.0.1", 9000)),
        ({"sent_host": None, "upstream": "[::1]", "peer": "[::1]:9"}, ("::1", 9)),
        ({"sent_host": None, "peer": "unix:/run/app.sock"}, ("backend", None)),
        ({"sent_host": None, "upstream": "unix:/run/app.sock", "peer": "unix:/run/app.sock"}, ("/run/app.sock", None)),
        ({"sent_host": None, "upstream": None, "peer": None}, (None, None)),
    ],
)
def test_the_upstreams_server_is_the_one_it_was_asked_for(
    facts: dict[str, Any], server: tuple[str | None, int | None]
) -> None:
    attributes = exchange(**facts)
    assert (attributes.get("server.address"), attributes.get("server.port")) == server
    assert "secret" not in str(attributes)


@pytest.mark.parametrize(
    ("peer", "address", "port"),
    [
        ("[::1]:8080", "::1", 8080),
        ("unix:/run/app.sock", "/run/app.sock", None),
        ("unix:", None, None),
        ("backend", None, None),
        (None, None, None),
    ],
)
def test_the_peer_of_an_attempt(peer: str | None, address: str | None, port: int | None) -> None:
    for span in build(replace(REQUEST, attempts=(replace(ATTEMPT, peer=peer),))).spans[2:4]:
        attributes = span.attributes
        assert (attributes.get("network.peer.address"), attributes.get("network.peer.port")) == (address, port)
        assert attributes.get("nginx.upstream.peer") == peer
        assert ("server.address" in attributes) == (span.kind is SpanKind.CLIENT)


REFUSED = replace(
    ATTEMPT,
    connected_mono_ns=None,
    connect_failed_mono_ns=1_400,
    connect_ms=None,
    connect_errno=111,
    first_write_mono_ns=None,
    last_write_mono_ns=None,
    first_read_mono_ns=None,
    last_read_mono_ns=None,
    header_ms=None,
    status=502,
    peer="127.0.0.1:9",
)


def test_a_dead_peer_has_a_client_span() -> None:
    connect = build(replace(REQUEST, attempts=(REFUSED,))).spans[2]
    assert (connect.name, connect.kind, connect.error) == ("upstream connect", SpanKind.CLIENT, "ECONNREFUSED")
    assert connect.attributes == {
        "error.type": "ECONNREFUSED",
        "http.request.method": "GET",
        "network.peer.address": "127.0.0.1",
        "network.peer.port": 9,
        "network.protocol.version": "1.0",
        "nginx.upstream.attempt": 1,
        "nginx.upstream.name": "backend",
        "nginx.upstream.peer": "127.0.0.1:9",
        "nginx.upstream.status": 502,
        "server.address": "backend.example",
        "server.port": 80,
        "url.full": "http://backend.example/users?id=1",
    }


def test_a_connect_that_nginx_abandoned_says_nothing_about_its_peer() -> None:
    abandoned = replace(REFUSED, connect_errno=0, outcome="abandoned", status=None)
    connect = build(replace(REQUEST, attempts=(abandoned,))).spans[2]
    assert (connect.kind, connect.error) == (SpanKind.INTERNAL, None)


def test_each_further_attempt_of_one_request_is_a_resend() -> None:
    """Of two requests to the upstream, the main one and a mirror; the fifth attempt's request is not known."""
    attempts = (
        REFUSED,
        replace(ATTEMPT, upstream_request=2, subrequest=True, subrequest_uri="/mirror"),
        ATTEMPT,
        replace(REFUSED, connect_start_mono_ns=1_700, connect_failed_mono_ns=1_800),
        replace(ATTEMPT, upstream_request=0),
        replace(ATTEMPT, upstream_request=0),
    )
    counts = {
        span.attributes["nginx.upstream.attempt"]: span.attributes.get("http.request.resend_count")
        for span in build(replace(REQUEST, attempts=attempts)).spans
        if span.kind is SpanKind.CLIENT
    }
    assert counts == {1: None, 2: None, 3: 1, 4: 2, 5: None, 6: None}
    connects = [span for span in build(replace(REQUEST, attempts=attempts)).spans if span.kind is SpanKind.INTERNAL]
    assert not any("http.request.resend_count" in span.attributes for span in connects)


def test_the_scheme_and_transport_of_an_upstream_are_opted_in() -> None:
    def chosen(**facts: Any) -> tuple[AttributeValue | None, AttributeValue | None]:
        attempts = (replace(ATTEMPT, **facts),)
        opted = frozenset({"url.scheme", "network.transport"})
        attributes = build(replace(REQUEST, attempts=attempts), opt_in=opted).spans[3].attributes
        return attributes.get("url.scheme"), attributes.get("network.transport")

    assert chosen() == ("http", "tcp")
    assert chosen(tls=True, peer="unix:/run/app.sock") == ("https", "unix")
    assert chosen(protocol="fastcgi", sent_line=None, sent_host=None) == (None, "tcp")


def test_client_spans_may_have_the_conventions_names() -> None:
    attempts = (REFUSED, replace(ATTEMPT, sent_line="POST / HTTP/1.1"), replace(ATTEMPT, sent_line="BREW / HTTP/1.1"))
    named = build(replace(REQUEST, attempts=attempts), clients_by_method=True).spans
    assert sorted((span.name, span.kind.name) for span in named) == [
        ("GET", "CLIENT"),
        ("GET /api/", "SERVER"),
        ("HTTP", "CLIENT"),
        ("POST", "CLIENT"),
        ("downstream read", "INTERNAL"),
        ("downstream write", "INTERNAL"),
        ("upstream connect", "INTERNAL"),
        ("upstream connect", "INTERNAL"),
    ]
    phases = build(replace(REQUEST, attempts=attempts)).spans
    assert [replace(span, name="") for span in named] == [replace(span, name="") for span in phases]

"""The oracle itself: it accepts a true trace, and rejects each kind of wrong trace."""

from dataclasses import replace
from typing import Any

import pytest

from e2e.agent_process import Span, Trace
from e2e.nginx_server import LogLine
from e2e.oracle import check_facts
from e2e.timing import NO_SLACK, Lags, check_times

START_MS = 1_700_000_000_000
MS = 1_000_000

NO_CONTEXT = {"http_traceparent": "", "http_b3": "", "http_x_b3_traceid": ""}
NO_PROXY = {"http_forwarded": "", "http_x_forwarded_proto": ""}
LOG: LogLine = {
    "msec": f"{START_MS / 1000 + 0.3:.3f}",
    "request_time": "0.300",
    "status": "200",
    "bytes_sent": "150",
    "request_length": "40",
    "connection": "7",
    "connection_requests": "2",
    "pid": "99",
    "request": "GET /api/users?id=1 HTTP/1.1",
    "request_method": "GET",
    "request_uri": "/app?q=1",
    "server_protocol": "HTTP/1.1",
    "remote_addr": "127.0.0.1",
    "remote_port": "50000",
    "http_user_agent": "agent",
    "host": "localhost",
    "ssl_protocol": "",
    "upstream_addr": "127.0.0.1:1, [::1]:2",
    "upstream_status": "502, 200",
    "upstream_connect_time": "-, 0.050",
    "upstream_header_time": "-, 0.150",
    "upstream_response_time": "0.050, 0.200",
    "upstream_bytes_sent": "0, 60",
    "upstream_bytes_received": "0, 160",
    **NO_CONTEXT,
    **NO_PROXY,
}


def span(index: int, name: str, kind: str, start_ms: float, end_ms: float, **attributes: Any) -> Span:
    parent = None if kind == "SERVER" else "0000000000000001"
    start, end = (round((START_MS + at) * MS) for at in (start_ms, end_ms))
    error = attributes.get("error.type")
    status = "ERROR" if error else "UNSET"
    return Span(name, kind, f"{index:016x}", parent, start, end, status, error, attributes)


def peer(text: str, host: str, port: int, attempt: int, **more: Any) -> dict[str, Any]:
    return {
        "nginx.upstream.peer": text,
        "network.peer.address": host,
        "network.peer.port": port,
        "nginx.upstream.attempt": attempt,
        **more,
    }


SERVER = {
    "http.request.method": "GET",
    "url.path": "/app",
    "url.query": "q=1",
    "url.scheme": "http",
    "http.response.status_code": 200,
    "http.request.size": 40,
    "http.response.size": 150,
    "nginx.connection.id": 7,
    "nginx.connection.requests": 2,
    "nginx.worker.pid": 99,
    "network.protocol.version": "1.1",
    "user_agent.original": "agent",
    "client.address": "127.0.0.1",
    "client.port": 50000,
    "http.route": "/app",
    "nginx.upstream.attempts": 2,
}
EXCHANGE = {
    "nginx.upstream.connection.reused": False,
    "http.request.size": 60,
    "http.response.size": 160,
    "http.response.status_code": 200,
    "nginx.upstream.time_to_first_byte_ns": 100 * MS,
}
ASKED = {"http.request.method": "GET", "server.address": "backend"}
FIRST = peer("127.0.0.1:1", "127.0.0.1", 1, 1)
SECOND = peer("[::1]:2", "::1", 2, 2)
TRACE = Trace(
    "0123456789abcdef0123456789abcdef",
    1,
    "",
    {},
    (
        span(1, "GET /app", "SERVER", 0.5, 300.5, **SERVER),
        span(2, "downstream read", "INTERNAL", 0.5, 1),
        span(3, "upstream connect", "CLIENT", 1, 51, **FIRST, **ASKED, **{"error.type": "ECONNREFUSED"}),
        span(4, "upstream connect", "INTERNAL", 51, 101, **SECOND),
        span(5, "upstream exchange", "CLIENT", 101.1, 251.1, **SECOND, **ASKED, **EXCHANGE),
        span(6, "downstream write", "INTERNAL", 202, 300.5),
    ),
)


def violations(trace: Trace, log: LogLine) -> list[str]:
    facts = check_facts(trace, log)
    # Times can only be paired where the attempts are the right ones.
    return facts or check_times(trace, log, Lags(), NO_SLACK)


def with_span(index: int, **changes: Any) -> Trace:
    spans = list(TRACE.spans)
    spans[index] = replace(spans[index], **changes)
    return replace(TRACE, spans=tuple(spans))


def test_a_true_trace_passes() -> None:
    assert violations(TRACE, LOG) == []


@pytest.mark.parametrize("index", range(len(TRACE.spans)))
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "PRODUCER"},
        {"parent_span_id": "00000000000000ff"},
        {"span_id": "0000000000000003"},
        {"error": "invented", "status": "UNSET"},
        {"start_unix_ns": (START_MS - 40) * MS},
        {"end_unix_ns": (START_MS + 400) * MS},
        {"start_unix_ns": START_MS * MS + 400 * MS, "end_unix_ns": START_MS * MS + 400 * MS},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_a_wrong_span(index: int, changes: dict[str, Any]) -> None:
    changed = with_span(index, **changes)
    if changed != TRACE:
        assert violations(changed, LOG)


@pytest.mark.parametrize(
    ("index", "name"),
    [(index, name) for index, each in enumerate(TRACE.spans) for name in each.attributes if name != "http.route"],
)
def test_a_wrong_or_absent_attribute(index: int, name: str) -> None:
    attributes = TRACE.spans[index].attributes
    value = attributes[name]
    wrong = "wrong" if isinstance(value, str) else value + (60 * MS if name.endswith("_ns") else 1)
    if TRACE.spans[index].kind != "CLIENT" or name not in ASKED:  # nginx does not log what it sent
        assert violations(with_span(index, attributes={**attributes, name: wrong}), LOG)
    without = {key: value for key, value in attributes.items() if key != name}
    assert violations(with_span(index, attributes=without), LOG)


@pytest.mark.parametrize("index", [2, 3, 4])
def test_an_attempts_span_is_missing(index: int) -> None:
    spans = TRACE.spans[:index] + TRACE.spans[index + 1 :]
    assert violations(replace(TRACE, spans=spans), LOG)


@pytest.mark.parametrize("name", sorted(LOG.keys() - {"host", "request_method", *NO_CONTEXT, *NO_PROXY}))
def test_nginx_logged_something_else(name: str) -> None:
    other = {
        "msec": f"{START_MS / 1000 + 0.4:.3f}",
        "ssl_protocol": "TLSv1.3",
        "upstream_addr": "127.0.0.1:1, 127.0.0.1:2",
        "upstream_status": "502, 201",
        "upstream_connect_time": "-, 0.200",
        "upstream_header_time": "-, 0.100",
        "upstream_response_time": "0.050, 0.300",
        "upstream_bytes_sent": "0, 61",
        "upstream_bytes_received": "0, 161",
        "request": "POST / HTTP/1.1",
        "server_protocol": "HTTP/1.0",
    }.get(name)
    other = other or {"request_time": "0.400"}.get(name) or f"{LOG[name]}9"
    assert violations(TRACE, {**LOG, name: other})


def test_no_live_peers_have_no_spans() -> None:
    log = {**LOG, "status": "502"}
    log |= {name: "" for name in LOG if name.startswith("upstream")}
    log |= {"upstream_addr": "app", "upstream_status": "502", "upstream_response_time": "0.000"}
    log |= dict.fromkeys(("upstream_connect_time", "upstream_header_time"), "-")
    log |= dict.fromkeys(("upstream_bytes_sent", "upstream_bytes_received"), "0")
    attributes = {**SERVER, "http.response.status_code": 502, "error.type": "502"}
    del attributes["nginx.upstream.attempts"]
    server = replace(TRACE.server, attributes=attributes, status="ERROR", error="502")
    write = replace(TRACE.spans[5], start_unix_ns=TRACE.server.start_unix_ns + MS)
    assert violations(replace(TRACE, spans=(server, TRACE.spans[1], write)), log) == []
    assert violations(replace(TRACE, spans=(server, *TRACE.spans[1:])), log)

"""Hand-made requests, packed like the kernel's records and decoded again, and their traces."""

import socket
import struct
from dataclasses import replace

from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.traces.abi import (
    LIMITS,
    REQUEST_RECORD,
    STRING_HEADER,
    STRING_KINDS,
    UPSTREAM_ATTEMPT,
    CStruct,
    c_enum,
)
from otel_nginx_ebpf.traces.error_log import LOG_LINE
from otel_nginx_ebpf.traces.model import AttributeValue, Span, Trace
from otel_nginx_ebpf.traces.record import Request, decode

UNIX_OFFSET_NS = 1_700_000_000_000_000_000
MONO_NS = 5_000_000_000
"""When the client connection of every sample was accepted."""
CLIENT = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 51234) + bytes([192, 0, 2, 7]) + bytes(8)
CLIENT_V6 = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", 51234, 0) + bytes(15) + b"\1" + bytes(4)


def _pack(layout: CStruct, values: dict[str, int]) -> bytes:
    names = [name for _, name in layout.fields]
    assert set(values) <= set(names)
    return layout.struct.pack(*(values.get(name, 0) for name in names))


def string(kind: str, text: str | bytes, attempt: int = 0) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    header = {"kind": STRING_KINDS[kind], "attempt": attempt, "bytes": len(raw), "whole_bytes": len(raw)}
    return _pack(STRING_HEADER, header) + raw + bytes(-len(raw) % 8)


def record(
    strings: dict[str, str | bytes],
    attempts: list[tuple[str, dict[str, int]]],
    tracestate: tuple[str, ...] = (),
    **fields: int,
) -> bytes:
    """A record of the kernel's. An attempt is its peer and its fields; `tracestate` that header's lines."""
    parts = [_pack(REQUEST_RECORD, {**fields, "attempts": len(attempts), "upstream_states": len(attempts)})]
    parts += [_pack(UPSTREAM_ATTEMPT, values) for _, values in attempts]
    parts += [string(kind, text) for kind, text in strings.items()]
    parts += [string("STRING_TRACESTATE", line, index) for index, line in enumerate(tracestate)]
    parts += [string("STRING_PEER", peer, index) for index, (peer, _) in enumerate(attempts)]
    return b"".join(parts)


def with_headers(raw: bytes) -> bytes:
    """A record with captured headers: X-Tenant with two values, a secret, and Last-Modified."""
    how = c_enum("captured")
    at = REQUEST_RECORD.offset("headers_at")
    return b"".join(
        [
            raw[:at],
            struct.pack("<H", len(raw)),
            raw[at + 2 :],
            string("STRING_REQUEST_HEADER", "x-tenant"),
            string("STRING_HEADER_VALUE", "one"),
            string("STRING_REQUEST_HEADER", "x-tenant"),
            string("STRING_REQUEST_HEADER", "cookie", how["CAPTURED_REDACTED"]),
            string("STRING_RESPONSE_HEADER", "last-modified", how["CAPTURED_TIME"]),
            string("STRING_HEADER_VALUE", struct.pack("<q", 784111777)),
        ]
    )


def log_line(text: str | bytes, **fields: int) -> bytes:
    """A line of the error log, as the kernel sends it."""
    raw = text.encode() if isinstance(text, str) else text
    marker = c_enum("log_marker")["LOG_MARKER"]
    told = {"marker": marker, "worker_pid": 4711, "logged_ns": MONO_NS, "lines": 1, "attempt": LIMITS["NO_ATTEMPT"]}
    return _pack(LOG_LINE, {**told, "bytes": len(raw), **fields}) + raw


def log_end(lines: int, **fields: int) -> bytes:
    """The end of a request with this many lines."""
    return log_line(b"", lines=lines, level=0, **fields)


STATIC = record(
    {"STRING_URI": "/index.html", "STRING_CLIENT_SOCKADDR": CLIENT, "STRING_METHOD": "GET"},
    [],
    accepted_ns=MONO_NS,
    first_read_ns=MONO_NS + 40_000,
    created_ns=MONO_NS + 41_000,
    last_read_ns=MONO_NS + 40_000,
    first_write_ns=MONO_NS + 90_000,
    last_write_ns=MONO_NS + 130_000,
    ended_ns=MONO_NS + 140_000,
    ends_with_write=1,
    connection=1,
    connection_requests=1,
    request_length=78,
    bytes_sent=850,
    http_version=1001,
    out_status=200,
    worker_pid=4711,
    trace_id_low=0xABC,
    trace_flags=1,
)

RETRIED = record(
    {"STRING_URI": "/api/users?id=1", "STRING_CLIENT_SOCKADDR": CLIENT_V6, "STRING_METHOD": "GET"},
    [
        (
            "127.0.0.1:9",
            {
                "connect_start_ns": MONO_NS + 200_000,
                "connect_failed_ns": MONO_NS + 290_000,
                "ended_ns": MONO_NS + 295_000,
                "connect_errno": 111,
            },
        ),
        (
            "[::1]:8080",
            {
                "connect_start_ns": MONO_NS + 300_000,
                "connected_ns": MONO_NS + 450_000,
                "first_write_ns": MONO_NS + 460_000,
                "last_write_ns": MONO_NS + 470_000,
                "first_read_ns": MONO_NS + 9_000_000,
                "last_read_ns": MONO_NS + 12_000_000,
                "ended_ns": MONO_NS + 12_010_000,
                "ends_with_read": 1,
                "bytes_sent": 120,
                "bytes_received": 5300,
                "status": 200,
            },
        ),
    ],
    accepted_ns=MONO_NS,
    first_read_ns=MONO_NS + 40_000,
    created_ns=MONO_NS + 41_000,
    last_read_ns=MONO_NS + 180_000,
    first_write_ns=MONO_NS + 9_050_000,
    last_write_ns=MONO_NS + 12_100_000,
    ended_ns=MONO_NS + 12_110_000,
    ends_with_write=1,
    connection=2,
    connection_requests=1,
    request_length=99,
    bytes_sent=5400,
    http_version=1001,
    out_status=200,
    worker_pid=4711,
    trace_id_low=0xABC,
    trace_flags=1,
)


def trace_of(request: Request, spans: list[Span], trace_id: int = 0xABC) -> Trace:
    return Trace(trace_id, tuple(spans), request, UNIX_OFFSET_NS)


def span(
    name: str,
    kind: SpanKind,
    start_ns: int,
    end_ns: int,
    attributes: dict[str, AttributeValue] | None = None,
    *,
    span_id: int,
    error: str | None = None,
) -> Span:
    """A span between two times since `MONO_NS`; span 1 is the root."""
    unix_ns = MONO_NS + UNIX_OFFSET_NS
    parent = None if span_id == 1 else 1
    return Span(name, kind, span_id, parent, unix_ns + start_ns, unix_ns + end_ns, attributes or {}, error)


def static_trace(**attributes: AttributeValue) -> Trace:
    server: dict[str, AttributeValue] = {
        "http.request.method": "GET",
        "url.path": "/index.html",
        "http.response.status_code": 200,
        "client.address": "192.0.2.7",
    }
    server |= {name.replace("__", "."): value for name, value in attributes.items()}
    return trace_of(
        decode(STATIC),
        [
            span("GET /", SpanKind.SERVER, 40_000, 130_000, server, span_id=1),
            span("downstream write", SpanKind.INTERNAL, 90_000, 130_000, span_id=2),
        ],
    )


def retried_trace(trace_id: int = 0xABC) -> Trace:
    server: dict[str, AttributeValue] = {
        "http.request.method": "GET",
        "url.path": "/api/users",
        "url.query": "id=1",
        "http.response.status_code": 200,
        "client.address": "::1",
    }
    refused: dict[str, AttributeValue] = {"nginx.upstream.peer": "127.0.0.1:9", "nginx.upstream.attempt": 1}
    live: dict[str, AttributeValue] = {"nginx.upstream.peer": "[::1]:8080", "nginx.upstream.attempt": 2}
    answered = live | {"http.response.status_code": 200}
    internal = SpanKind.INTERNAL
    return trace_of(
        decode(RETRIED),
        [
            span("GET /api/", SpanKind.SERVER, 40_000, 12_100_000, server, span_id=1),
            span("downstream read", internal, 40_000, 180_000, span_id=2),
            span("upstream connect", internal, 200_000, 290_000, refused, span_id=3, error="connection refused"),
            span("upstream connect", internal, 300_000, 450_000, live, span_id=4),
            span("upstream exchange", SpanKind.CLIENT, 460_000, 12_000_000, answered, span_id=5),
            span("downstream write", internal, 9_050_000, 12_100_000, span_id=6),
        ],
        trace_id,
    )


def renumbered(trace: Trace, trace_id: int) -> Trace:
    return replace(trace, trace_id=trace_id)

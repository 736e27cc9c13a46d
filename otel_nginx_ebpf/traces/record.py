"""Decodes the kernel's record of one completed request.

Turns the bytes, whose layout `traces.abi` describes, into a `Request`.
"""

import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from otel_nginx_ebpf.traces import captured_headers, hpack_fields
from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, STRING_HEADER, STRING_KINDS, UPSTREAM_ATTEMPT, c_enum
from otel_nginx_ebpf.traces.error_log import LogLine


class RecordError(Exception):
    """The bytes are not a record: they are truncated, or their counts and lengths contradict each other."""


_METHOD = STRING_KINDS["STRING_METHOD"]
_URI = STRING_KINDS["STRING_URI"]
_HOST = STRING_KINDS["STRING_HOST"]
_USER_AGENT = STRING_KINDS["STRING_USER_AGENT"]
_LOCATION = STRING_KINDS["STRING_LOCATION"]
_SERVER_NAME = STRING_KINDS["STRING_SERVER_NAME"]
_CLIENT_SOCKADDR = STRING_KINDS["STRING_CLIENT_SOCKADDR"]
_LOCAL_SOCKADDR = STRING_KINDS["STRING_LOCAL_SOCKADDR"]
_PEER = STRING_KINDS["STRING_PEER"]
_UPSTREAM = STRING_KINDS["STRING_UPSTREAM"]
_SUBREQUEST_URI = STRING_KINDS["STRING_SUBREQUEST_URI"]
_TRACESTATE = STRING_KINDS["STRING_TRACESTATE"]
_UNSEEN_PEER = STRING_KINDS["STRING_UNSEEN_PEER"]
_REQUEST_TARGET = STRING_KINDS["STRING_REQUEST_TARGET"]
_PEER_SOCKADDR = STRING_KINDS["STRING_PEER_SOCKADDR"]
_SENT_LINE = STRING_KINDS["STRING_SENT_LINE"]
_SENT_HOST = STRING_KINDS["STRING_SENT_HOST"]
_SENT_PATH = STRING_KINDS["STRING_SENT_PATH"]
_SENT_AUTHORITY = STRING_KINDS["STRING_SENT_AUTHORITY"]
_FORWARDED = STRING_KINDS["STRING_FORWARDED"]
_X_FORWARDED_PROTO = STRING_KINDS["STRING_X_FORWARDED_PROTO"]
_X_FORWARDED_HOST = STRING_KINDS["STRING_X_FORWARDED_HOST"]

# `decode` below unpacks the structs in the order of their declaration. A test checks the order.
_unpack_request = REQUEST_RECORD.struct.unpack_from
_unpack_attempt = UPSTREAM_ATTEMPT.struct.unpack_from
_unpack_string_header = STRING_HEADER.struct.unpack_from
_REQUEST_BYTES = REQUEST_RECORD.size
_ATTEMPT_BYTES = UPSTREAM_ATTEMPT.size
_STRING_HEADER_BYTES = STRING_HEADER.size

_BINARY = frozenset({_CLIENT_SOCKADDR, _LOCAL_SOCKADDR, _PEER_SOCKADDR, _SENT_PATH, _SENT_AUTHORITY})

# Kinds of strings that differ from request to request. A record's strings begin with such strings. The section after
# them is mostly equal to the section of another record, so decoded sections are cached.
VARYING_STRINGS = frozenset(
    {
        _URI,
        _REQUEST_TARGET,
        _USER_AGENT,
        _CLIENT_SOCKADDR,
        _PEER_SOCKADDR,
        _FORWARDED,
        _TRACESTATE,
        _SENT_LINE,
        _SENT_PATH,
    }
)
_KEPT_SECTIONS = 1024
_KEPT_SECTION_BYTES_MAX = 1024

ENDINGS = {value: name.removeprefix("ENDED_").lower() for name, value in c_enum("ending").items() if value}
OUTCOMES = {value: name.removeprefix("OUTCOME_").lower() for name, value in c_enum("outcome").items() if value}
METHODS = {bit: name.removeprefix("METHOD_") for name, bit in c_enum("method").items()}
"""The methods that the semantic conventions know, by nginx's bit: RFC 9110, PATCH (RFC 5789) and QUERY."""
CACHE_STATUSES = {value: name.removeprefix("CACHE_") for name, value in c_enum("cache_status").items()}
LIMIT_REQ_STATUSES = {value: name.removeprefix("LIMIT_REQ_") for name, value in c_enum("limit_req_status").items()}
LIMIT_CONN_STATUSES = {value: name.removeprefix("LIMIT_CONN_") for name, value in c_enum("limit_conn_status").items()}
HTTP_VERSIONS = {
    number: name.removeprefix("HTTP_VERSION_").replace("_", ".") for name, number in c_enum("http_version").items()
}
PROTOCOLS = {value: name.removeprefix("PROTOCOL_").lower() for name, value in c_enum("protocol").items() if value}
_HTTP_2 = next(value for value, name in PROTOCOLS.items() if name == "http_2")
_KEPT = {value: name.removeprefix("KEPT_").lower() for name, value in c_enum("kept").items() if value}

_WORKER_PID = struct.Struct("<I")
_WORKER_PID_OFFSET = REQUEST_RECORD.offset("worker_pid")

MS_NONE = 2**64 - 1

# Times of nginx from this value on are impossible: nginx's clock counts from the machine's start.
MS_MAX = 2**40

# The classes are not frozen: a frozen object takes ten times as long to make, and each request needs one.


@dataclass(slots=True)
class Attempt:
    """One attempt at one upstream peer. `_mono_ns` times are CLOCK_MONOTONIC nanoseconds; `None`: did not happen."""

    connect_start_mono_ns: int | None
    """`None`: the connection was open already, or only `connected_mono_ns` is known."""
    connected_mono_ns: int | None
    connect_failed_mono_ns: int | None
    first_write_mono_ns: int | None
    last_write_mono_ns: int | None
    first_read_mono_ns: int | None
    last_read_mono_ns: int | None
    ended_mono_ns: int
    connect_ms: int | None
    """The three `_ms` times are nginx's own, in milliseconds.

    They are $upstream_connect_time, $upstream_header_time and $upstream_response_time.
    """
    header_ms: int | None
    response_ms: int | None
    sent_bytes: int | None
    """`None`: this nginx does not count sent bytes (before 1.15.8)."""
    received_bytes: int | None
    status: int | None
    """`None`: the peer sent no response."""
    connect_errno: int
    tls: bool
    subrequest: bool
    peer: str | None
    """The peer as nginx names it in $upstream_addr: `127.0.0.1:80`, `[::1]:80`, `unix:/path`."""
    upstream: str | None
    """The name of the upstream block, or the host of a `proxy_pass` that uses no upstream block."""
    subrequest_uri: str | None
    span_id: int | None
    """The id of the exchange's span that the peer received. Attempts may share an id. `None`: it received no id."""
    outcome: str | None
    """`incomplete`, `timeout`: the rest of the response did not come. `abandoned`: the peer did nothing wrong."""
    ends_with_read: bool
    """Whether the exchange ended with `last_read_mono_ns`. Otherwise it ended with `ended_mono_ns`."""
    protocol: str | None = None
    """What nginx speaks to the peer: `http_1`, `http_2`, `fastcgi`, `uwsgi`, `scgi`, `memcached`. `None`: not known."""
    method_bit: int = 0
    """nginx's number for the method that the peer was sent; 0: not known."""
    upstream_request: int = 0
    """Attempts that send the same request to one peer after another share this number."""
    sent_line: str | None = None
    """The request line that the peer was sent (HTTP/2: what it would be in HTTP/1). `None`: not HTTP, or not known."""
    sent_host: str | None = None
    """The Host header (HTTP/2: `:authority`) that the peer was sent. `None`: as for `sent_line`, or it has none."""
    impossible: int = 0
    """How many of nginx's numbers for the attempt are impossible. An impossible time or size is `None`."""


@dataclass(slots=True)
class Request:
    """One completed request. `_mono_ns` times are CLOCK_MONOTONIC nanoseconds; `None`: did not happen or not seen."""

    accepted_mono_ns: int | None
    first_read_mono_ns: int | None
    """`None`: the first byte was read together with an earlier request's bytes (pipelining)."""
    created_mono_ns: int
    last_read_mono_ns: int | None
    first_write_mono_ns: int | None
    last_write_mono_ns: int | None
    ended_mono_ns: int
    rc: int
    """0: nginx ended the request normally. Otherwise the status with which nginx closed the request (408, 499, …)."""
    connection: int
    connection_requests: int
    request_bytes: int | None
    """$request_length. `None`: nginx's own number is below 0."""
    sent_bytes: int | None
    """$bytes_sent. `None`: nginx's own number is below 0."""
    nginx_start_unix_ms: int
    http_version: int
    status: int
    """$status: the number that nginx noted, even if HTTP has no such status."""
    worker_pid: int
    upstream_states: int
    tls: bool
    multiplexed: bool
    attempts: tuple[Attempt, ...]
    """The upstream attempts, in the order in which they began."""
    attempts_lost: int
    """How many of the main request's attempts are missing in `attempts`, because the record had no room for them."""
    unseen_peers: tuple[str, ...]
    """Elements of $upstream_addr without an attempt: peers that were not seen, or the upstream's name.

    nginx notes the upstream's name if no peer was live.
    """
    method_bit: int
    """nginx's number for the method (ngx_http_request.h: NGX_HTTP_GET and so on)."""
    requests_seen: int | None
    """How many requests the kernel program saw begin on the connection, including this one.

    `None`: it did not see the connection's first request.
    """
    method: str | None
    uri: str | None
    """The original request target with its query, as in $request_uri."""
    cut: tuple[str, ...]
    """The kinds of the strings (`STRING_URI`, …) that the kernel program cut short."""
    host: str | None
    user_agent: str | None
    location: str | None
    server_name: str | None
    client_sockaddr: bytes | None
    local_sockaddr: bytes | None
    trace_id: int
    parent_span_id: int | None
    """The span of the incoming trace context. `None`: the trace begins here."""
    trace_flags: int
    """W3C trace-flags of the spans. Bit 0, sampled, is the kernel program's decision."""
    kept: str | None
    """Why the request has a record although the sampler left it out: `error`, `slow`. `None`: it was sampled."""
    trace_state: str | None
    ending: str | None
    """Why nginx abandoned the request or its response: `timeout`, `client_closed_request`, … (`enum ending`)."""
    ends_with_write: bool
    """Whether the request ended with `last_write_mono_ns`. Otherwise it ended with `ended_mono_ns`."""
    peer_sockaddr: bytes | None = None
    """The socket's peer, also if nginx has replaced the client's address. `None`: not known."""
    request_target: str | None = None
    """The rest of the client's request line after the method, if the target is in absolute form."""
    forwarded: str | None = None
    """The last of these headers of the client's request. `None`: absent, or not asked for (`--trusted-proxy`)."""
    x_forwarded_proto: str | None = None
    x_forwarded_host: str | None = None
    impossible: int = 0
    """How many of nginx's numbers are impossible, including the attempts'. An impossible time or size is `None`."""
    cache_status: str | None = None
    """$upstream_cache_status: `MISS`, `HIT`, … `None`: the cache was not asked, or it is not known."""
    limit_req_status: str | None = None
    """$limit_req_status: `PASSED`, `DELAYED`, … `None`: no limit applies, or it is not known."""
    limit_conn_status: str | None = None
    """$limit_conn_status; as above."""
    waited_for_cache: bool = False
    """Whether the request is known to have waited while another one filled the cache."""
    captured_headers: bytes = b""
    """The captured headers as they are in the record (`traces.captured_headers`)."""
    headers_missing: bool = False
    """Whether headers to be captured may be missing in `captured_headers`."""
    handshake_ns: int | None = None
    """From the accept to the end of the TLS handshake, for the connection's first request."""
    longest_turn_ns: int | None = None
    """The longest time in the request in which the worker did not come back to its event loop, from 10 ms on."""
    rule: int = 0
    """The number of the rule that matched, from 1; 0: none."""
    log_lines: tuple[LogLine, ...] = ()
    """What nginx logged for the request. The record does not have it: the emitter adds it (`traces.error_log`)."""


def http_status(status: int | None) -> int | None:
    """Returns the status if it is an HTTP status, else `None`.

    nginx notes 0 or 9 if there is no status, and a module may note any number.
    """
    return status if status is not None and 100 <= status < 600 else None


def _status(rc: int, err_status: int, out_status: int, sent_bytes: int, http_version: int) -> int:
    """Returns $status as nginx decides it (ngx_http_free_request, ngx_http_variable_status)."""
    if rc > 0 and (out_status == 0 or sent_bytes == 0):
        out_status = rc
    return err_status or out_status or (9 if http_version == 9 else 0)


def decode_strings(raw: bytes, offset: int = 0, kinds: Container[int] = range(256)) -> tuple[dict[int, Any], int, int]:
    """Decodes the strings from `offset` to the record's end. Stops at the first string that is not of `kinds`.

    Returns:
        Three values. First, the strings by kind + 256 * attempt, without empty strings. Socket addresses and fields of
        HTTP/2 are bytes; all others are text, decoded from UTF-8, in which other bytes appear as `\\xNN`. Second, the
        kinds of the strings that the kernel program cut, as a set of bits. Third, the offset at which the last string
        ends.
    """
    values: dict[int, str | bytes] = {}
    cut = 0
    raw_end = len(raw)
    try:
        while offset < raw_end and raw[offset] in kinds:
            kind, attempt, length, whole = _unpack_string_header(raw, offset)
            start = offset + _STRING_HEADER_BYTES
            end = start + length
            offset = end + -length % 8
            if whole > length:
                cut |= 1 << kind
            if length:
                value = raw[start:end]
                values[kind + 256 * attempt] = value if kind in _BINARY else str(value, "utf-8", "backslashreplace")
    except struct.error as error:
        raise RecordError(f"a string's header is cut short: {raw_end - offset} bytes") from error
    if offset > raw_end:
        raise RecordError(f"a string of {length} bytes passes the record's end")
    return values, cut, offset


def headers_section(raw: bytes, offset: int, headers_at: int) -> bytes:
    """Returns the captured headers of a record, from `headers_at`. `offset`: behind the strings that come first.

    Raises:
        RecordError: The headers are damaged.
    """
    if not headers_at:
        return b""
    if not offset <= headers_at <= len(raw):
        raise RecordError(f"captured headers at byte {headers_at} of {len(raw)}")
    section = raw[headers_at:]
    try:
        captured_headers.parse(section)
    except ValueError as error:
        raise RecordError(str(error)) from error
    return section


_kept_strings = lru_cache(_KEPT_SECTIONS)(decode_strings)


def _trace_state(strings: dict[int, Any]) -> str | None:
    """Returns the `tracestate` header lines as one line (W3C Trace Context, 3.3.1: in order, joined with commas)."""
    lines = sorted(key for key in strings if key & 0xFF == _TRACESTATE)
    return ",".join(strings[key] for key in lines) if lines else None


def _attempt(raw: bytes, index: int, string: Callable[[int], Any], lines: dict[int, str]) -> Attempt:
    """Decodes an attempt. `lines` has the earlier attempts' request lines; a retry has its line from there."""
    (
        connect_start_ns,
        connected_ns,
        connect_failed_ns,
        first_write_ns,
        last_write_ns,
        first_read_ns,
        last_read_ns,
        ended_ns,
        connect_msec,
        header_msec,
        response_msec,
        bytes_sent,
        bytes_received,
        status,
        connect_errno,
        subrequest,
        tls,
        outcome,
        ends_with_read,
        protocol,
        method_bit,
        upstream_request,
        span_id,
    ) = _unpack_attempt(raw, _REQUEST_BYTES + index * _ATTEMPT_BYTES)
    times = connect_msec, header_msec, response_msec
    impossible = sum([MS_MAX <= msec < MS_NONE for msec in times]) if max(times) >= MS_MAX else 0
    if protocol == _HTTP_2:
        line, host = _sent_over_http2(
            method_bit, string(_SENT_PATH + 256 * index), string(_SENT_AUTHORITY + 256 * index)
        )
    else:
        line, host = string(_SENT_LINE + 256 * index), string(_SENT_HOST + 256 * index)
    if line is not None:
        lines[upstream_request] = line
    impossible += (bytes_sent < -1) + (bytes_received < 0) + (status != 0 and http_status(status) is None)
    return Attempt(
        connect_start_ns or None,
        connected_ns or None,
        connect_failed_ns or None,
        first_write_ns or None,
        last_write_ns or None,
        first_read_ns or None,
        last_read_ns or None,
        ended_ns,
        connect_msec if connect_msec < MS_MAX else None,
        header_msec if header_msec < MS_MAX else None,
        response_msec if response_msec < MS_MAX else None,
        bytes_sent if bytes_sent >= 0 else None,
        bytes_received if bytes_received >= 0 else None,
        status or None,
        connect_errno,
        tls != 0,
        subrequest != 0,
        string(_PEER + 256 * index),
        string(_UPSTREAM + 256 * index),
        string(_SUBREQUEST_URI + 256 * index),
        span_id or None,
        OUTCOMES.get(outcome),
        ends_with_read != 0,
        PROTOCOLS.get(protocol),
        method_bit,
        upstream_request,
        lines.get(upstream_request),
        host,
        impossible,
    )


def _sent_over_http2(method_bit: int, path: bytes | None, authority: bytes | None) -> tuple[str | None, str | None]:
    """Returns what an HTTP/2 request would have as its request line and Host header in HTTP/1. `None`: not known."""
    target = hpack_fields.path(path) if path else None
    line = f"{METHODS.get(method_bit, '')} {target} HTTP/2" if target is not None else None
    return line, hpack_fields.value(authority) if authority else None


def worker_pid(raw: bytes | memoryview) -> int:
    """Returns the pid of a record's worker, without decoding the rest. Raises `RecordError` for truncated bytes."""
    try:
        return int(_WORKER_PID.unpack_from(raw, _WORKER_PID_OFFSET)[0])
    except struct.error as error:
        raise RecordError(f"a record of {len(raw)} bytes is cut short") from error


def decode(raw: bytes) -> Request:
    """Decodes one record.

    Raises:
        RecordError: The bytes are truncated or contradict themselves.
    """
    try:
        (
            accepted_ns,
            first_read_ns,
            created_ns,
            last_read_ns,
            first_write_ns,
            last_write_ns,
            ended_ns,
            handshake_ns,
            longest_turn_ns,
            rc,
            connection,
            connection_requests,
            request_length,
            bytes_sent,
            nginx_start_sec,
            nginx_start_msec,
            http_version,
            limit_req_status,
            limit_conn_status,
            waited_for_cache,
            err_status,
            out_status,
            worker_pid,
            upstream_states,
            tls,
            multiplexed,
            attempts_count,
            attempts_lost,
            method_bit,
            requests_seen,
            trace_flags,
            kept,
            coarse_start,
            ending,
            ends_with_write,
            _,
            peer_known,
            cache_status,
            headers_at,
            headers_missing,
            rule,
            trace_id_high,
            trace_id_low,
            parent_span_id,
        ) = _unpack_request(raw)
    except struct.error as error:
        raise RecordError(f"a record of {len(raw)} bytes is cut short") from error
    attempts_end = _REQUEST_BYTES + attempts_count * _ATTEMPT_BYTES
    if attempts_end > len(raw):
        raise RecordError(f"{attempts_count} attempts do not fit in a record of {len(raw)} bytes")
    strings, cut, offset = decode_strings(raw, attempts_end, VARYING_STRINGS)
    headers = headers_section(raw, offset, headers_at)
    section = raw[offset:headers_at] if headers_at else raw[offset:]
    common, common_cut, _ = (_kept_strings if len(section) <= _KEPT_SECTION_BYTES_MAX else decode_strings)(section)
    strings |= common
    cut |= common_cut
    string = strings.get
    lines: dict[int, str] = {}
    attempts = tuple([_attempt(raw, index, string, lines) for index in range(attempts_count)]) if attempts_count else ()
    if coarse_start and attempts:  # nginx's clock may be 1 ms late, but a request began before its attempts
        created_ns = min(
            created_ns, *(each.connect_start_mono_ns or each.first_write_mono_ns or created_ns for each in attempts)
        )
    status = _status(rc, err_status, out_status, bytes_sent, http_version)
    impossible = (request_length < 0) + (bytes_sent < 0) + (http_status(status) is None)
    if attempts:
        impossible += sum([attempt.impossible for attempt in attempts])
    return Request(
        accepted_ns or None,
        first_read_ns or None,
        created_ns,
        last_read_ns or None,
        first_write_ns or None,
        last_write_ns or None,
        ended_ns,
        rc,
        connection,
        connection_requests,
        request_length if request_length >= 0 else None,
        bytes_sent if bytes_sent >= 0 else None,
        nginx_start_sec * 1000 + nginx_start_msec,
        http_version,
        status,
        worker_pid,
        upstream_states,
        tls != 0,
        multiplexed != 0,
        attempts,
        attempts_lost,
        tuple([strings[key] for key in strings if key & 0xFF == _UNSEEN_PEER])
        if upstream_states > attempts_count
        else (),
        method_bit,
        requests_seen or None,
        string(_METHOD),
        string(_URI),
        tuple(name for name, kind in STRING_KINDS.items() if cut >> kind & 1) if cut else (),
        string(_HOST),
        string(_USER_AGENT),
        string(_LOCATION),
        string(_SERVER_NAME),
        string(_CLIENT_SOCKADDR),
        string(_LOCAL_SOCKADDR),
        trace_id_high << 64 | trace_id_low,
        parent_span_id or None,
        trace_flags,
        _KEPT.get(kept),
        _trace_state(strings) if _TRACESTATE in strings else None,
        ENDINGS.get(ending),
        ends_with_write != 0,
        (string(_PEER_SOCKADDR) or string(_CLIENT_SOCKADDR)) if peer_known else None,
        string(_REQUEST_TARGET),
        string(_FORWARDED),
        string(_X_FORWARDED_PROTO),
        string(_X_FORWARDED_HOST),
        impossible,
        cache_status=CACHE_STATUSES.get(cache_status),
        limit_req_status=LIMIT_REQ_STATUSES.get(limit_req_status),
        limit_conn_status=LIMIT_CONN_STATUSES.get(limit_conn_status),
        waited_for_cache=waited_for_cache != 0,
        captured_headers=headers,
        headers_missing=headers_missing != 0,
        rule=rule,
        handshake_ns=handshake_ns or None,
        longest_turn_ns=longest_turn_ns or None,
    )

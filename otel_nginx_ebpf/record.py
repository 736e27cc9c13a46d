"""The kernel's record of one completed request, decoded.

The layout is declared once, in `probes/record.h`; this module derives its `struct` formats, enums and
limits from that file's text and turns bytes into a `Request`.
"""

import re
import struct
from collections import namedtuple
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

HEADER_TEXT = (files("otel_nginx_ebpf.probes") / "record.h").read_text(encoding="utf-8")

_FORMATS = {
    "__u8": "B",
    "__u16": "H",
    "__u32": "I",
    "__s32": "i",
    "__u64": "Q",
    "__s64": "q",
}


class RecordError(Exception):
    """The bytes are not a record: truncated, or counts and lengths that contradict each other."""


class CStruct:
    """A struct of `probes/record.h`: its fields in order, and their packed little-endian format."""

    def __init__(self, name: str, header_text: str = HEADER_TEXT) -> None:
        body = re.search(rf"^struct {name} {{(.*?)^}};", header_text, re.DOTALL | re.MULTILINE)
        if body is None:
            raise ValueError(f"record.h declares no struct {name}")
        self.name = name
        self.fields: tuple[tuple[str, str], ...] = tuple(re.findall(r"^\s+(__\w+) (\w+);", body[1], re.MULTILINE))
        self.struct = struct.Struct("<" + "".join(_FORMATS[kind] for kind, _ in self.fields))
        self.size = self.struct.size
        self._values: Any = namedtuple(name, [field for _, field in self.fields])  # type: ignore[misc]

    def offset(self, field: str) -> int:
        """Where a field begins, bytes."""
        names = [name for _, name in self.fields]
        return struct.calcsize("<" + "".join(_FORMATS[kind] for kind, _ in self.fields[: names.index(field)]))

    def unpack(self, buffer: bytes | memoryview, offset: int) -> Any:
        """Fields by name, as attributes. Raises `RecordError` when the buffer ends inside the struct."""
        try:
            return self._values._make(self.struct.unpack_from(buffer, offset))
        except struct.error as error:
            raise RecordError(f"{self.name} at byte {offset} is cut short: {len(buffer)} bytes in all") from error


def c_enum(name: str, header_text: str = HEADER_TEXT) -> dict[str, int]:
    """The members of an enum of `probes/record.h` and their values."""
    body = re.search(rf"^enum {name} {{(.*?)^}};", header_text, re.DOTALL | re.MULTILINE)
    if body is None:
        raise ValueError(f"record.h declares no enum {name}")
    return {member: int(value) for member, value in re.findall(r"^\s+(\w+) = (\d+),", body[1], re.MULTILINE)}


REQUEST_RECORD = CStruct("request_record")
UPSTREAM_ATTEMPT = CStruct("upstream_attempt")
STRING_HEADER = CStruct("string_header")
STRING_KINDS = c_enum("string_kind")
LIMITS = c_enum("limit")

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

_WORKER_PID = struct.Struct("<I")
_WORKER_PID_OFFSET = REQUEST_RECORD.offset("worker_pid")

_NONE = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one upstream peer. `_mono_ns` times are CLOCK_MONOTONIC nanoseconds, None: did not happen."""

    connect_start_mono_ns: int | None
    """None on a connection that was open already."""
    connected_mono_ns: int | None
    connect_failed_mono_ns: int | None
    first_write_mono_ns: int | None
    last_write_mono_ns: int | None
    first_read_mono_ns: int | None
    last_read_mono_ns: int | None
    ended_mono_ns: int
    connect_ms: int | None
    """nginx's own $upstream_connect_time, $upstream_header_time and $upstream_response_time, milliseconds."""
    header_ms: int | None
    response_ms: int | None
    sent_bytes: int | None
    """None where this nginx does not count them (before 1.15.8)."""
    received_bytes: int
    status: int | None
    """None when the peer gave no response."""
    connect_errno: int
    tls: bool
    subrequest: bool
    peer: str | None
    """The peer as nginx names it in $upstream_addr: `127.0.0.1:80`, `[::1]:80`, `unix:/path`."""
    upstream: str | None
    """The upstream block's name, or the host of a `proxy_pass` without one."""
    subrequest_uri: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """One completed request. `_mono_ns` times are CLOCK_MONOTONIC nanoseconds, None: did not happen or not seen."""

    accepted_mono_ns: int | None
    first_read_mono_ns: int | None
    """None where the first byte had been read together with an earlier request's (pipelining)."""
    created_mono_ns: int
    last_read_mono_ns: int | None
    first_write_mono_ns: int | None
    last_write_mono_ns: int | None
    ended_mono_ns: int
    rc: int
    """0 where nginx ended the request in the normal way, else the reason it closed it with (408, 499, …)."""
    connection: int
    connection_requests: int
    request_bytes: int
    """$request_length."""
    sent_bytes: int
    """$bytes_sent."""
    nginx_start_unix_ms: int
    http_version: int
    status: int
    worker_pid: int
    upstream_states: int
    tls: bool
    multiplexed: bool
    attempts: tuple[Attempt, ...]
    attempts_lost: int
    method_bit: int
    """nginx's number of the method (ngx_http_request.h, NGX_HTTP_GET and so on)."""
    requests_seen: int | None
    """How many requests the kernel program saw begin on the connection, this one included; None: not from the first."""
    method: str | None
    uri: str | None
    """The original request target with its query, as in $request_uri."""
    cut: tuple[str, ...]
    """The kinds of strings (`STRING_URI`, …) whose end the kernel program left out."""
    host: str | None
    user_agent: str | None
    location: str | None
    server_name: str | None
    client_sockaddr: bytes | None
    local_sockaddr: bytes | None


def _status(rc: int, err_status: int, out_status: int, sent_bytes: int, http_version: int) -> int:
    """$status as nginx decides it (ngx_http_free_request, ngx_http_variable_status)."""
    if rc > 0 and (out_status == 0 or sent_bytes == 0):
        out_status = rc
    return err_status or out_status or (9 if http_version == 9 else 0)


class _Strings:
    """The strings behind the fixed parts of a record, by (kind, attempt)."""

    def __init__(self, raw: bytes | memoryview, offset: int) -> None:
        self._values: dict[tuple[int, int], bytes] = {}
        cut: set[int] = set()
        end = len(raw)
        while offset < end:
            kind, attempt, length, whole = STRING_HEADER.unpack(raw, offset)
            offset += STRING_HEADER.size
            padded = -(-length // 8) * 8
            if offset + padded > end:
                raise RecordError(f"string of {length} bytes at byte {offset} passes the record's end, {end}")
            self._values[kind, attempt] = bytes(raw[offset : offset + length])
            if whole > length:
                cut.add(kind)
            offset += padded
        self.cut = tuple(name for name, kind in STRING_KINDS.items() if kind in cut) if cut else ()

    def raw(self, kind: int, attempt: int = 0) -> bytes | None:
        return self._values.get((kind, attempt))

    def text(self, kind: int, attempt: int = 0) -> str | None:
        """UTF-8 text; bytes that are not UTF-8 appear as `\\xNN`. None where absent or empty."""
        value = self._values.get((kind, attempt))
        return value.decode("utf-8", "backslashreplace") if value else None


def _counted(value: int) -> int | None:
    return None if value == _NONE else value


def _attempt(raw: Any, strings: _Strings, index: int) -> Attempt:
    return Attempt(
        connect_start_mono_ns=raw.connect_start_ns or None,
        connected_mono_ns=raw.connected_ns or None,
        connect_failed_mono_ns=raw.connect_failed_ns or None,
        first_write_mono_ns=raw.first_write_ns or None,
        last_write_mono_ns=raw.last_write_ns or None,
        first_read_mono_ns=raw.first_read_ns or None,
        last_read_mono_ns=raw.last_read_ns or None,
        ended_mono_ns=raw.ended_ns,
        connect_ms=_counted(raw.connect_msec),
        header_ms=_counted(raw.header_msec),
        response_ms=_counted(raw.response_msec),
        sent_bytes=_counted(raw.bytes_sent),
        received_bytes=raw.bytes_received,
        status=raw.status or None,
        connect_errno=raw.connect_errno,
        tls=bool(raw.tls),
        subrequest=bool(raw.subrequest),
        peer=strings.text(_PEER, index),
        upstream=strings.text(_UPSTREAM, index),
        subrequest_uri=strings.text(_SUBREQUEST_URI, index),
    )


def worker_pid(raw: bytes | memoryview) -> int:
    """The process a record is from, without decoding the rest. Raises `RecordError` for truncated bytes."""
    try:
        return int(_WORKER_PID.unpack_from(raw, _WORKER_PID_OFFSET)[0])
    except struct.error as error:
        raise RecordError(f"a record of {len(raw)} bytes is cut short") from error


def decode(raw: bytes | memoryview) -> Request:
    """Decodes one record.

    Raises:
        RecordError: the bytes are truncated or contradict themselves.
    """
    fixed = REQUEST_RECORD.unpack(raw, 0)
    attempts_end = REQUEST_RECORD.size + fixed.attempts * UPSTREAM_ATTEMPT.size
    if attempts_end > len(raw):
        raise RecordError(f"{fixed.attempts} attempts do not fit in a record of {len(raw)} bytes")
    strings = _Strings(raw, attempts_end)
    return Request(
        accepted_mono_ns=fixed.accepted_ns or None,
        first_read_mono_ns=fixed.first_read_ns or None,
        created_mono_ns=fixed.created_ns,
        last_read_mono_ns=fixed.last_read_ns or None,
        first_write_mono_ns=fixed.first_write_ns or None,
        last_write_mono_ns=fixed.last_write_ns or None,
        ended_mono_ns=fixed.ended_ns,
        rc=fixed.rc,
        connection=fixed.connection,
        connection_requests=fixed.connection_requests,
        request_bytes=fixed.request_length,
        sent_bytes=fixed.bytes_sent,
        nginx_start_unix_ms=fixed.nginx_start_sec * 1000 + fixed.nginx_start_msec,
        http_version=fixed.http_version,
        status=_status(fixed.rc, fixed.err_status, fixed.out_status, fixed.bytes_sent, fixed.http_version),
        worker_pid=fixed.worker_pid,
        upstream_states=fixed.upstream_states,
        tls=bool(fixed.tls),
        multiplexed=bool(fixed.multiplexed),
        attempts=tuple(
            _attempt(
                UPSTREAM_ATTEMPT.unpack(raw, REQUEST_RECORD.size + index * UPSTREAM_ATTEMPT.size),
                strings,
                index,
            )
            for index in range(fixed.attempts)
        ),
        attempts_lost=fixed.attempts_lost,
        method_bit=fixed.method,
        requests_seen=fixed.requests_seen or None,
        method=strings.text(_METHOD),
        uri=strings.text(_URI),
        cut=strings.cut,
        host=strings.text(_HOST),
        user_agent=strings.text(_USER_AGENT),
        location=strings.text(_LOCATION),
        server_name=strings.text(_SERVER_NAME),
        client_sockaddr=strings.raw(_CLIENT_SOCKADDR),
        local_sockaddr=strings.raw(_LOCAL_SOCKADDR),
    )

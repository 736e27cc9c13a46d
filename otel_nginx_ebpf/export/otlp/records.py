"""Encodes the spans of a record without decoding all of it, if a record of the same shape came before.

The shape of a record is all of it except times, numbers, ids, and the strings that differ from request to request. So
two requests to one location, with one status and from one peer, have one shape. What spans of one shape share was made
from the first such record, by the way that any record can take: `decode` and `SpanBuilder`. Only what differs is read
from the next. A field that is new in the record belongs to the shape until it is named here.
"""

import struct
from collections.abc import Sequence
from typing import Any

from otel_nginx_ebpf.export.interface import Record
from otel_nginx_ebpf.export.otlp.encoding import Encoder, join_spans, trace_id_field
from otel_nginx_ebpf.traces import captured_headers
from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, STRING_KINDS, UPSTREAM_ATTEMPT
from otel_nginx_ebpf.traces.error_log import LogLine, LogLines, is_log_line
from otel_nginx_ebpf.traces.logs import LogRecord, of_request
from otel_nginx_ebpf.traces.phases import (
    REQUEST,
    UPSTREAM_CONNECT,
    UPSTREAM_EXCHANGE,
    Phase,
    add_attempt,
    add_read,
    add_write_and_request,
    attempt_errors,
    first_byte_ns,
    has_exchange,
    is_answered,
    is_failed_connect,
    request_error,
)
from otel_nginx_ebpf.traces.record import (
    MS_MAX,
    MS_NONE,
    VARYING_STRINGS,
    RecordError,
    Request,
    decode,
    decode_strings,
    headers_section,
)
from otel_nginx_ebpf.traces.rules import ServiceNames
from otel_nginx_ebpf.traces.sent import parse_line
from otel_nginx_ebpf.traces.spans import BuiltSpan, SpanBuilder, told_id

_REQUEST = REQUEST_RECORD.picking(
    (
        "first_read_ns",
        "created_ns",
        "last_read_ns",
        "first_write_ns",
        "last_write_ns",
        "ended_ns",
        "handshake_ns",
        "longest_turn_ns",
        "rc",
        "connection",
        "connection_requests",
        "request_length",
        "bytes_sent",
        "headers_at",
        "headers_missing",
        "rule",
        "trace_id_high",
        "trace_id_low",
        "parent_span_id",
    ),
    skipped=("accepted_ns", "nginx_start_sec", "nginx_start_msec", "requests_seen"),
)
_ATTEMPT = UPSTREAM_ATTEMPT.picking(
    (
        "connect_start_ns",
        "connected_ns",
        "connect_failed_ns",
        "first_write_ns",
        "first_read_ns",
        "last_read_ns",
        "ended_ns",
        "connect_msec",
        "header_msec",
        "response_msec",
        "bytes_sent",
        "bytes_received",
        "upstream_request",
        "span_id",
    ),
    skipped=("last_write_ns",),
)
_KEY = ("connection", "connection_requests", "worker_pid")
_unpack_key = REQUEST_RECORD.picking(_KEY, [name for _, name in REQUEST_RECORD.fields if name not in _KEY]).unpack_from
_IDS = ("trace_flags", "trace_id_high", "trace_id_low")
_unpack_ids = REQUEST_RECORD.picking(_IDS, [name for _, name in REQUEST_RECORD.fields if name not in _IDS]).unpack_from
_unpack_request = _REQUEST.unpack_from
_unpack_attempt = _ATTEMPT.unpack_from
_REQUEST_BYTES = REQUEST_RECORD.size
_ATTEMPT_BYTES = UPSTREAM_ATTEMPT.size
_ATTEMPTS = REQUEST_RECORD.offset("attempts")
_COARSE_START = REQUEST_RECORD.offset("coarse_start")
_PEER_KNOWN = REQUEST_RECORD.offset("peer_known")

_URI = STRING_KINDS["STRING_URI"]
_USER_AGENT = STRING_KINDS["STRING_USER_AGENT"]
_CLIENT_SOCKADDR = STRING_KINDS["STRING_CLIENT_SOCKADDR"]
_PEER_SOCKADDR = STRING_KINDS["STRING_PEER_SOCKADDR"]
_SENT_LINE = STRING_KINDS["STRING_SENT_LINE"]
_OWN_STRINGS = frozenset({_URI, _USER_AGENT, _CLIENT_SOCKADDR, _PEER_SOCKADDR, _SENT_LINE})

# Clients choose much of a shape, so the number of shapes is limited, and so are their sizes.
SHAPES_MAX = 1024
_SECTION_BYTES_MAX = 1024
_SENT_MAX = 4


def ids_of(raw: bytes) -> tuple[int, int, int]:
    """Returns the id of a record's trace, in two halves, and its flags."""
    trace_flags, high, low = _unpack_ids(raw)
    return high, low, trace_flags


class _AttemptShape:
    """What an attempt has in every request of a shape."""

    def __init__(self, request: Request, number: int, builder: SpanBuilder[bytes]) -> None:
        self.attempt = attempt = request.attempts[number - 1]
        self._request = request
        self._number = number
        self._builder = builder
        self.is_answered = is_answered(attempt)
        self.connect_error, self.exchange_error = attempt_errors(attempt)
        self.keeps_told_id = has_exchange(attempt) and told_id(request.attempts, number) is not None
        self.connect: tuple[bytes, ...] = ()
        """The fields of the connect; empty if it failed, because then the peer was to be sent a request."""
        if not is_failed_connect(attempt, self.connect_error):
            self.connect = (builder.connect_fields(number, attempt, self.connect_error),)
        self._resent = builder.resend_fields(request.attempts, number)
        self._sent: dict[tuple[str, str | None, str | None], bytes] = {}

    def sent_fields(self, phase: str, line: str | None) -> tuple[bytes, ...]:
        """Returns the fields of a CLIENT span. `line`: what the peer was sent; `None`: not known."""
        method, target, version = parse_line(line) if line is not None else (None, None, None)
        attempt = self.attempt
        asked = self._builder.asked(attempt, target)
        shared = self._sent.get((phase, method, version)) if asked is attempt.sent_host else None
        if shared is None:
            shared = self._builder.sent_fields(
                phase,
                self._request,
                self._number,
                method,
                version,
                asked,
                self.is_answered and phase == UPSTREAM_EXCHANGE,
                self.exchange_error if phase == UPSTREAM_EXCHANGE else self.connect_error,
            )
            if asked is attempt.sent_host and len(self._sent) < _SENT_MAX:
                self._sent[phase, method, version] = shared
        return shared, *self._builder.url_fields(attempt, target, version, asked), *self._resent


class _Shape:
    """What requests of one shape share. `request` is the first of them; only what all share is read from it."""

    def __init__(self, request: Request, builder: SpanBuilder[bytes]) -> None:
        self.request = request
        self.ends_with_write = request.ends_with_write
        self.error = request_error(request.status, request.ending)
        self.server = builder.server_fields(request, self.error)
        self.attempts = [_AttemptShape(request, number, builder) for number in range(1, len(request.attempts) + 1)]


Encoded = tuple[bytes, list[BuiltSpan[bytes]], int, Request]
"""The spans of a record, encoded and as they were built, and how many of nginx's numbers are impossible.

The last element is a request of the record's shape: read from it only what all requests of a shape share.
"""

_Shaped = tuple[
    _Shape,
    list[Phase],
    tuple[int, int],
    int,
    tuple[Any, ...],
    list[tuple[str | None, int, int, int | None, int]],
]
"""What differs in a record of a known shape. A plain tuple, because other types take several times as long to make:

- the shape, and the phases
- the trace's id, in two halves, and the span of the incoming trace context; 0: the trace begins here
- the arguments of `own_server_fields`
- for each attempt the line, bytes sent, bytes received, time to first byte, and span id that the peer got
"""


class RecordEncoder:
    """Encodes the spans of records."""

    def __init__(
        self, encoder: Encoder, *, keeps_log_records: bool = False, service_names: ServiceNames | None = None
    ) -> None:
        """`service_names`: the services that rules name, for `log_records`."""
        self._encoder = encoder
        self._service_names = service_names
        self._builder = encoder.builder
        self._new_id = encoder.new_id
        self._keeps_log_records = keeps_log_records
        self.log_records: list[LogRecord] = []
        """The lines of encoded requests, if `keeps_log_records` is set. Whoever takes them clears the list."""
        self.log_lines = LogLines(keeps_untraced=keeps_log_records)
        self.shapes: dict[object, _Shape | None] = {}

    def encode(self, records: Sequence[Record]) -> list[tuple[Record, Encoded | RecordError]]:
        """Returns the encoded spans of each request's record, or why the record is damaged.

        The lines of nginx's error log among the records go to the spans of their requests.

        Each step runs for all records before the next step: the caches of a processor hold a step, but not all. A
        record at a time would take a third longer.
        """
        requests: list[tuple[Record, tuple[LogLine, ...]]] = []
        log_lines = self.log_lines
        for record in records:
            if is_log_line(record[0]):
                log_lines.add(*record)
            else:
                requests.append((record, self._lines_of(record[0]) if log_lines else ()))
        shaped = [None if lines else self._read(raw) for (raw, _, _), lines in requests]
        built = [self._build(each) if each else None for each in shaped]
        return [
            (record, self._encode(each, spans, record, lines))
            for each, spans, (record, lines) in zip(shaped, built, requests, strict=True)
        ]

    def _lines_of(self, raw: bytes) -> tuple[LogLine, ...]:
        try:
            connection, connection_requests, worker_pid = _unpack_key(raw)
        except struct.error:
            return ()
        return self.log_lines.take(worker_pid, connection, connection_requests)

    def _encode(
        self,
        shaped: _Shaped | None,
        spans: list[BuiltSpan[bytes]] | None,
        record: Record,
        log_lines: tuple[LogLine, ...],
    ) -> Encoded | RecordError:
        raw, unix_offset_ns, resource = record
        try:
            if shaped and spans:
                return (
                    join_spans(trace_id_field(*shaped[2]), shaped[3], spans, unix_offset_ns),
                    spans,
                    0,
                    shaped[0].request,
                )
            request = decode(raw)
            request.log_lines = log_lines
            data, spans = self._encoder.encode(request, unix_offset_ns)
        except RecordError as error:
            self.log_lines.release(log_lines)
            return error
        if log_lines and self._keeps_log_records:
            if self._service_names:
                resource = self._service_names.resource(request.rule, resource)
            ids = [(phase, span_id) for phase, span_id, _ in spans]
            self.log_records += of_request(request, ids, unix_offset_ns, resource, self._encoder.query)
        return data, spans, request.impossible, request

    def _read(self, raw: bytes) -> _Shaped | None:
        """Reads what a record does not share with others of its shape. `None`: the record must be decoded.

        That is so if the record has strings that were cut, impossible numbers or unusual strings, or if it is damaged.
        """
        try:
            (
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
                facts,
                more_facts,
                headers_at,
                headers_missing,
                rule,
                trace_id_high,
                trace_id_low,
                parent_span_id,
            ) = _unpack_request(raw)
            count = raw[_ATTEMPTS]
            attempts_end = _REQUEST_BYTES + count * _ATTEMPT_BYTES
            attempts = (
                [_unpack_attempt(raw, start) for start in range(_REQUEST_BYTES, attempts_end, _ATTEMPT_BYTES)]
                if count
                else ()
            )
            own, cut, offset = decode_strings(raw, attempts_end, VARYING_STRINGS)
            headers = b""
            section = raw[offset:]
            if headers_at:
                headers = headers_section(raw, offset, headers_at)
                section = raw[offset:headers_at]
                cut = cut or bool(captured_headers.parse(headers)[1])
            if cut or headers_missing or request_length < 0 or bytes_sent < 0 or len(section) > _SECTION_BYTES_MAX:
                return None
            string = own.get
            client = string(_CLIENT_SOCKADDR)
            peer = (string(_PEER_SOCKADDR) or client) if raw[_PEER_KNOWN] else None
            trusts = self._builder.trusts(peer)
            key: tuple[object, ...] = facts, more_facts, rc, bytes_sent == 0, trusts, rule, section, *own
            if attempts:
                states = _states(attempts)
                if states is None:
                    return None
                key += states
            shape = self.shapes[key]
        except (struct.error, RecordError):
            return None
        except KeyError:
            shape = self._learn(key, raw, own, section)
        if shape is None:
            return None
        phases: list[Phase] = []
        add_read(phases, first_read_ns, created_ns, last_read_ns)
        exchanges = []
        lines: dict[int, str] = {}
        for index, shared in enumerate(shape.attempts):
            (
                connect_start_ns,
                connected_ns,
                connect_failed_ns,
                first_write_to_peer_ns,
                first_read_from_peer_ns,
                last_read_from_peer_ns,
                attempt_ended_ns,
                connect_msec,
                header_msec,
                _,
                bytes_to_peer,
                bytes_from_peer,
                _,
                upstream_request,
                span_id,
            ) = attempts[index]
            add_attempt(
                phases,
                index + 1,
                connect_start_ns,
                connected_ns,
                connect_failed_ns,
                first_write_to_peer_ns,
                last_read_from_peer_ns,
                attempt_ended_ns,
                connect_msec != MS_NONE,
                shared.attempt.ends_with_read,
                shared.connect_error,
                shared.exchange_error,
            )
            first_ns = None
            if shared.is_answered:
                first_ns = first_byte_ns(
                    connect_start_ns, first_write_to_peer_ns, first_read_from_peer_ns, header_msec, shared.attempt.tls
                )
            line = string(_SENT_LINE + 256 * index)
            if line is not None:  # a retry has its line from here
                lines[upstream_request] = line
            exchanges.append((lines.get(upstream_request), bytes_to_peer, bytes_from_peer, first_ns, span_id))
        add_write_and_request(
            phases,
            first_read_ns or created_ns,
            first_write_ns,
            last_write_ns,
            ended_ns,
            shape.ends_with_write,
            shape.error,
        )
        own_fields = (
            connection,
            connection_requests,
            request_length,
            bytes_sent,
            string(_URI),
            client,
            peer,
            string(_USER_AGENT),
            headers,
            handshake_ns,
            longest_turn_ns,
        )
        return shape, phases, (trace_id_high, trace_id_low), parent_span_id, own_fields, exchanges

    def _build(self, shaped: _Shaped) -> list[BuiltSpan[bytes]]:
        shape, phases, _, _, own, exchanges = shaped
        builder, new_id = self._builder, self._new_id
        spans = []
        fields: tuple[bytes, ...]
        for phase in phases:
            _, _, kind, number, _ = phase
            span_id = 0
            if kind == REQUEST:
                fields = shape.server, *builder.own_server_fields(*own)
            elif kind == UPSTREAM_EXCHANGE:
                attempt = shape.attempts[number - 1]
                line, bytes_to_peer, bytes_from_peer, first_ns, told = exchanges[number - 1]
                fields = (
                    *attempt.sent_fields(kind, line),
                    *builder.own_exchange_fields(
                        bytes_to_peer if bytes_to_peer >= 0 else None, bytes_from_peer, first_ns
                    ),
                )
                if attempt.keeps_told_id:
                    span_id = told
            elif kind == UPSTREAM_CONNECT:
                attempt = shape.attempts[number - 1]
                fields = attempt.connect or attempt.sent_fields(kind, exchanges[number - 1][0])
            else:
                fields = builder.downstream[kind]
            spans.append((phase, span_id or new_id(), fields))
        return spans

    def _learn(self, key: object, raw: bytes, own: dict[int, Any], section: bytes) -> _Shape | None:
        """Returns the shape of a record, and keeps it. `None`: records of this shape must be decoded."""
        if len(self.shapes) >= SHAPES_MAX:
            self.shapes.clear()
        try:
            request = decode(raw)
            shared, *_ = decode_strings(section)
        except RecordError:
            return None
        shape = None
        usual = _OWN_STRINGS.issuperset(key & 0xFF for key in own)
        in_order = VARYING_STRINGS.isdisjoint(key & 0xFF for key in shared)
        if usual and in_order and not request.impossible and not request.cut:
            # Two things are not in the key: that an attempt began before its request, and how HTTP/2 encodes a path.
            coarse = request.attempts and raw[_COARSE_START]
            if not coarse and not any(attempt.protocol == "http_2" for attempt in request.attempts):
                shape = _Shape(request, self._builder)
        self.shapes[key] = shape
        return shape


def _states(attempts: Sequence[tuple[Any, ...]]) -> tuple[object, ...] | None:
    """Returns what attempts add to their record's shape. `None`: a number is impossible."""
    states: list[object] = []
    requests: list[int] = []
    ids: list[int] = []
    for (
        connect_start_ns,
        connected_ns,
        _,
        first_write_ns,
        _,
        _,
        _,
        connect_msec,
        header_msec,
        response_msec,
        bytes_sent,
        bytes_received,
        facts,
        upstream_request,
        span_id,
    ) in attempts:
        if (
            MS_MAX <= connect_msec < MS_NONE
            or MS_MAX <= header_msec < MS_NONE
            or MS_MAX <= response_msec < MS_NONE
            or bytes_sent < -1
            or bytes_received < 0
        ):
            return None
        states += (
            facts,
            connect_start_ns == 0,
            connected_ns == 0,
            first_write_ns == 0,
            connect_msec == MS_NONE,
            header_msec == MS_NONE,
            span_id == 0,
            upstream_request == 0,
        )
        requests.append(upstream_request)
        ids.append(span_id)
    if len(attempts) > 1:  # which of them share a request or an id
        states += map(requests.index, requests)
        states += map(ids.index, ids)
    return tuple(states)

"""Encodes spans as OTLP protobuf (opentelemetry-proto, trace/v1/trace.proto), without an object for each span.

Fields that many spans share are encoded once (`SpanBuilder`). A span's ids, times and numbers are written around these
fields. A protobuf message is a sequence of fields in any order, so encoded fields can simply be joined. Tests check
that the SDK's encoder makes an equal message of equal spans.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from opentelemetry.sdk.resources import Resource
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_QUERY
from opentelemetry.trace import SpanKind

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.export.resource import SCHEMA_URL
from otel_nginx_ebpf.traces.attributes import SpanFields
from otel_nginx_ebpf.traces.choices import DEFAULT_CHOICES, SpanChoices
from otel_nginx_ebpf.traces.events import events_of
from otel_nginx_ebpf.traces.logs import ACCESS_LOG, INFO, NGINX_REQUEST_DURATION, LogRecord, access_body
from otel_nginx_ebpf.traces.model import Event, Trace
from otel_nginx_ebpf.traces.record import RecordError, Request
from otel_nginx_ebpf.traces.spans import BuiltSpan, SpanBuilder
from otel_nginx_ebpf.traces.trace_state import canonical

# Field numbers are as in the proto files. A key is a field number and a wire type (0 varint, 1 fixed64, 2 length,
# 5 fixed32).
_VARINT, _LENGTH = 0, 2
_TIMES = struct.Struct("<2s8sBQBQ")
_TIMES_BYTES = _TIMES.size
_SPAN_ID = bytes([2 << 3 | _LENGTH, 8])
_START, _END = 7 << 3 | 1, 8 << 3 | 1
_TRACE_ID = bytes([1 << 3 | _LENGTH, 16])
_TRACE_ID_FIELD = struct.Struct(">2sQQ")
_TRACE_ID_HALVES = struct.Struct(">QQ")
_PARENT_ID = bytes([4 << 3 | _LENGTH, 8])
# Field 16, SpanFlags. 0x100: it is known whether the parent is remote. 0x200: the parent is remote.
_LOCAL_PARENT = struct.pack("<BBI", 0x85, 0x01, 0x100)
_REMOTE_PARENT = struct.pack("<BBI", 0x85, 0x01, 0x300)

_KINDS = {SpanKind.INTERNAL: 1, SpanKind.SERVER: 2, SpanKind.CLIENT: 3}
_STATUS_ERROR = 2


def _varint(value: int) -> bytes:
    """Encodes 64 bits in base 128. A negative number is encoded as its two's complement."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# Lengths and small numbers, encoded in advance.
_VARINTS = [_varint(value) for value in range(1 << 14)]
_LOW_VARINTS = [bytes([value & 0x7F | 0x80, value >> 7 | 0x80]) for value in range(1 << 14)]
_LENGTH_KEYS = [_varint(number << 3 | _LENGTH) for number in range(32)]


def _field(number: int, data: bytes) -> bytes:
    length = len(data)
    return _LENGTH_KEYS[number] + (_VARINTS[length] if length < 1 << 14 else _varint(length)) + data


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode()) if text else b""


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _any_value(value: object) -> bytes:
    """Encodes an AnyValue (common.proto). Raises `TypeError` for a value of a type that no attribute has."""
    if isinstance(value, str):
        return _field(1, value.encode())
    if isinstance(value, bool):
        return _int_field(2, value)
    if isinstance(value, int):
        return _int_field(3, value)
    if isinstance(value, float):
        return struct.pack("<Bd", 4 << 3 | 1, value)
    if isinstance(value, Sequence):
        return _field(5, b"".join(_field(1, _any_value(each)) for each in value))
    raise TypeError(f"an attribute of type {type(value).__name__}")


@lru_cache(256)
def _key(name: str) -> bytes:
    return _text(1, name)


class _TextHeaders(dict[int, bytes]):
    """The bytes in front of an attribute's text, by the length of the text in bytes. Cached for short texts."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._key = _key(name)

    def __missing__(self, length: int) -> bytes:
        attribute = _field(self._number, self._key + _field(2, _field(1, bytes(length))))
        header = attribute[: len(attribute) - length]
        if length < _KEPT_TEXT_BYTES:
            self[length] = header
        return header


_KEPT_TEXT_BYTES = 512
_text_headers = lru_cache(256)(_TextHeaders)


def _attributes(number: int, attributes: Mapping[str, object]) -> bytes:
    """Encodes each attribute as a KeyValue in a repeated field. Leaves out integers that do not fit into 64 bits."""
    encoded: list[bytes] = []
    for key, value in attributes.items():
        if isinstance(value, str):
            text = value.encode()
            encoded += (_text_headers(number, key)[len(text)], text)
        elif not isinstance(value, int) or -(1 << 63) <= value < 1 << 63:
            encoded.append(_field(number, _key(key) + _field(2, _any_value(value))))
    return b"".join(encoded)


def encode_fields(fields: SpanFields) -> bytes:
    """Encodes fields of a Span (trace.proto)."""
    encoded = _attributes(9, fields.attributes)
    if fields.name is None:
        return encoded
    status = b"" if fields.error is None else _text(2, fields.error) + _int_field(3, _STATUS_ERROR)
    return _text(5, fields.name) + _int_field(6, _KINDS[fields.kind]) + encoded + _field(15, status)


_TIME = struct.Struct("<BQ")


def _events(events: Sequence[Event]) -> bytes:
    """Encodes the events of a Span (trace.proto)."""
    return b"".join(
        _field(11, _TIME.pack(1 << 3 | 1, event.time_unix_ns) + _text(2, event.name) + _attributes(3, event.attributes))
        for event in events
    )


def encode_log_record(record: LogRecord) -> bytes:
    """Returns a LogRecord (logs.proto) as a field of ScopeLogs. Raises `RecordError` as `Encoder.encode` does."""
    attributes = _attributes(6, record.attributes)
    ids = record.trace_id.to_bytes(16, "big"), record.span_id.to_bytes(8, "big"), record.trace_flags
    return _log_record(
        record.time_unix_ns, record.event_name, record.severity, record.severity_text, record.body, attributes, *ids
    )


def _log_record(
    time_unix_ns: int,
    event_name: str,
    severity: int,
    severity_text: str,
    body: str,
    attributes: bytes,
    trace_id: bytes,
    span_id: bytes,
    trace_flags: int,
) -> bytes:
    try:
        times = _TIME.pack(1 << 3 | 1, time_unix_ns) + _TIME.pack(11 << 3 | 1, time_unix_ns)
    except struct.error as error:
        raise RecordError("a time is out of range") from error
    said = _int_field(2, severity) + _text(3, severity_text) + _field(5, _any_value(body)) + _text(12, event_name)
    ids = b""
    if any(trace_id):
        ids = struct.pack("<BI", 8 << 3 | 5, trace_flags) + _field(9, trace_id) + _field(10, span_id)
    return _field(2, times + said + attributes + ids)


_ATTRIBUTE_OF_SPAN, _ATTRIBUTE_OF_LOG_RECORD = _LENGTH_KEYS[9][0], _LENGTH_KEYS[6]
_STRING_VALUE = _LENGTH_KEYS[1][0]
_SAID = {_key(name): name for name in (HTTP_REQUEST_METHOD, URL_PATH, URL_QUERY, HTTP_RESPONSE_STATUS_CODE)}


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a varint, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _of_log_record(span: bytes) -> tuple[bytes, dict[str, object]]:
    """Returns encoded attributes of a span as those of a log record, and the values that its body says.

    The two messages have attributes under different numbers, but encode them in the same way.
    """
    encoded: list[bytes] = []
    said: dict[str, object] = {}
    at = 0
    while at < len(span):
        begin, kind = at, span[at]
        value, start = _read_varint(span, at + 1)
        at = start + value if kind & 7 == _LENGTH else start
        if kind == _ATTRIBUTE_OF_SPAN:
            encoded += (_ATTRIBUTE_OF_LOG_RECORD, span[begin + 1 : at])
            key_end = start + 2 + span[start + 1]
            if name := _SAID.get(span[start:key_end]):
                _, of_value = _read_varint(span, key_end + 1)
                number, text = _read_varint(span, of_value + 1)
                said[name] = span[text:at].decode() if span[of_value] == _STRING_VALUE else number
    return b"".join(encoded), said


_of_log_record_kept = lru_cache(1024)(_of_log_record)


def encode_access_record(server: BuiltSpan[bytes], ids: tuple[int, int, int], unix_offset_ns: int) -> bytes:
    """Returns the log record of a request, as `traces.logs.of_access` makes it, as a field of ScopeLogs.

    Args:
        server: The request's SERVER span.
        ids: The trace's id, in two halves, and its flags.
        unix_offset_ns: Unix time minus monotonic time.
    """
    (start_mono_ns, end_mono_ns, *_), span_id, (shared, *own) = server
    attributes, said = _of_log_record_kept(shared)
    own_attributes, own_said = _of_log_record(b"".join(own))
    say = {**said, **own_said}.get
    body = access_body(say(HTTP_REQUEST_METHOD), say(URL_PATH), say(URL_QUERY), say(HTTP_RESPONSE_STATUS_CODE))
    duration = _attributes(6, {NGINX_REQUEST_DURATION: (end_mono_ns - start_mono_ns) / 1e9})
    return _log_record(
        end_mono_ns + unix_offset_ns,
        ACCESS_LOG,
        INFO,
        "",
        body,
        attributes + own_attributes + duration,
        _TRACE_ID_HALVES.pack(*ids[:2]),
        span_id.to_bytes(8, "big"),
        ids[2],
    )


_SPAN = _LENGTH_KEYS[2]
_PIECES = 4
"""How many pieces of bytes a span is joined of."""
_SPAN_HEADERS = [_SPAN + varint for varint in _VARINTS[: 1 << 12]]
_SPAN_HEADERS_COUNT = len(_SPAN_HEADERS)
_KEPT_NUMBERS = 4096


class _NumberAttribute(dict[int, bytes]):
    """The encodings of an attribute by its value. The first `_KEPT_NUMBERS` of them are cached.

    The encoding of a value that does not fit into 64 bits is empty.
    """

    def __init__(self, name: str) -> None:
        # The bytes in front of a number, by the length of its varint in bytes.
        self._prefixes = [
            _field(9, _text(1, name) + _field(2, bytes([3 << 3 | _VARINT]) + bytes(size)))[: -size or None]
            for size in range(11)
        ]

    def __missing__(self, value: int) -> bytes:
        if 0 <= value < 1 << 14:
            varint = _VARINTS[value]
        elif 0 <= value < 1 << 28:
            varint = _LOW_VARINTS[value & 0x3FFF] + _VARINTS[value >> 14]
        elif -(1 << 63) <= value < 1 << 63:
            varint = _varint(value)
        else:
            return b""
        encoded = self._prefixes[len(varint)] + varint
        if len(self) < _KEPT_NUMBERS:
            self[value] = encoded
        return encoded


def _make_text_attribute(name: str) -> Callable[[str], bytes]:
    """Returns a function that encodes an attribute by its text."""
    headers = _text_headers(9, name)

    def encode(value: str) -> bytes:
        text = value.encode()
        return headers[len(text)] + text

    return encode


class Encoder:
    """Encodes the spans of requests or of readable traces, as `spans` fields of ScopeSpans."""

    def __init__(self, new_id: Callable[[], int], choices: SpanChoices = DEFAULT_CHOICES) -> None:
        """`new_id` makes span ids."""
        self.new_id = new_id
        self.builder = SpanBuilder(
            encode_fields, lambda name: _NumberAttribute(name).__getitem__, _make_text_attribute, choices
        )
        self.query = choices.query

    def encode(self, request: Request, unix_offset_ns: int) -> tuple[bytes, list[BuiltSpan[bytes]]]:
        """Returns the encoded spans of one request, and the built spans behind them.

        Raises:
            RecordError: A time of the request is before 1970 or after 2554, and does not fit into 64 bits.
        """
        spans = self.builder.build(request, self.new_id)
        trace = _TRACE_ID + request.trace_id.to_bytes(16, "big")
        if request.trace_state is not None:
            trace += _text(3, canonical(request.trace_state))
        events = None
        if request.log_lines:
            events = events_of(request.log_lines, [phase for phase, _, _ in spans], unix_offset_ns, self.query)
        return join_spans(trace, request.parent_span_id, spans, unix_offset_ns, events), spans

    def encode_trace(self, trace: Trace) -> bytes:
        """Returns the encoded spans of a readable trace. Raises `RecordError` as `encode` does."""
        trace_fields = _TRACE_ID + trace.trace_id.to_bytes(16, "big") + _text(3, trace.trace_state)
        try:
            return b"".join(
                _field(
                    2,
                    trace_fields
                    + _parent(span.parent_span_id, remote=span is trace.spans[0])
                    + _TIMES.pack(
                        _SPAN_ID, span.span_id.to_bytes(8, "big"), _START, span.start_unix_ns, _END, span.end_unix_ns
                    )
                    + encode_fields(SpanFields(span.attributes, span.name, span.kind, span.error))
                    + _events(span.events),
                )
                for span in trace.spans
            )
        except struct.error as error:
            raise RecordError("a time is out of range") from error


def trace_id_field(high: int, low: int) -> bytes:
    return _TRACE_ID_FIELD.pack(_TRACE_ID, high, low)


def join_spans(
    trace: bytes,
    parent_span_id: int | None,
    spans: Iterable[BuiltSpan[bytes]],
    unix_offset_ns: int,
    events: Mapping[int, Sequence[Event]] | None = None,
) -> bytes:
    """Returns the encoded spans of a trace. The first span is the parent of the others.

    Args:
        trace: The fields that all spans have: the trace's id and its state.
        parent_span_id: The parent of the first span; `None` or 0: it has no parent.
        spans: Their times, ids and fields.
        unix_offset_ns: Unix time minus monotonic time.
        events: The events of spans, by the index of the span.

    Raises:
        RecordError: A time does not fit into 64 bits.
    """
    common = trace + _parent(parent_span_id, remote=True)
    encoded: list[bytes] = []
    pack = _TIMES.pack
    try:
        for (start_mono_ns, end_mono_ns, _, _, _), span_id, fields in spans:
            own_id = span_id.to_bytes(8, "big")
            times = pack(_SPAN_ID, own_id, _START, start_mono_ns + unix_offset_ns, _END, end_mono_ns + unix_offset_ns)
            data = fields[0] if len(fields) == 1 else b"".join(fields)
            if events:
                data += _events(events.get(len(encoded) // _PIECES, ()))
            length = len(common) + _TIMES_BYTES + len(data)
            encoded += (
                _SPAN_HEADERS[length] if length < _SPAN_HEADERS_COUNT else _SPAN + _varint(length),
                common,
                times,
                data,
            )
            if len(encoded) == _PIECES:
                common = trace + _PARENT_ID + own_id + _LOCAL_PARENT
    except struct.error as error:
        raise RecordError("a time is out of range") from error
    return b"".join(encoded)


def _parent(span_id: int | None, *, remote: bool) -> bytes:
    """Returns the fields parent_span_id and flags, as the SDK sets them."""
    if not span_id:
        return _LOCAL_PARENT
    return _PARENT_ID + span_id.to_bytes(8, "big") + (_REMOTE_PARENT if remote else _LOCAL_PARENT)


_SCOPE = _field(1, _text(1, "otel_nginx_ebpf") + _text(2, __version__)) + _text(3, SCHEMA_URL)


def encode_for_resource(resource: Resource, spans: Sequence[bytes]) -> bytes:
    """Returns a ResourceSpans as a field of ExportTraceServiceRequest. `Encoder` has encoded the spans.

    ResourceLogs, a field of ExportLogsServiceRequest, has the same numbers: `spans` may be log records instead.
    """
    fields = _field(1, _attributes(1, resource.attributes)) + _text(3, resource.schema_url)
    scope_bytes = len(_SCOPE) + sum(map(len, spans))
    scope_header = _LENGTH_KEYS[2] + _varint(scope_bytes)
    header = _LENGTH_KEYS[1] + _varint(len(fields) + len(scope_header) + scope_bytes)
    # A message has a megabyte: it is copied only once.
    return b"".join((header, fields, scope_header, _SCOPE, *spans))

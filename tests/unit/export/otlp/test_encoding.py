"""Our OTLP messages equal the SDK's messages for equal spans, whatever a record contains."""

import struct
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.otlp import records as records_module
from otel_nginx_ebpf.export.otlp.encoding import (
    Encoder,
    encode_access_record,
    encode_for_resource,
    encode_log_record,
)
from otel_nginx_ebpf.export.otlp.records import RecordEncoder, ids_of
from otel_nginx_ebpf.settings.model import OptInAttribute
from otel_nginx_ebpf.traces.abi import (
    LIMITS,
    REQUEST_RECORD,
    STRING_HEADER,
    STRING_KINDS,
    UPSTREAM_ATTEMPT,
    CStruct,
    c_enum,
)
from otel_nginx_ebpf.traces.choices import DEFAULT_CHOICES, SpanChoices
from otel_nginx_ebpf.traces.error_log import LEVELS, LogLine
from otel_nginx_ebpf.traces.logs import access_body, of_access
from otel_nginx_ebpf.traces.model import Trace
from otel_nginx_ebpf.traces.record import VARYING_STRINGS, RecordError, Request, decode
from otel_nginx_ebpf.traces.spans import build_trace
from unit.sample_traces import MONO_NS, RETRIED, STATIC, UNIX_OFFSET_NS, log_end, log_line, retried_trace, string
from unit.sdk_spans import sdk_encoding

RESOURCE = Resource(
    {"service.name": "nginx", "process.pid": 1, "up": True, "ratio": 0.5, "tags": ("a", "b"), "empty": ""},
    "https://opentelemetry.io/schemas/1.40.0",
)


class CountingIds:
    def __init__(self) -> None:
        self._last = 2**63

    def generate_span_id(self) -> int:
        self._last += 1
        return self._last


def ours(*requests: Request, choices: SpanChoices = DEFAULT_CHOICES) -> ExportTraceServiceRequest:
    encoder = Encoder(CountingIds().generate_span_id, choices)
    encoded = [encoder.encode(request, UNIX_OFFSET_NS) for request in requests]
    message = ExportTraceServiceRequest.FromString(encode_for_resource(RESOURCE, [spans for spans, _ in encoded]))
    assert sum(len(spans) for _, spans in encoded) == len(message.resource_spans[0].scope_spans[0].spans)
    return message


def sdks(*requests: Request, choices: SpanChoices = DEFAULT_CHOICES) -> ExportTraceServiceRequest:
    ids = CountingIds()
    return sdk_encoding([build_trace(each, UNIX_OFFSET_NS, ids, choices=choices) for each in requests], RESOURCE)


u64 = st.integers(0, 2**64 - 1)
# Kernel times, near each other and 0 (did not happen), and numbers that a varint writes in one to ten bytes.
times = st.one_of(st.just(0), st.integers(10**12, 10**12 + 50), st.integers(1, 2**62))
sizes = st.one_of(st.sampled_from([0, 127, 128, 2**14, 2**28, 2**35, 2**63, 2**64 - 1]), st.integers(0, 10**5), u64)
FIELDS: dict[tuple[str, str], st.SearchStrategy[int]] = {
    ("request_record", "rc"): st.sampled_from([0, 408, 499, -1, 2**40]),
    ("upstream_attempt", "status"): st.sampled_from([0, 101, 200, 404, 502, 504]),
    ("request_record", "out_status"): st.sampled_from([0, 101, 200, 404, 500, 503, 2**64 - 1]),
    ("request_record", "err_status"): st.sampled_from([0, 0, 0, 502]),
    ("request_record", "http_version"): st.sampled_from([9, 1000, 1001, 2000, 3000, 4711]),
    ("request_record", "kept"): st.integers(0, 3),
    ("upstream_attempt", "connect_msec"): st.sampled_from([0, 7, 2**64 - 1]),
    ("upstream_attempt", "header_msec"): st.sampled_from([0, 7, 2**64 - 1]),
}
signed = st.one_of(st.sampled_from([0, 127, 128, 2**35, 2**63 - 1, -1, -58, -(2**63)]), st.integers(0, 10**5))
RANGES = {"__u8": (0, 2**8 - 1), "__u16": (0, 2**16 - 1), "__u32": (0, 2**32 - 1), "__s32": (-(2**31), 2**31 - 1)}


def structs(layout: CStruct, **given_fields: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    def value(kind: str, name: str) -> st.SearchStrategy[int]:
        if name in given_fields:
            return given_fields[name]
        if (layout.name, name) in FIELDS:
            return FIELDS[layout.name, name]
        if name.endswith("_ns"):
            return times
        return st.integers(*RANGES[kind]) if kind in RANGES else signed if kind == "__s64" else sizes

    return st.tuples(*(value(kind, name) for kind, name in layout.fields)).map(lambda row: layout.struct.pack(*row))


texts = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(str.encode),
    st.sampled_from([b"GET /a?b=c&sig=x HTTP/1.1", b"BREW http://u:p@h:1/a HTTP/1.0", b"proto=https;host=a:1", b"a:1"]),
    st.sampled_from([b"GET", b"/a?b=c&sig=x", b"127.0.0.1:80", b"unix:/s", b"[::1]:443", b"a=b,c=d"]),
    st.integers(0, LIMITS["STRING_BYTES_MAX"]).map(lambda size: b"\xc3\xa4%" * size),
)
sockaddrs = st.sampled_from(
    [struct.pack("=HHI8x", 2, 80, 1), struct.pack("=HH4x16xI", 10, 80, 1), b"\1\0/run/x\0", b"\1\0", b""]
)


UNUSUAL = {STRING_KINDS[f"STRING_{kind}"] for kind in ("TRACESTATE", "REQUEST_TARGET", "FORWARDED", "SENT_PATH")}
small = st.integers(0, 10**5)
USUAL_NUMBERS = {
    "request_length": small,
    "bytes_sent": small,
    "out_status": st.sampled_from([101, 200, 404, 500, 503]),
    "rc": st.sampled_from([0, 408, 499]),
    "coarse_start": st.sampled_from([0, 0, 0, 1]),
}
USUAL_ATTEMPT_NUMBERS = {
    "response_msec": st.sampled_from([0, 7, 2**64 - 1]),
    "bytes_sent": st.integers(-1, 10**5),
    "bytes_received": small,
    "upstream_request": st.sampled_from([0, 5, 6]),
}
_SOCKADDRS = {number for kind, number in STRING_KINDS.items() if kind.endswith("_SOCKADDR")}
choices = st.sampled_from(
    [
        SpanChoices(),
        SpanChoices(query=False),
        SpanChoices(
            known_methods=frozenset({"BREW"}),
            opt_in=frozenset(get_args(OptInAttribute)),
            trusted_proxies=("0.0.0.0/0", "::/0", "unix:"),
            clients_by_method=True,
        ),
    ]
)


@st.composite
def strings(draw: st.DrawFn, attempts: int, usual: bool) -> bytes:
    encoded = b""
    kinds = draw(st.permutations(sorted(STRING_KINDS.values())))
    if usual:
        kinds = [kind for kind in kinds if kind not in UNUSUAL]
        kinds.sort(key=lambda kind: kind not in VARYING_STRINGS)
    for kind in kinds:
        for attempt in range(max(attempts, 1)):
            data = draw(sockaddrs if kind in _SOCKADDRS else texts)[: LIMITS["STRING_BYTES_MAX"]]
            cut = draw(st.integers(0, 1)) if not usual and kind != STRING_KINDS["STRING_TRACESTATE"] else 0
            header = STRING_HEADER.struct.pack(kind, attempt, len(data), len(data) + cut)
            encoded += header + data + bytes(-len(data) % 8)
            if not draw(st.integers(0, 3)):
                break
    return encoded


HOW = c_enum("captured")
NUMBERED = (HOW["CAPTURED_NUMBER"], HOW["CAPTURED_TIME"])


def packed(kind: str, attempt: int, data: bytes, cut: int = 0) -> bytes:
    header = STRING_HEADER.struct.pack(STRING_KINDS[kind], attempt, len(data), len(data) + cut)
    return header + data + bytes(-len(data) % 8)


@st.composite
def captured_headers(draw: st.DrawFn, usual: bool) -> bytes:
    """Captured headers as the kernel writes them; the values of few of many may have been cut, or be missing."""
    encoded = b""
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["STRING_REQUEST_HEADER", "STRING_RESPONSE_HEADER"]))
        how = draw(st.sampled_from([number for name, number in HOW.items() if not usual or name != "CAPTURED_NOT"]))
        encoded += packed(kind, how, draw(st.sampled_from([b"x-a", b"x-b", b"etag"])))
        if how in NUMBERED:
            encoded += packed("STRING_HEADER_VALUE", 0, struct.pack("<q", draw(st.integers(-(10**9), 10**10))))
        elif how == HOW["CAPTURED_VALUE"] and draw(st.booleans()):
            encoded += packed("STRING_HEADER_VALUE", 0, draw(texts)[:1024], 0 if usual else draw(st.integers(0, 1)))
    return encoded


@st.composite
def records(draw: st.DrawFn, usual: bool = False) -> bytes:
    """`usual`: with possible numbers, strings in the kernel's order, and no string cut."""
    attempts = draw(st.integers(0, 4))
    one_id = draw(u64)
    ids = st.sampled_from([0, one_id, 1])
    text = draw(strings(attempts, usual))
    headers = draw(captured_headers(usual))
    headers_at = REQUEST_RECORD.size + attempts * UPSTREAM_ATTEMPT.size + len(text)
    if headers_at >= 2**16:
        headers = b""
    return b"".join(
        [
            draw(
                structs(
                    REQUEST_RECORD,
                    attempts=st.just(attempts),
                    created_ns=st.integers(10**12, 10**12 + 20),
                    headers_at=st.just(headers_at if headers else 0),
                    headers_missing=st.integers(0, not usual),
                    **(USUAL_NUMBERS if usual else {}),
                )
            ),
            *(
                draw(structs(UPSTREAM_ATTEMPT, span_id=ids, **(USUAL_ATTEMPT_NUMBERS if usual else {})))
                for _ in range(attempts)
            ),
            text,
            headers,
        ]
    )


log_lines = st.lists(
    st.builds(
        LogLine,
        times,
        st.sampled_from(LEVELS),
        st.integers(-(2**31), 2**31 - 1),
        st.one_of(st.none(), st.integers(1, 5)),
        st.one_of(st.text(max_size=40), st.just("x" * 2048), st.just("/a?sig=x")),
    ),
    max_size=3,
).map(tuple)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(records(), log_lines), min_size=1, max_size=3), choices)
def test_any_records(raws: list[tuple[bytes, tuple[LogLine, ...]]], choices: SpanChoices) -> None:
    requests = [replace(decode(raw), log_lines=lines) for raw, lines in raws]
    # Twice, as the second time their parts are known already.
    assert ours(*requests, *requests, choices=choices) == sdks(*requests, *requests, choices=choices)


NUMBERS = {
    REQUEST_RECORD.name: {"connection", "connection_requests", "request_length", "bytes_sent", "trace_id_low"},
    UPSTREAM_ATTEMPT.name: {"bytes_sent", "bytes_received", "header_msec"},
}


@st.composite
def others_of_its_shape(draw: st.DrawFn, raw: bytes) -> bytes:
    """A record that differs from another in some times and numbers that are not 0, and in the letters of its path."""
    changed = bytearray(raw.replace(b"/a", draw(st.sampled_from([b"/a", b"/b"]))))
    attempts = raw[REQUEST_RECORD.offset("attempts")]
    parts = [(REQUEST_RECORD, 0)]
    parts += [(UPSTREAM_ATTEMPT, REQUEST_RECORD.size + index * UPSTREAM_ATTEMPT.size) for index in range(attempts)]
    for layout, start in parts:
        for _, name in layout.fields:
            at = slice(start + layout.offset(name), start + layout.offset(name) + 8)
            if (name.endswith("_ns") or name in NUMBERS[layout.name]) and 0 < struct.unpack("<Q", changed[at])[
                0
            ] < 2**62:
                changed[at] = struct.pack("<Q", draw(st.integers(10**12, 10**12 + 50)))
    return bytes(changed)


def names_of_series(request: Request) -> list[object]:
    """What `Exemplars.wants` reads."""
    peer = request.attempts[-1].peer if request.attempts else None
    return [request.location, request.status, request.method, request.cache_status, peer]


def by_requests(raws: list[bytes], choices: SpanChoices = DEFAULT_CHOICES) -> list[tuple[Any, ...]]:
    encoder = Encoder(CountingIds().generate_span_id, choices)
    requests = [decode(raw) for raw in raws]
    return [
        (encoder.encode(request, UNIX_OFFSET_NS)[0], request.impossible, names_of_series(request))
        for request in requests
    ]


def by_records(raws: list[bytes], encoder: RecordEncoder) -> list[tuple[Any, ...]]:
    found = []
    for raw in raws:
        ((_, encoded),) = encoder.encode([(raw, UNIX_OFFSET_NS, {})])
        assert not isinstance(encoded, RecordError)
        found.append((encoded[0], encoded[2], names_of_series(encoded[3])))
    return found


@settings(max_examples=300, deadline=None)
@given(st.data(), records(usual=True), choices)
def test_records_of_a_known_shape(data: st.DataObject, raw: bytes, choices: SpanChoices) -> None:
    raws = [raw, *(data.draw(others_of_its_shape(raw)) for _ in range(3))]
    encoder = RecordEncoder(Encoder(CountingIds().generate_span_id, choices))
    assert by_records(raws, encoder) == by_requests(raws, choices)


@pytest.mark.parametrize("raw", [STATIC, RETRIED], ids=["static", "retried"])
def test_a_known_shape_is_not_decoded_again(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    later = bytearray(raw)
    at = REQUEST_RECORD.offset("last_write_ns")
    struct.pack_into("<Q", later, at, struct.unpack_from("<Q", raw, at)[0] + 5)
    expected = by_requests([raw, bytes(later)])
    encoder = RecordEncoder(Encoder(CountingIds().generate_span_id))
    assert by_records([raw], encoder) == expected[:1]
    monkeypatch.setattr(records_module, "decode", lambda raw: pytest.fail("decoded"))
    assert by_records([bytes(later)], encoder) == expected[1:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(records(), records(usual=True)), min_size=1, max_size=3), choices)
def test_the_log_records_of_requests(raws: list[bytes], choices: SpanChoices) -> None:
    """Made from encoded spans, they are those of readable traces."""
    encoder = RecordEncoder(Encoder(CountingIds().generate_span_id, choices))
    ids = CountingIds()
    for raw in [*raws, *raws]:
        ((_, encoded),) = encoder.encode([(raw, UNIX_OFFSET_NS, {})])
        assert not isinstance(encoded, RecordError)
        ours = encode_access_record(encoded[1][0], ids_of(raw), UNIX_OFFSET_NS)
        trace = build_trace(decode(raw), UNIX_OFFSET_NS, ids, choices=choices)
        expected = encode_log_record(of_access(trace))
        assert ScopeLogs.FromString(ours) == ScopeLogs.FromString(expected)
        (record,) = ScopeLogs.FromString(ours).log_records
        (span,) = ScopeSpans.FromString(encoder._encoder.encode_trace(replace(trace, spans=trace.spans[:1]))).spans
        assert list(record.attributes[:-1]) == list(span.attributes)
        assert (record.time_unix_nano, record.trace_id.rjust(16, b"\0")) == (span.end_time_unix_nano, span.trace_id)


def test_the_log_record_of_a_request() -> None:
    record = of_access(build_trace(decode(RETRIED), UNIX_OFFSET_NS, CountingIds()))
    assert (record.body, record.severity, record.event_name) == ("GET /api/users?id=1 200", 9, "nginx.access_log")
    assert record.attributes["nginx.request.duration"] == 0.01206
    assert access_body("GET", "/a", "b=c", None) == "GET /a?b=c"
    assert access_body("_OTHER", None, None, 400) == "_OTHER 400"


def test_log_lines_go_to_their_requests() -> None:
    """STATIC is request 1 of connection 1, RETRIED of connection 2."""
    encoder = RecordEncoder(Encoder(lambda: 4711))
    line = log_line("2026/11/30 19:43:51 [error] 1#1: *2 refused", connection=2, connection_requests=1, level=4)
    raws = [RETRIED, line, STATIC, log_end(2, connection=2, connection_requests=1), RETRIED, RETRIED]
    encoded = [each for _, each in encoder.encode([(raw, UNIX_OFFSET_NS, {}) for raw in raws])]
    with_line = replace(decode(RETRIED), log_lines=(LogLine(MONO_NS, "error", 0, None, "refused"),))
    by_request = Encoder(lambda: 4711)
    for each, request in zip(encoded, (decode(RETRIED), decode(STATIC), with_line, decode(RETRIED)), strict=True):
        assert not isinstance(each, RecordError)
        assert each[0] == by_request.encode(request, UNIX_OFFSET_NS)[0]
    assert encoder.log_lines.take_lost() == 1


def test_the_number_of_shapes_is_limited() -> None:
    encoder = RecordEncoder(Encoder(CountingIds().generate_span_id))
    raws = [STATIC + string("STRING_HOST", f"host-{number}") for number in range(records_module.SHAPES_MAX + 10)]
    assert by_records(raws, encoder) == by_requests(raws)
    assert len(encoder.shapes) <= records_module.SHAPES_MAX


def test_a_time_that_no_clock_shows_is_a_damaged_record() -> None:
    fields: dict[str, Any] = dict.fromkeys((name for _, name in REQUEST_RECORD.fields), 0)
    fields["created_ns"] = 2**64 - 1
    damaged = decode(REQUEST_RECORD.struct.pack(*fields.values()))
    with pytest.raises(RecordError):
        ours(damaged)
    with pytest.raises(RecordError):
        Encoder(CountingIds().generate_span_id).encode_trace(build_trace(damaged, UNIX_OFFSET_NS, CountingIds()))


def test_more_kinds_of_requests_than_are_kept() -> None:
    many = [decode(STATIC.replace(b"/index.html", f"/{number:010}".encode())) for number in range(1000)]
    assert ours(*many, decode(RETRIED)) == sdks(*many, decode(RETRIED))


LOGGED = replace(decode(RETRIED), log_lines=(LogLine(5_000_290_000, "error", 111, 1, "refused"),))


@pytest.mark.parametrize(
    "trace",
    [
        retried_trace(),
        build_trace(decode(RETRIED), UNIX_OFFSET_NS, CountingIds()),
        build_trace(LOGGED, UNIX_OFFSET_NS, CountingIds()),
    ],
)
def test_a_trace_that_was_built_to_be_read(trace: Trace) -> None:
    encoded = Encoder(CountingIds().generate_span_id).encode_trace(trace)
    message = ExportTraceServiceRequest.FromString(encode_for_resource(RESOURCE, [encoded]))
    assert message == sdk_encoding([trace], RESOURCE)


def test_a_remote_parent_and_its_trace_state() -> None:
    request = decode(RETRIED)
    request.trace_id, request.parent_span_id, request.trace_state = 2**127 + 1, 2**63 + 1, "a=b,c@d=e"
    (spans,) = [scope.spans for scope in ours(request).resource_spans[0].scope_spans]
    assert spans[0].parent_span_id == (2**63 + 1).to_bytes(8, "big")
    assert {span.trace_id for span in spans} == {(2**127 + 1).to_bytes(16, "big")}
    assert {span.trace_state for span in spans} == {"a=b,c@d=e"}
    assert [span.flags for span in spans] == [0x300] + [0x100] * (len(spans) - 1)
    assert ours(request) == sdks(request)

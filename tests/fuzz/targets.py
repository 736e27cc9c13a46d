"""Defines what is fuzzed: for each target first inputs, and a check that any bytes must pass.

A check raises if something is wrong. It does not look at processor time and memory, which `fuzz.one` limits.
"""

import json
import os
import pickle
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from unit.context_library import Context, read
from unit.sample_traces import (
    CLIENT,
    CLIENT_V6,
    MONO_NS,
    RETRIED,
    STATIC,
    UNIX_OFFSET_NS,
    log_end,
    log_line,
    record,
    with_headers,
)

from fuzz.nginx_files import WANTED, damaged, damages, small_executables
from otel_nginx_ebpf.analysis.report import Report
from otel_nginx_ebpf.emitter import pipeline
from otel_nginx_ebpf.emitter.exporters import _Readable
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.console import make_renderer
from otel_nginx_ebpf.export.interface import TraceExporter
from otel_nginx_ebpf.export.json_lines import to_json
from otel_nginx_ebpf.export.line import to_line
from otel_nginx_ebpf.export.otlp.encoding import Encoder, encode_for_resource
from otel_nginx_ebpf.export.resource import make_resource
from otel_nginx_ebpf.export.text import TextExporter
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.nginx.binary import Binary, NoSiteError
from otel_nginx_ebpf.nginx.layouts import _measured
from otel_nginx_ebpf.planner.sites import BOUNDARIES
from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.settings.model import OptInAttribute, Settings
from otel_nginx_ebpf.settings.rules import Rule
from otel_nginx_ebpf.traces import capture
from otel_nginx_ebpf.traces.abi import STRING_KINDS
from otel_nginx_ebpf.traces.capture import CaptureError
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.plausibility import doubt
from otel_nginx_ebpf.traces.record import RecordError, decode
from otel_nginx_ebpf.traces.rules import CapturedRules
from otel_nginx_ebpf.traces.spans import build_trace
from otel_nginx_ebpf.traces.trace_state import canonical

_RULES = CapturedRules(
    Settings(
        keep_errors=True,
        rules=(
            Rule("", path=("/static/*.css", "*\u00e9"), drop=True),
            Rule("", status=("5xx",), sampler="parentbased_traceidratio", sampler_arg=0.5, keep_slower_than=1),
            Rule("", user_agent=("*",), span_name="{method} x", service_name="x", attributes=(("a", 1),)),
        ),
    )
)

SCRATCH = Path("/dev/shm") / f"otel-nginx-ebpf-fuzz-{os.getpid()}"
"""A file for the targets that read files."""


@dataclass(frozen=True)
class Target:
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]
    bytes_max: int
    """The longest input."""


# Records, from the kernel or a capture file, through every exporter.

_OFFSET = struct.Struct("<q")
_RESOURCE = Resource({"service.name": "nginx"})
_EVERYTHING = SpanChoices(opt_in=frozenset(get_args(OptInAttribute)), trusted_proxies=("0.0.0.0/0", "::/0", "unix:"))
_CONSOLE = make_renderer(StringIO(), "never")


class _Ids:
    def __init__(self) -> None:
        self.generate_span_id = count(1).__next__


def _otlp(encoded: bytes) -> list[Span]:
    """Parse a message as a collector does; sort attributes by name."""
    message = ExportTraceServiceRequest.FromString(encode_for_resource(_RESOURCE, [encoded]))
    spans = list(message.resource_spans[0].scope_spans[0].spans)
    for span in spans:
        span.attributes.sort(key=lambda attribute: attribute.key)
    return spans


def check_record(data: bytes) -> None:
    """Check that a record is decoded or refused, its text is printable and whole, and both ways to OTLP agree."""
    (unix_offset_ns,) = _OFFSET.unpack(data[:8].ljust(8, b"\0"))
    doubt(data[8:])
    try:
        request = decode(data[8:])
    except RecordError:
        return
    trace = build_trace(request, unix_offset_ns, _Ids(), choices=_EVERYTHING)
    line, console, text = to_line(trace), _CONSOLE(trace), to_json(trace, _RESOURCE)
    assert line[-1] == "\n"
    assert line[:-1].isprintable()
    assert line.count(", ") == 14
    assert console.replace("\n", "").isprintable()
    assert text[-1] == "\n"
    assert text[:-1].isprintable()
    assert text.isascii()
    assert len(json.loads(text)["spans"]) == len(trace.spans)
    try:
        encoded, spans = Encoder(_Ids().generate_span_id, _EVERYTHING).encode(request, unix_offset_ns)
    except RecordError:
        with pytest.raises(RecordError):
            Encoder(_Ids().generate_span_id).encode_trace(trace)
        return
    assert len(spans) == len(trace.spans) == len(_otlp(encoded))
    assert _otlp(encoded) == _otlp(Encoder(_Ids().generate_span_id).encode_trace(trace))


def record_seeds() -> Iterator[bytes]:
    offset = _OFFSET.pack(UNIX_OFFSET_NS)
    yield offset + STATIC
    yield offset + RETRIED
    yield offset + with_headers(STATIC)
    strings = {kind: f"{kind} é\x1b[31m\u202e\n, &sig=1?X-Amz-Signature=2".encode() + b"\xff" for kind in STRING_KINDS}
    for sockaddr in (CLIENT, CLIENT_V6, b"\1\0/run/\x1b.sock\0"):
        strings |= {"STRING_CLIENT_SOCKADDR": sockaddr, "STRING_LOCAL_SOCKADDR": sockaddr}
        strings |= {"STRING_PEER_SOCKADDR": sockaddr, "STRING_FORWARDED": 'for="\\",";proto=https, host="[::1]:80"'}
        yield offset + record(strings, [("unix:/a b", {"connect_errno": 111, "ended_ns": 5})], ("a=1,b=2", "c@d=3"))
    yield offset + record({}, [], created_ns=2**64 - 1, ended_ns=2**63)
    for status, rc in ((101, 0), (408, 408), (499, 499), (502, 0), (200, 0)):
        times = {"created_ns": MONO_NS, "ended_ns": MONO_NS + 10**9, "out_status": status, "rc": rc, "kept": 1}
        attempt = {"connect_start_ns": 1, "connected_ns": 2, "first_write_ns": 3, "first_read_ns": 4, "last_read_ns": 9}
        peers = [("[::1]:80", {**attempt, "status": status, "tls": 1, "span_id": 7, "ended_ns": 10})] * 2
        yield offset + record({"STRING_HOST": "[::1]:443", "STRING_PEER": "127.0.0.1:80"}, peers, **times)


# Capture files.


def check_capture(data: bytes) -> None:
    """Check that a capture is replayed as far as it is whole.

    If the first byte is over 0x80, every checksum is right. From 0xf0 on the check also makes a page, which is slow.
    """
    SCRATCH.write_bytes(data[1:])
    stats, output = Stats(), StringIO()
    resource = make_resource()
    renders = (to_line, _CONSOLE, lambda trace: to_json(trace, resource))
    exporters: list[TraceExporter] = [TextExporter(output, stats, render) for render in renders]
    with patch.object(capture.zlib, "crc32", _no_checksum) if data[:1] > b"\x80" else patch.object(capture, "__doc__"):
        with suppress(UserError, CaptureError):
            capture.read_header(SCRATCH)
        with suppress(UserError, CaptureError):
            readable = _Readable(exporters, choices=SpanChoices(query=False))
            pipeline.replay(capture.read_capture(SCRATCH), pipeline.Decoding(readable, stats), stats, _RULES)
        report = Report(Stats(), SpanChoices())
        if data[:1] >= b"\xf0":
            with suppress(UserError, CaptureError):
                pipeline.replay(capture.read_capture(SCRATCH), pipeline.Decoding(report, Stats()), Stats(), _RULES)
    lost = sum(count for cause, count in stats.lost.items() if not cause.startswith("partial_"))
    assert stats.exported + len(renders) * lost == len(renders) * stats.received
    assert output.getvalue().replace("\n", "").isprintable()
    if data[:1] >= b"\xf0":
        page = report.page("a capture", [])
        assert page.replace("\n", "").isprintable()
        assert page.count("<script") == 1


def _no_checksum(data: bytes, start: int = 0) -> int:
    return 0


def capture_seeds() -> Iterator[bytes]:
    with patch.object(capture.zlib, "crc32", _no_checksum):
        with capture.CaptureWriter(SCRATCH, {"nginx": "1.22.1"}) as writer:
            line = (
                '2026/11/30 19:43:51 [error] 1#1: *1 \x1b[31m "/?sig=1" while reading upstream, client: ::1, server: x'
            )
            writer.append(UNIX_OFFSET_NS, log_line(line, connection=1, connection_requests=1, level=4, attempt=0))
            writer.append(UNIX_OFFSET_NS, log_end(2, connection=1, connection_requests=1))
            writer.append(UNIX_OFFSET_NS, STATIC)
            writer.append(-UNIX_OFFSET_NS, RETRIED)
            writer.append(0, b"")
        yield b"\xff" + SCRATCH.read_bytes()
        yield b"\x81" + SCRATCH.read_bytes()
    with capture.CaptureWriter(SCRATCH, {}) as writer:
        writer.append(UNIX_OFFSET_NS, STATIC)
    yield b"\0" + SCRATCH.read_bytes()
    yield b"\x81" + capture.MAGIC + capture._HEADER_PREFIX.pack(2, 0) + b"[]"


# Trace context: the kernel program's text compared with the specifications' grammar.

_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_B3 = re.compile(rb"(?!0{32}|0{16}-)([0-9a-f]{32}|[0-9a-f]{16})-(?!0{16})([0-9a-f]{16})(?:-([01d])(?:-[0-9a-f]{16})?)?")
_REQUEST_ID = re.compile(rb"[0-9a-fA-F]{8}(-?)[0-9a-fA-F]{4}\1[0-9a-fA-F]{4}\1[0-9a-fA-F]{4}\1[0-9a-fA-F]{12}")
_B3_FLAGS = {b"0": (0, "no"), b"1": (1, "yes"), b"d": (1, "yes"), None: (0, "none")}


def _traceparent(value: bytes) -> Context:
    match = _TRACEPARENT.fullmatch(value)
    if match is None or (match[1] == b"00" and match[5]):
        return Context(None, None, 0, "none")
    flags = int(match[4], 16) & 3
    return Context(int(match[2], 16), int(match[3], 16), flags, "yes" if flags & 1 else "no")


def _b3(value: bytes) -> Context:
    if value in (b"0", b"1", b"d"):
        return Context(None, None, *_B3_FLAGS[value])
    match = _B3.fullmatch(value)
    return (
        Context(int(match[1], 16), int(match[2], 16), *_B3_FLAGS[match[3]]) if match else Context(None, None, 0, "none")
    )


def _request_id(value: bytes) -> Context:
    match = _REQUEST_ID.fullmatch(value)
    trace_id = int(value.replace(b"-", b""), 16) if match else 0
    return Context(trace_id or None, None, 0, "none")


_READERS: tuple[tuple[str, Callable[[bytes], Context]], ...] = (
    ("traceparent", _traceparent),
    ("b3", _b3),
    ("request_id", _request_id),
)


def check_context(data: bytes) -> None:
    """Check that each reader accepts exactly what its specification allows; several lines give only whole ids."""
    stale, value = int.from_bytes(data[:1], "big"), data[1:]
    for name, expected in _READERS:
        assert read((name, value), stale=stale) == expected(value), name
    parts = value.split(b"\n")
    several = read(*zip(("b3_trace_id", "b3_span_id", "b3_sampled", "b3_flags"), parts, strict=False), stale=stale)
    assert (several.trace_id is None) == (several.parent_span_id is None)
    header = value.decode("latin-1")
    state = canonical(header)
    assert canonical(state) == state
    assert len(state.split(",")) <= 32
    assert state.isascii()
    assert state.isprintable() or not state


def context_seeds() -> Iterator[bytes]:
    trace_id, span_id = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
    for stale in (b"\0", b"1", b"\xff"):
        yield stale + b"00-" + trace_id + b"-" + span_id + b"-01"
        yield stale + b"cc-" + trace_id + b"-" + span_id + b"-03-future"
        yield stale + trace_id + b"-" + span_id + b"-d-" + span_id
        yield stale + trace_id[:16] + b"-" + span_id + b"-0"
        yield stale + b"01234567-9012-4567-9012-456789012aBc"
        yield stale + trace_id
        yield stale + b"\n".join((trace_id, span_id, b"true", b"1"))
        yield stale + b"a=1 , vendor@x/y=\t2,a=3,,b=" + b"v" * 255


# Executables and debug information: small executables byte by byte, nginx itself with damage.


def check_executable(data: bytes) -> None:
    """Check that an executable is read or refused, and that no file of another build is read."""
    SCRATCH.write_bytes(data)
    try:
        binary = Binary(SCRATCH)
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return
    for boundary in BOUNDARIES:
        for function in boundary.functions:
            with suppress(NoSiteError):
                site = binary.site(function, boundary.arguments)
                assert 0 <= site.displacement < 64
                assert 0 <= site.file_offset < len(data)
    layout = _measured(binary, WANTED)
    for struct_name, members in layout.structs.items() if layout else ():
        assert members.keys() <= WANTED[struct_name]
        assert all(0 <= offset <= 16 << 10 for offset in members.values())


def check_nginx(data: bytes) -> None:
    """Check nginx's executable, or a build with debug information, with the damage that `data` describes."""
    check_executable(damaged(data))


# Settings.

_VARIABLES = (
    *(variable for name in sources.SettingsSource.model_fields for variable in sources.variables(name)),
    *("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS"),
)
_FLAGS = tuple(sources.SettingsSource.model_fields)


def check_config(data: bytes) -> None:
    """Check that settings are usable, or that the user gets one line.

    Zero bytes separate the parts: first the TOML file, then variables and flags. The first byte of a variable or flag
    says which it is.
    """
    toml, *given = data.split(b"\0")
    SCRATCH.write_bytes(toml)
    environment, flags = {"PATH": "/bin"}, {}
    for part in given:
        number, value = int.from_bytes(part[:1], "big"), os.fsdecode(part[1:])
        if number < 128:
            environment[_VARIABLES[number % len(_VARIABLES)]] = value
        else:
            flags[_FLAGS[number % len(_FLAGS)]] = value
    with patch.dict(os.environ, environment, clear=True):
        try:
            settings = sources.load(flags, SCRATCH)
        except UserError:
            return
        make_resource().attributes["service.name"]
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings.batch_delay_ms / 1000 <= threading.TIMEOUT_MAX
    assert 0 <= settings.sampler_arg <= 1
    assert 0 <= settings.grace_seconds <= 3600
    paths = (settings.output, settings.queue_dir, *settings.binary)
    assert not any("\0" in str(path) for path in paths)


def config_seeds() -> Iterator[bytes]:
    values = {"query": "false", "keep_slower_than": '"500ms"', "sampler_arg": "0.25", "propagators": '["b3", "none"]'}
    yield "\n".join(f"{name} = {value}" for name, value in values.items()).encode()
    defaults = sources.load({})
    for number, name in enumerate(_FLAGS):
        value = str(getattr(defaults, name, ""))
        yield f"{name} = {json.dumps(value)}".encode()
        yield b"\0" + bytes([number % 128]) + value.encode()
        yield b"\0" + bytes([128 + (number - 128) % len(_FLAGS)]) + value.encode()
    yield b'output = "\\u0000"\nbinary = ["\\u0000"]\nqueue_dir = "\\u0000"'
    yield b"pid = " + b"[" * 500
    yield b"batch_delay_ms = " + b"9" * 20
    yield b"queue_size = " + b"9" * 400
    yield b"sampler_arg = nan\ngrace_seconds = nan"
    for number, variable in enumerate(_VARIABLES):
        yield b"\0" + bytes([number]) + (b"a=b,c=d%20e" if "ATTRIBUTES" in variable else b"1")


def planted_bug(data: bytes) -> None:
    """Fail on one input, to show that the fuzzer finds a bug."""
    assert data[:4] != b"bug!"


TARGETS = {
    "record": Target(check_record, record_seeds, 4096),
    "capture": Target(check_capture, capture_seeds, 8192),
    "context": Target(check_context, context_seeds, 600),
    "executable": Target(check_executable, small_executables, 32768),
    "nginx": Target(check_nginx, damages, 256),
    "config": Target(check_config, config_seeds, 512),
}
PLANTED = {"planted": Target(planted_bug, lambda: iter([b"bug?"]), 8)}

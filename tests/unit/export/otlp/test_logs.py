"""Log records of lines of nginx's error log: as the SDK encodes them, delivered like traces, each once or counted."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord as SdkRecord
from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.emitter.pipeline import Decoding
from otel_nginx_ebpf.export.otlp.encoding import encode_for_resource, encode_log_record
from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
from otel_nginx_ebpf.export.otlp.logs import OtlpLogExporter
from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir
from otel_nginx_ebpf.export.otlp.sender import make_sender
from otel_nginx_ebpf.export.resource import SCHEMA_URL
from otel_nginx_ebpf.metrics.kept_stats import KeptStats
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.error_log import has_text
from otel_nginx_ebpf.traces.logs import SEVERITIES, LogRecord
from otel_nginx_ebpf.traces.record import decode
from unit.otlp_receiver import GrpcReceiver, HttpReceiver, Later, Received
from unit.sample_traces import MONO_NS, RETRIED, STATIC, UNIX_OFFSET_NS, log_end, log_line

HEAD = "2026/11/30 19:43:51 [error] 4711#4711: "
ADDED = ', client: 127.0.0.1, server: a.example, request: "GET /x?sig=1 HTTP/1.1", host: "h"'
NGINX = {"service.instance.id": "one"}
KINDS = [("grpc", GrpcReceiver), ("http/protobuf", HttpReceiver)]


def wait_until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@given(
    st.integers(0, 2**63 - 1),
    st.sampled_from(sorted(SEVERITIES)),
    st.text(),
    st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(-(2**63), 2**63 - 1), st.booleans())),
    st.one_of(st.just((0, 0, 0)), st.tuples(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))),
)
def test_a_record_is_encoded_as_the_sdk_does(
    time_ns: int, level: str, body: str, attributes: dict[str, str | int], ids: tuple[int, int, int]
) -> None:
    trace_id, span_id, flags = ids
    resource = Resource({"service.name": "nginx"}, SCHEMA_URL)
    record = LogRecord(time_ns, "nginx.error_log", SEVERITIES[level], level, body, attributes, {}, *ids)
    ours = ExportLogsServiceRequest.FromString(encode_for_resource(resource, [encode_log_record(record)]))
    context = SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(flags))
    sdks = SdkRecord(
        timestamp=time_ns,
        observed_timestamp=time_ns,
        context=set_span_in_context(NonRecordingSpan(context)),
        severity_number=SeverityNumber(SEVERITIES[level]),
        severity_text=level,
        body=body,
        attributes=attributes,
        event_name="nginx.error_log",
    )
    scope = InstrumentationScope("otel_nginx_ebpf", __version__, SCHEMA_URL)
    assert ours == encode_logs([ReadableLogRecord(sdks, resource, scope)])


class Subject:
    """Exporters of traces and log records, as `run` has them."""

    def __init__(
        self,
        protocol: str,
        port: int,
        patch: pytest.MonkeyPatch,
        queue: Path | None = None,
        which: str = "error",
        **more: object,
    ):
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        self.stats = Stats(logs=True)
        assert self.stats.logs
        self.logs = self.stats.logs
        self._errors = which in ("error", "all")
        how = {"queue_spans": 1000, "queue_bytes": 1 << 20, "batch_spans": 4, "delay_s": 0.0, **more}

        def room(name: str) -> QueueDir | None:
            return QueueDir(queue / name, 1 << 20) if queue else None

        resource = Resource({"service.name": "nginx"})
        log_exporter = OtlpLogExporter(
            make_sender(protocol, "logs"),
            resource,
            self.logs,
            queue_dir=room("logs"),
            errors=self._errors,
            access=which != "error",
            **how,
        )
        self.exporter = OtlpExporter(
            make_sender(protocol), resource, self.stats, logs=log_exporter, queue_dir=room(""), **how
        )

    def take(self, *raws: bytes) -> None:
        if self._errors:
            self.logs.received += sum(map(has_text, raws))
        self.exporter.take([(raw, UNIX_OFFSET_NS, NGINX) for raw in raws])

    def take_lines(self, count: int, of: str = "line") -> None:
        """Takes lines of a request that the sampler left out."""
        for number in range(count):
            self.take(log_line(f"{HEAD}*9 {of} {number}\n", connection=9, connection_requests=number, level=4))
            self.take(log_end(1, connection=9, connection_requests=number))

    def end(self, timeout_s: float = 10) -> dict[str, int]:
        """Returns the losses of log records. They and what was exported or kept are all that was received."""
        self.exporter.shutdown(timeout_s)
        assert self.logs.received == self.logs.exported + self.logs.kept + sum(self.logs.lost.values())
        return self.logs.lost


def bodies(receiver: Received) -> list[str]:
    return [record.body.string_value for record in receiver.log_records]


def retried_lines() -> list[bytes]:
    """Two lines of RETRIED: of its first attempt, and of the request."""
    request = decode(RETRIED)
    key = {"connection": request.connection, "connection_requests": request.connection_requests, "level": 4}
    first = "connect() failed (111: Connection refused) while connecting to upstream"
    began_ns = request.attempts[0].connect_start_mono_ns
    assert began_ns
    return [
        log_line(
            f"{HEAD}*{request.connection} {first}{ADDED}\n", attempt=0, error_number=111, logged_ns=began_ns + 1, **key
        ),
        log_line(f"{HEAD}*{request.connection} about the request{ADDED}\n", **key),
        log_end(2, connection=request.connection, connection_requests=request.connection_requests),
        RETRIED,
    ]


@pytest.mark.parametrize(("protocol", "kind"), KINDS)
def test_a_line_is_a_record_with_the_ids_of_its_span(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind() as receiver:
        subject = Subject(protocol, receiver.port, monkeypatch)
        subject.take(*retried_lines())
        assert subject.end() == {}
    refused, other = receiver.log_records
    spans = {span.name: span for span in reversed(receiver.spans)}
    server, connect = receiver.spans[0], spans["upstream connect"]
    assert refused.trace_id == other.trace_id == server.trace_id
    assert (refused.span_id, other.span_id) == (connect.span_id, server.span_id)
    assert [(event.time_unix_nano, event.name) for event in connect.events] == [
        (refused.time_unix_nano, refused.event_name)
    ]
    assert refused.observed_time_unix_nano == refused.time_unix_nano
    assert (refused.severity_number, refused.severity_text, refused.flags) == (17, "error", 1)
    assert refused.body.string_value == "connect() failed (111: Connection refused) while connecting to upstream"
    assert [(pair.key, pair.value.int_value) for pair in refused.attributes] == [("nginx.error.errno", 111)]
    assert not other.attributes
    (group,) = receiver.log_requests[0].resource_logs
    assert {pair.key: pair.value.string_value for pair in group.resource.attributes} == {
        "service.name": "nginx",
        **NGINX,
    }
    assert group.scope_logs[0].scope.name == "otel_nginx_ebpf"
    assert group.scope_logs[0].schema_url == SCHEMA_URL
    assert subject.stats.summary().endswith("; log records: received 2, exported 2, lost 0")


def test_a_line_without_a_trace_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler left its request out, or the request did not end. Secrets are redacted there, too."""
    with GrpcReceiver() as receiver:
        subject = Subject("grpc", receiver.port, monkeypatch)
        for number in (1, 2, 3):
            subject.take(log_line(f"{HEAD}*9 x{number}{ADDED}\n", connection=9, connection_requests=number, level=4))
        subject.take(log_end(1, connection=9, connection_requests=1), STATIC)
        subject.take(log_end(1, connection=9, connection_requests=2))
        assert subject.end() == {}
    assert sorted(bodies(receiver)) == [f"x{number}{ADDED.replace('sig=1', 'sig=REDACTED')}" for number in (1, 2, 3)]
    assert {record.trace_id + record.span_id for record in receiver.log_records} == {b""}
    assert {record.time_unix_nano for record in receiver.log_records} == {MONO_NS + UNIX_OFFSET_NS}


def test_the_record_of_a_left_out_request_is_not_awaited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcReceiver() as receiver:
        subject = Subject("grpc", receiver.port, monkeypatch)
        subject.take_lines(1)
        subject.take()
        assert subject.logs.queued.traces == 0
        wait_until(lambda: subject.take() or receiver.log_records, 5)
        assert subject.end() == {}


def test_the_lines_of_a_damaged_record(monkeypatch: pytest.MonkeyPatch) -> None:
    *lines, record = retried_lines()
    with GrpcReceiver() as receiver:
        subject = Subject("grpc", receiver.port, monkeypatch)
        subject.take(*lines, record[:200])
        subject.take(log_line("this is no line of nginx", connection=9, level=4))
        assert subject.end() == {"lost_damaged_record": 1}
    assert [body.endswith(ADDED.replace("sig=1", "sig=REDACTED")) for body in bodies(receiver)] == [True, True]


def test_with_other_exporters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable traces of the other exporters have the same records."""
    from otel_nginx_ebpf.emitter.exporters import _Readable

    class Kept:
        def __init__(self) -> None:
            self.traces: list[object] = []
            self.export = self.traces.append

        def shutdown(self, timeout_s: float) -> None: ...

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    stats = Stats(logs=True)
    assert stats.logs
    with HttpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", f"http://127.0.0.1:{receiver.port}/v1/logs")
        logs = OtlpLogExporter(
            make_sender("http/protobuf", "logs"),
            Resource({}),
            stats.logs,
            queue_spans=100,
            queue_bytes=1 << 20,
            batch_spans=4,
            delay_s=0,
        )
        text = Kept()
        subject = Decoding(_Readable([text], logs=logs), stats, logs)
        unended = log_line(f"{HEAD}*9 unended\n", connection=9, level=4)
        subject.take([(raw, UNIX_OFFSET_NS, NGINX) for raw in (*retried_lines(), unended)])
        subject.shutdown(10)
    (trace,) = text.traces
    ids = {
        (trace.trace_id.to_bytes(16, "big"), span.span_id.to_bytes(8, "big"), event.time_unix_ns)  # type: ignore[attr-defined]
        for span in trace.spans  # type: ignore[attr-defined]
        for event in span.events
    }
    *traced, untraced = receiver.log_records
    assert {(record.trace_id, record.span_id, record.time_unix_nano) for record in traced} == ids
    assert len(ids) == 2
    assert (untraced.body.string_value, untraced.trace_id) == ("unended", b"")


@pytest.mark.parametrize(("which", "lines"), [("access", 0), ("all", 2)])
def test_a_record_for_each_request(which: str, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcReceiver() as receiver:
        subject = Subject("grpc", receiver.port, monkeypatch, which=which)
        subject.take(STATIC, *retried_lines(), STATIC[:200])
        assert subject.end() == {}
    records = [record for record in receiver.log_records if record.event_name == "nginx.access_log"]
    assert len(receiver.log_records) == len(records) + lines
    assert [record.body.string_value for record in records] == ["GET /index.html 200", "GET /api/users?id=1 200"]
    servers = [span for span in receiver.spans if not span.parent_span_id]
    for record, server in zip(records, servers, strict=True):
        assert (record.trace_id, record.span_id, record.flags) == (server.trace_id, server.span_id, 1)
        assert record.time_unix_nano == server.end_time_unix_nano
        *own, duration = record.attributes
        assert own == list(server.attributes)
        assert duration.key == "nginx.request.duration"
        assert duration.value.double_value == (server.end_time_unix_nano - server.start_time_unix_nano) / 1e9
        assert (record.severity_number, record.severity_text) == (9, "")


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        (GrpcReceiver, grpc.StatusCode.UNAVAILABLE),
        (GrpcReceiver, Later(grpc.StatusCode.RESOURCE_EXHAUSTED, 0.2)),
        (HttpReceiver, 503),
        (HttpReceiver, Later(429, 1)),
    ],
)
def test_retried(
    kind: type[GrpcReceiver | HttpReceiver], refusal: grpc.StatusCode | int | Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind() as receiver:
        receiver.refusals = [refusal]
        subject = Subject("grpc" if kind is GrpcReceiver else "http/protobuf", receiver.port, monkeypatch)
        subject.take_lines(20)
        assert subject.end() == {}
        assert bodies(receiver) == [f"line {number}" for number in range(20)]
        assert len(receiver.refused_s) == 1


@pytest.mark.parametrize(("kind", "refusal"), [(GrpcReceiver, grpc.StatusCode.UNAUTHENTICATED), (HttpReceiver, 403)])
def test_refused(
    kind: type[GrpcReceiver | HttpReceiver], refusal: grpc.StatusCode | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind() as receiver:
        receiver.refusals = [refusal]
        subject = Subject("grpc" if kind is GrpcReceiver else "http/protobuf", receiver.port, monkeypatch, delay_s=60)
        subject.take_lines(8)
        assert subject.end() == {"lost_export_refused": 4}
        assert len(bodies(receiver)) == 4


@pytest.mark.parametrize(("protocol", "kind"), KINDS)
def test_rejected_in_part(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kind() as receiver:
        receiver.rejected_log_records = 3
        subject = Subject(protocol, receiver.port, monkeypatch, delay_s=60)
        subject.take_lines(4)
        assert subject.end() == {"lost_export_rejected": 3}
        assert subject.logs.exported == 1


def test_what_does_not_fit_the_queue_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcReceiver() as gone:
        port = gone.port
    subject = Subject("grpc", port, monkeypatch, queue_spans=8)
    subject.take_lines(20)
    lost = subject.end(0)
    assert lost == {"lost_queue_full": 12, "lost_export_failed": 8}


def test_an_outage_and_a_restart_lose_no_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Traces and log records wait in one directory. Each file goes to its own service."""
    with GrpcReceiver() as gone:
        port = gone.port
    first = Subject("grpc", port, monkeypatch, tmp_path)
    first.take_lines(20, "first")
    first.take(*retried_lines())
    wait_until(lambda: list((tmp_path / "logs").glob("*.otlp.gz")))
    assert first.end(0) == {}
    assert (first.logs.kept, first.stats.kept) == (22, 1)
    second = Subject("grpc", port, monkeypatch, tmp_path)
    second.take_lines(20, "second")
    with GrpcReceiver(port) as receiver:
        wait_until(lambda: len(receiver.log_records) >= 40)
        assert second.end() == {}
        assert len(receiver.trace_ids) == 1
        assert sorted(
            set(bodies(receiver)) - {f"first {n}" for n in range(20)} - {f"second {n}" for n in range(20)}
        ) == [
            "about the request",
            "connect() failed (111: Connection refused) while connecting to upstream",
        ]
        assert len(receiver.log_records) == 42
    assert (second.logs.received, second.logs.exported) == (42, 42)
    assert list(tmp_path.rglob("*.otlp.gz")) == []


@pytest.fixture
def counts(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "counts").open("wb+") as file:
        yield file.fileno()


def test_what_a_killed_emitter_held_is_counted(counts: int) -> None:
    stats = Stats(logs=True)
    killed = KeptStats(counts, stats)
    killed.settle()
    assert stats.logs
    stats.logs.received, stats.logs.exported = 10, 6
    stats.logs.lose("lost_queue_full", 1)
    killed.write()
    later = Stats(logs=True)
    kept = KeptStats(counts, later)
    assert later.logs
    later.logs.received += 2  # on disk
    kept.settle()
    assert (later.logs.received, later.logs.exported) == (10, 6)
    assert later.logs.lost == {"lost_queue_full": 1, "lost_emitter_killed": 1}

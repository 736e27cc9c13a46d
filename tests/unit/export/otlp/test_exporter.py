import logging
import time
from collections.abc import Callable

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
from otel_nginx_ebpf.export.otlp.sender import make_sender
from otel_nginx_ebpf.metrics.stats import Stats
from unit.otlp_receiver import GrpcReceiver, HttpReceiver, Received
from unit.sample_traces import MONO_NS, UNIX_OFFSET_NS, renumbered, retried_trace, static_trace

RESOURCE = Resource({"service.name": "nginx"})


def exporter(
    stats: Stats, protocol: str = "grpc", *, queue: int = 1000, batch: int = 4, delay_s: float = 0.0
) -> OtlpExporter:
    return OtlpExporter(
        make_sender(protocol),
        RESOURCE,
        stats,
        queue_spans=queue,
        queue_bytes=1 << 20,
        batch_spans=batch,
        delay_s=delay_s,
    )


def wait_until(condition: Callable[[], bool], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the SDK's exporters retry by themselves."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")


def to(receiver: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.port}")  # type: ignore[attr-defined]


def test_every_field_of_a_span_reaches_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    with GrpcReceiver() as receiver:
        to(receiver, monkeypatch)
        subject = exporter(stats, delay_s=60)
        subject.export(retried_trace(trace_id=0x0102030405060708090A0B0C0D0E0F10))
        subject.shutdown(10)
    (request,) = receiver.requests
    (resource_spans,) = request.resource_spans
    assert {pair.key: pair.value.string_value for pair in resource_spans.resource.attributes} == {
        "service.name": "nginx"
    }
    (scope_spans,) = resource_spans.scope_spans
    assert scope_spans.scope.name == "otel_nginx_ebpf"
    server, _read, refused, *_rest = receiver.spans
    assert len(receiver.spans) == 6
    assert {span.trace_id for span in receiver.spans} == {bytes(range(1, 17))}
    assert (server.name, server.kind) == ("GET /api/", ProtoSpan.SPAN_KIND_SERVER)
    assert (server.span_id, server.parent_span_id) == (bytes(7) + b"\x01", b"")
    assert server.start_time_unix_nano == MONO_NS + UNIX_OFFSET_NS + 40_000
    assert server.end_time_unix_nano == MONO_NS + UNIX_OFFSET_NS + 12_100_000
    assert server.status == Status()
    attributes = {pair.key: pair.value for pair in server.attributes}
    assert attributes["url.path"].string_value == "/api/users"
    assert attributes["http.response.status_code"].int_value == 200
    assert (refused.name, refused.kind) == ("upstream connect", ProtoSpan.SPAN_KIND_INTERNAL)
    assert (refused.span_id, refused.parent_span_id) == (bytes(7) + b"\x03", bytes(7) + b"\x01")
    assert refused.status == Status(code=Status.STATUS_CODE_ERROR, message="connection refused")
    assert stats.exported == 1
    assert stats.lost == {}


@pytest.mark.parametrize(("protocol", "kind"), [("grpc", GrpcReceiver), ("http/protobuf", HttpReceiver)])
def test_many_traces_arrive_in_order_and_in_batches(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = Stats()
    with kind() as receiver:
        to(receiver, monkeypatch)
        subject = exporter(stats, protocol, queue=2000, batch=100)
        for trace_id in range(1, 501):
            subject.export(renumbered(static_trace(), trace_id))
        subject.shutdown(20)
    assert receiver.trace_ids == list(range(1, 501))
    assert len(receiver.requests) >= 10
    assert (stats.exported, stats.lost) == (500, {})


def test_a_batch_holds_whole_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcReceiver() as receiver:
        to(receiver, monkeypatch)
        subject = exporter(Stats(), batch=9, delay_s=60)
        for trace_id in (1, 2, 3):
            subject.export(retried_trace(trace_id))
        subject.shutdown(10)
    assert [len(request.resource_spans[0].scope_spans[0].spans) for request in receiver.requests] == [6, 6, 6]


def test_what_does_not_fit_the_queue_is_dropped_whole_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    with GrpcReceiver() as receiver:
        to(receiver, monkeypatch)
        subject = exporter(stats, queue=5, batch=100, delay_s=600)
        for trace_id in (1, 2, 3):
            subject.export(renumbered(static_trace(), trace_id))
        subject.shutdown(10)
    assert receiver.trace_ids == [1, 2]
    assert (stats.exported, stats.lost) == (2, {"lost_queue_full": 1})


def test_a_replay_waits_for_room_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    with GrpcReceiver() as receiver:
        to(receiver, monkeypatch)
        subject = OtlpExporter(
            make_sender("grpc"),
            RESOURCE,
            stats,
            queue_spans=5,
            queue_bytes=1 << 20,
            batch_spans=50,
            delay_s=600,
            wait_for_room=True,
        )
        for trace_id in range(1, 101):
            subject.export(renumbered(static_trace(), trace_id))
        subject.export(retried_trace())
        subject.shutdown(10)
    assert receiver.trace_ids == list(range(1, 101))
    assert (stats.exported, stats.lost) == (100, {"lost_queue_full": 1}), "the last has more spans than fit at all"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_down_for_a_while_loses_nothing(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stats = Stats()
    unavailable = [grpc.StatusCode.UNAVAILABLE] if protocol == "grpc" else [503]
    with GrpcReceiver() if protocol == "grpc" else HttpReceiver() as receiver:
        receiver.refusals = unavailable * 4
        to(receiver, monkeypatch)
        subject = exporter(stats, protocol)
        for trace_id in range(1, 21):
            subject.export(renumbered(static_trace(), trace_id))
        wait_until(lambda: not receiver.refusals)
        subject.shutdown(20)
    assert receiver.trace_ids == list(range(1, 21))
    assert (stats.exported, stats.lost) == (20, {})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("otel_nginx_ebpf")]
    assert len(ours) == 2, ours
    assert ours[0] == (
        "collector: UNAVAILABLE: as the test wants"
        if protocol == "grpc"
        else "collector: HTTP 503 Service Unavailable for /v1/traces"
    )
    assert "delivering again" in ours[1]


def test_a_collector_that_starts_late_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with GrpcReceiver() as first:
        to(first, monkeypatch)
    stats = Stats()
    subject = exporter(stats)
    subject.export(static_trace())
    wait_until(lambda: subject._failing)
    with GrpcReceiver(first.port) as receiver:
        wait_until(lambda: len(receiver.spans) == 2)
        subject.shutdown(10)
    assert (stats.exported, stats.lost) == (1, {})


@pytest.mark.parametrize(
    ("protocol", "kind", "refusal"),
    [("grpc", GrpcReceiver, grpc.StatusCode.INVALID_ARGUMENT), ("http/protobuf", HttpReceiver, 400)],
)
def test_a_refused_batch_is_counted_and_does_not_hold_up_the_next(
    protocol: str,
    kind: type[GrpcReceiver | HttpReceiver],
    refusal: grpc.StatusCode | int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = Stats()
    with kind() as receiver:
        receiver.refusals = [refusal, refusal]
        to(receiver, monkeypatch)
        subject = exporter(stats, protocol, batch=2)
        for trace_id in (1, 2, 3):
            subject.export(renumbered(static_trace(), trace_id))
        subject.shutdown(10)
    assert receiver.trace_ids == [3]
    assert (stats.exported, stats.lost) == (1, {"lost_export_refused": 2})


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_shutdown_gives_up_after_its_grace_and_counts_the_rest(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    with GrpcReceiver() as gone:
        to(gone, monkeypatch)
    stats = Stats()
    subject = exporter(stats, protocol)
    for trace_id in range(1, 6):
        subject.export(renumbered(static_trace(), trace_id))
    began = time.monotonic()
    subject.shutdown(0.5)
    assert time.monotonic() - began < 3
    assert (stats.exported, stats.lost) == (0, {"lost_export_failed": 5})


def test_a_value_the_official_exporter_refuses_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    with pytest.raises(UserError, match="OTEL_EXPORTER_OTLP_COMPRESSION"):
        make_sender("grpc")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY"])
def test_a_certificate_that_cannot_be_read_is_named(
    protocol: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "/none/ca.pem")
    with pytest.raises(UserError, match=f"^{variable}: cannot read the file /none/ca.pem$"):
        make_sender(protocol)

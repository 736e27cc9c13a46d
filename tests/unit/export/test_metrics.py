"""The program's own metrics, as a collector and a Prometheus server receive them."""

import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.emitter.loop import tell_losses
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.metrics.own import Metrics
from otel_nginx_ebpf.export.resource import SCHEMA_URL
from otel_nginx_ebpf.metrics.stats import Deliveries, Size, Stats
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.settings.sources import load
from unit.otlp_receiver import GrpcReceiver, HttpReceiver, Received


def settings(**chosen: object) -> Settings:
    return replace(load({}), **chosen)  # type: ignore[arg-type]


@pytest.fixture
def stats() -> Stats:
    made = Stats()
    made.received, made.exported = 10, 7
    made.lose("lost_queue_full", 2)
    made.lose("not_sampled", 4)
    made.probe_hits = {"sys_exit": 1234.5, "ngx_http_free_request": 100.0}
    made.cost_s, made.detachments = 5e-6, 2
    made.lost_in_kernel = {"lost_queue_full": 0, "lost_ring_buffer_full": 1}
    made.queued.spans, made.queued.bytes, made.stored_bytes, made.ring_buffer_fill = 12, 3456, 789, 0.25
    return made


class Collector(MetricsServiceServicer):
    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []

    def Export(
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        self.requests.append(request)
        return ExportMetricsServiceResponse()


def test_a_collector_gets_them_at_the_end_at_the_latest(stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    add_MetricsServiceServicer_to_server(collector, server)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "edge")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=here")
    server.start()
    stats.logs = Deliveries()
    stats.logs.received, stats.logs.exported, stats.logs.queued, stats.logs.stored_bytes = 5, 3, Size(1, 1, 100), 11
    stats.logs.lose("lost_export_failed")
    try:
        subject = Metrics(settings(metrics=True), stats, Resource({}))
        stats.sent(0.5)
        subject.shutdown()
    finally:
        server.stop(None).wait()
    (resource_metrics,) = collector.requests[-1].resource_metrics
    resource = {pair.key: pair.value.string_value for pair in resource_metrics.resource.attributes}
    assert (resource["service.name"], resource["host.name"]) == ("otel-nginx-ebpf", "here")
    (scope,) = resource_metrics.scope_metrics
    assert resource_metrics.schema_url == scope.schema_url == SCHEMA_URL
    metrics = {metric.name: metric for metric in scope.metrics}
    assert metrics["otel_nginx_ebpf.requests.received"].sum.data_points[0].as_int == 10
    assert metrics["otel_nginx_ebpf.requests.received"].sum.is_monotonic
    assert metrics["otel_nginx_ebpf.requests.exported"].sum.data_points[0].as_int == 7
    lost = metrics["otel_nginx_ebpf.requests.lost"].sum.data_points
    assert {point.attributes[0].value.string_value: point.as_int for point in lost} == {
        "lost_queue_full": 2,
        "lost_ring_buffer_full": 1,
    }
    left_out = metrics["otel_nginx_ebpf.requests.left_out"].sum.data_points
    assert {point.attributes[0].value.string_value: point.as_int for point in left_out} == {"not_sampled": 4}
    assert metrics["otel_nginx_ebpf.log_records.received"].sum.data_points[0].as_int == 5
    assert metrics["otel_nginx_ebpf.log_records.exported"].sum.data_points[0].as_int == 3
    (lost_records,) = metrics["otel_nginx_ebpf.log_records.lost"].sum.data_points
    assert (lost_records.attributes[0].value.string_value, lost_records.as_int) == ("lost_export_failed", 1)
    gauges = {
        "queue.spans": 12,
        "queue.log_records": 1,
        "queue.memory": 3456 + 100,
        "queue.disk": 789 + 11,
    }
    for name, value in gauges.items():
        assert metrics[f"otel_nginx_ebpf.{name}"].gauge.data_points[0].as_int == value
    assert metrics["otel_nginx_ebpf.ring_buffer.fill"].gauge.data_points[0].as_double == 0.25
    hits = metrics["otel_nginx_ebpf.probe.hits"].gauge.data_points
    assert {point.attributes[0].value.string_value: point.as_double for point in hits} == stats.probe_hits
    assert metrics["otel_nginx_ebpf.request.cost"].gauge.data_points[0].as_double == 5e-6
    assert metrics["otel_nginx_ebpf.detachments"].sum.data_points[0].as_int == 2
    assert metrics["otel_nginx_ebpf.export.duration"].histogram.data_points[0].sum == 0.5
    assert metrics["process.cpu.time"].sum.data_points[0].as_double > 0
    assert metrics["process.memory.usage"].sum.data_points[0].as_int > 10**6


@pytest.mark.parametrize("address", ["127.0.0.1:99999", f"{'x' * 70}:9464"])
def test_an_address_that_is_none(address: str, stats: Stats) -> None:
    with pytest.raises(UserError, match=f"--metrics-listen {address}: "):
        Metrics(settings(metrics_listen=address), stats, Resource({}))


def test_a_prometheus_server_fetches_them(stats: Stats) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--metrics-listen {address}: Address already in use"):
            Metrics(settings(metrics_listen=address), stats, Resource({}))
    subject = Metrics(settings(metrics_listen=address), stats, Resource({}))
    try:
        with urlopen(f"http://{address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
    finally:
        subject.shutdown()

    def value(name: str, label: str = "") -> float:
        (line,) = [line for line in lines if line.startswith(name + "{") and label in line]
        return float(line.rpartition(" ")[2])

    assert value("otel_nginx_ebpf_requests_received_total") == 10
    assert value("otel_nginx_ebpf_requests_lost_total", 'cause="lost_ring_buffer_full"') == 1
    assert value("otel_nginx_ebpf_queue_memory_bytes") == 3456


def test_losses_are_told_once(stats: Stats, caplog: pytest.LogCaptureFixture) -> None:
    told = tell_losses(stats, {})
    stats.lose("partial_string_cut", 5)
    told = tell_losses(stats, told)
    stats.lose("lost_queue_full", 3)
    stats.logs = Deliveries()
    stats.logs.lose("lost_export_rejected", 2)
    told = tell_losses(stats, told)
    tell_losses(stats, told)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "traces lost in the last minute: lost_queue_full 2, lost_ring_buffer_full 1",
        "traces lost in the last minute: lost_queue_full 3",
        "log records lost in the last minute: lost_export_rejected 2",
    ]


@pytest.fixture(params=["grpc", "http/protobuf"])
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Received], int]:
    """Where no collector is yet."""
    kind = GrpcReceiver if request.param == "grpc" else HttpReceiver
    with kind() as gone:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{gone.port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
    return kind, gone.port


def run(received: int, directory: Path, timeout_s: float = 5) -> None:
    stats = Stats()
    stats.received = received
    Metrics(settings(metrics=True, queue_dir=directory), stats, Resource({})).shutdown(timeout_s)


def received_of(requests: list[ExportMetricsServiceRequest]) -> list[tuple[int, int]]:
    """Of each message: the count of requests, and when it was counted."""
    return [
        (point.as_int, point.time_unix_nano)
        for request in requests
        for metric in request.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == "otel_nginx_ebpf.requests.received"
        for point in metric.sum.data_points
    ]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "metrics").glob("*.otlp.gz"))


def test_the_last_values_wait_for_the_next_run(port: tuple[type[Any], int], tmp_path: Path) -> None:
    kind, number = port
    run(10, tmp_path, timeout_s=1)
    run(20, tmp_path, timeout_s=1)
    assert len(files(tmp_path)) == 2
    with kind(number) as receiver:
        run(30, tmp_path)
        run(40, tmp_path)
    values = received_of(receiver.metric_requests)
    assert [count for count, _ in values] == [10, 20, 30, 40]
    assert values == sorted(values, key=lambda each: each[1])
    assert files(tmp_path) == []


def test_the_last_values_are_kept_while_the_collector_is_silent(
    port: tuple[type[Any], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection, and does not answer. An export is under way when the end comes."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    kind, number = port
    stats = Stats()
    stats.received = 1
    with socket.create_server(("127.0.0.1", number)) as silent:
        subject = Metrics(settings(metrics=True, queue_dir=tmp_path), stats, Resource({}))
        silent.settimeout(10)
        connection, _ = silent.accept()
        stats.received = 2
        subject.shutdown(1)
        connection.close()
    assert subject._ticking
    assert subject._ticking._daemon_thread
    subject._ticking._daemon_thread.join(10)  # in the same process, it could reach the next run's collector
    monkeypatch.delenv("OTEL_METRIC_EXPORT_INTERVAL")
    with kind(number) as receiver:
        run(3, tmp_path)
    assert [count for count, _ in received_of(receiver.metric_requests)] == [2, 3]


def test_damaged_values_are_set_aside(port: tuple[type[Any], int], tmp_path: Path, caplog: Any) -> None:
    kind, number = port
    run(10, tmp_path, timeout_s=1)
    (name,) = files(tmp_path)
    path = tmp_path / "metrics" / name
    path.write_bytes(path.read_bytes()[:-9])
    with kind(number) as receiver:
        run(20, tmp_path)
    assert [count for count, _ in received_of(receiver.metric_requests)] == [20]
    assert f"a file is damaged and kept as {path}.damaged" in caplog.text


def test_what_the_collector_refuses_is_said_once_and_not_kept(
    port: tuple[type[Any], int], tmp_path: Path, caplog: Any
) -> None:
    kind, number = port
    run(10, tmp_path, timeout_s=1)
    with kind(number) as receiver:
        refusal = grpc.StatusCode.UNIMPLEMENTED if kind is GrpcReceiver else 404
        receiver.refusals = [refusal, refusal]
        run(20, tmp_path)
    assert files(tmp_path) == receiver.metric_requests == []
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("metrics: the collector refuses them: ")

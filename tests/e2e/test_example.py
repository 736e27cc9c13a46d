"""examples/collector, unchanged: its nginx, application and collector run, and its dashboards find their metrics."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from collector.process import CollectorProcess, collected, collected_logs, layered, official
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NginxServer, free_ports, wait_until

_EXAMPLE = Path(__file__).parents[2] / "examples" / "collector"

# Stands for Tempo and Prometheus: takes what they take and writes it down.
_BACKEND = """
receivers:
  otlp: { protocols: { grpc: { endpoint: "127.0.0.1:@GRPC@" }, http: { endpoint: "127.0.0.1:@HTTP@" } } }
exporters:
  file/traces: { path: "@DIRECTORY@/traces.bin", format: proto, flush_interval: 50ms }
  file/logs: { path: "@DIRECTORY@/logs.bin", format: proto, flush_interval: 50ms }
  file/metrics: { path: "@DIRECTORY@/metrics.jsonl", flush_interval: 50ms }
service:
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [file/traces] }
    metrics: { receivers: [otlp], exporters: [file/metrics] }
    logs: { receivers: [otlp], exporters: [file/logs] }
"""
# The example's collector tells of itself on a fixed port, which another may have.
_QUIET = "service: { telemetry: { metrics: { level: none } } }\n"

_REQUESTS = {"/": 200, "/slow": 200, "/broken": 500, "/static": 200}


@dataclass(frozen=True)
class Series:
    """A Prometheus series, as Prometheus makes it of an OTLP metric."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Backend:
    """What came out of the example's collector."""

    directory: Path

    def traces(self) -> list[Trace]:
        path = self.directory / "traces.bin"
        return collected(path, lambda resource: True) if path.exists() else []

    def log_records(self) -> list[LogRecord]:
        return collected_logs(self.directory / "logs.bin", "edge")

    def series(self) -> list[Series]:
        """The latest of all."""
        path = self.directory / "metrics.jsonl"
        latest: dict[tuple[str, str], Series] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            for each in _series(json.loads(line)):
                latest[each.name, json.dumps(each.labels, sort_keys=True)] = each
        return list(latest.values())


def _series(message: dict[str, Any]) -> Iterator[Series]:
    for metric in (
        metric
        for resource in message["resourceMetrics"]
        for scope in resource["scopeMetrics"]
        for metric in scope["metrics"]
    ):
        unit = {"s": "_seconds"}.get(metric.get("unit", ""), "")
        name = metric["name"].replace(".", "_") + unit
        for point in metric.get("sum", {}).get("dataPoints", ()):
            yield Series(f"{name}_total", _labels(point), float(point.get("asInt") or point["asDouble"]))
        for point in metric.get("histogram", {}).get("dataPoints", ()):
            yield Series(f"{name}_sum", _labels(point), point["sum"])
            yield Series(f"{name}_count", _labels(point), float(point["count"]))
            yield Series(f"{name}_bucket", {**_labels(point), "le": "+Inf"}, float(point["count"]))


def _labels(point: dict[str, Any]) -> dict[str, str]:
    return {pair["key"].replace(".", "_"): str(*pair["value"].values()) for pair in point.get("attributes", ())}


@pytest.fixture(scope="module")
def backend(public_directory: Path) -> Iterator[Backend]:
    """After one of each request went through nginx, the application, the program and the collector."""
    directory = public_directory / "example"
    directory.mkdir()
    nginx_port, app_port, grpc, http, backend_grpc, backend_http = free_ports(6)
    running: list[CollectorProcess | NginxServer] = []
    app = subprocess.Popen([sys.executable, _EXAMPLE / "app.py", str(app_port)], stderr=subprocess.DEVNULL)
    try:
        config = re.search(r"http \{(.*)\}", (_EXAMPLE / "nginx.conf").read_text(), re.DOTALL)
        assert config
        text = config[1].replace("access_log off;", "")
        text = text.replace("listen 80;", f"listen 127.0.0.1:{nginx_port};").replace(
            "app:8000", f"127.0.0.1:{app_port}"
        )
        nginx = NginxServer(directory, text)
        nginx.start([("127.0.0.1", nginx_port)])
        running.append(nginx)
        words = {"GRPC": str(backend_grpc), "HTTP": str(backend_http), "DIRECTORY": str(directory)}
        filled = re.sub(r"@(\w+)@", lambda match: words[match[1]], _BACKEND)
        running.append(official(filled, [backend_grpc, backend_http], directory))
        (directory / "quiet.yaml").write_text(_QUIET)
        environment = {
            "OTLP_GRPC_LISTEN": f"127.0.0.1:{grpc}",
            "OTLP_HTTP_LISTEN": f"127.0.0.1:{http}",
            "TRACES_ENDPOINT": f"127.0.0.1:{backend_grpc}",
            "METRICS_ENDPOINT": f"http://127.0.0.1:{backend_http}",
            "LOGS_ENDPOINT": f"http://127.0.0.1:{backend_http}",
            "METRICS_INTERVAL": "100ms",
        }
        configs = (_EXAMPLE / "otel-collector.yaml", _EXAMPLE / "logs.yaml", directory / "quiet.yaml")
        running.append(layered(configs, environment, [grpc, http], directory / "example.log"))
        agent = AgentProcess(
            nginx.pid,
            directory,
            ["run", "--pid", str(nginx.pid)],
            {
                "OTEL_SERVICE_NAME": "edge",
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{grpc}",
                "OTEL_NGINX_EBPF_METRICS": "true",
                "OTEL_NGINX_EBPF_LOGS": "access",
                "OTEL_METRIC_EXPORT_INTERVAL": "200",
            },
        )
        try:
            with Http1Connection(("127.0.0.1", nginx_port)) as connection:
                for target in _REQUESTS:
                    connection.request(target)
            backend = Backend(directory)
            wait_until(lambda: len(backend.traces()) == len(_REQUESTS), "all traces")
            wait_until(lambda: len(_counts(backend)) == len(_REQUESTS), "all routes' counts")
            wait_until(lambda: len(backend.log_records()) == len(_REQUESTS), "all log records")
            wait_until(lambda: _measured(backend) == len(_REQUESTS), "the metrics of all requests")
        finally:
            agent.stop()
        yield backend
    finally:
        for each in reversed(running):
            each.stop()
        app.kill()
        app.wait()


def _counts(backend: Backend) -> dict[tuple[str, str, str], float]:
    """Of SERVER spans, by route, answer and status."""
    return {
        (each.labels["http_route"], each.labels["http_response_status_code"], each.labels["status_code"]): each.value
        for each in backend.series()
        if each.name == "traces_span_metrics_calls_total" and each.labels["span_kind"] == "SPAN_KIND_SERVER"
    }


def _measured(backend: Backend) -> float:
    return sum(each.value for each in backend.series() if each.name == "http_server_request_duration_seconds_count")


def test_traces_pass(backend: Backend) -> None:
    traces = {trace.server.attributes["url.path"]: trace for trace in backend.traces()}
    assert {path: trace.server.attributes["http.response.status_code"] for path, trace in traces.items()} == _REQUESTS
    assert traces["/static"].named("upstream exchange") == []
    (exchange,) = traces["/slow"].named("upstream exchange")
    assert exchange.attributes["nginx.upstream.name"] == "app"
    assert exchange.seconds >= 0.2


def test_log_records_pass(backend: Backend) -> None:
    assert {(each.trace_id.hex(), each.span_id.hex()) for each in backend.log_records()} == {
        (trace.trace_id, trace.server.span_id) for trace in backend.traces()
    }


def test_span_metrics_count_each_route(backend: Backend) -> None:
    assert _counts(backend) == {
        (path, str(status), "STATUS_CODE_ERROR" if status == 500 else "STATUS_CODE_UNSET"): 1
        for path, status in _REQUESTS.items()
    }


def test_the_latency_dashboard_finds_series(backend: Backend) -> None:
    """Every metric, value of a label and label of grafana/latency.json is in what the collector made."""
    dashboard = json.loads((_EXAMPLE / "grafana" / "latency.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 6
    for expression in expressions:
        nodes: list[Any] = []
        promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "1m")), nodes.append)
        labels: set[str] = set()
        for selector in (node for node in nodes if isinstance(node, promql_parser.VectorSelector)):
            found = [each for each in backend.series() if _selects(selector, each)]
            assert found, f"nothing is {selector.prettify()}"
            labels |= {label for each in found for label in each.labels}
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        assert {label.strip() for group in grouped for label in group.split(",")} <= labels


_MATCHES = {
    "Equal": lambda found, wanted: found == wanted,
    "NotEqual": lambda found, wanted: found != wanted,
    "Re": lambda found, wanted: re.fullmatch(wanted, found) is not None,
}


def _selects(selector: Any, series: Series) -> bool:
    return selector.name == series.name and all(
        _MATCHES[str(matcher.op).partition(".")[2]](series.labels.get(matcher.name, ""), matcher.value)
        for matcher in selector.matchers.matchers
    )

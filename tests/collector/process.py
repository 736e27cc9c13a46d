"""Runs real collectors: the official one and Jaeger, from their Go modules, and rotel, in Rust, from PyPI."""

import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from e2e.agent_process import Event, Span, Trace
from e2e.nginx_server import wait_until
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, LogsData
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, MetricsData
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status, TracesData
from registry import seen

from otel_nginx_ebpf.export.resource import SCHEMA_URL


def build(program: str = "collector") -> Path:
    """Build the official collector, or `jaeger`; return the binary.

    Raises CalledProcessError if Go is missing and cannot be installed.
    """
    script = Path(__file__).parents[1] / program / "build"
    return Path(subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


class CollectorProcess:
    """Runs a collector. It listens on 127.0.0.1 at `ports` when the constructor returns."""

    def __init__(self, command: list[str | Path], ports: Iterable[int], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            for port in ports:
                wait_until(lambda port=port: self._listens(port), f"{command[0]} to listen on {port}", 30)  # type: ignore[misc]
        except BaseException:
            self.kill()
            sys.stderr.write(self.log())
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text(errors="backslashreplace")

    def _listens(self, port: int) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"the collector ended with {self._process.returncode}: {self.log()}")
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    def kill(self) -> None:
        """End the collector without a chance to flush."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Let the collector flush and exit."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def official(config: str, ports: Iterable[int], directory: Path) -> CollectorProcess:
    path = directory / "otelcol.yaml"
    path.write_text(config)
    return CollectorProcess([build(), "--config", path], ports, directory / "otelcol.log")


def layered(configs: Sequence[Path], variables: Mapping[str, str], ports: Iterable[int], log: Path) -> CollectorProcess:
    """Start the official collector with several files, each overriding those before it, and the variables they name."""
    command: list[str | Path] = ["env", *(f"{name}={value}" for name, value in variables.items()), build()]
    return CollectorProcess(command + [word for path in configs for word in ("--config", path)], ports, log)


def jaeger(config: str, ports: Iterable[int], directory: Path) -> CollectorProcess:
    path = directory / "jaeger.yaml"
    path.write_text(config)
    return CollectorProcess([build("jaeger"), "--config", path], ports, directory / "jaeger.log")


def rotel(grpc_port: int, http_port: int, forward_to: str, directory: Path) -> CollectorProcess:
    """Start rotel. It writes no files: it decodes traces, encodes them again, and sends them on over OTLP.

    Every resource gets the attribute `relay=rotel`, as a proof of the way. rotel needs libpython.
    """
    command = [Path(str(files("rotel") / "rotel-agent")), "start"]
    options = {
        "pid-file": directory / "rotel.pid",
        "log-file": directory / "rotel-agent.log",
        "otlp-grpc-endpoint": f"127.0.0.1:{grpc_port}",
        "otlp-http-endpoint": f"127.0.0.1:{http_port}",
        "otel-resource-attributes": "relay=rotel",
        "exporter": "otlp",
        "otlp-exporter-protocol": "http",
        "otlp-exporter-endpoint": forward_to,
    }
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return CollectorProcess(command, [grpc_port, http_port], directory / "rotel.log")


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


def attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _span(span: OtlpSpan) -> Span:
    failed = span.status.code == Status.STATUS_CODE_ERROR
    return Span(
        name=span.name,
        kind=OtlpSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        start_unix_ns=span.start_time_unix_nano,
        end_unix_ns=span.end_time_unix_nano,
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        error=span.status.message if failed else None,
        attributes=attributes(span.attributes),
        events=tuple(Event(event.name, event.time_unix_nano, attributes(event.attributes)) for event in span.events),
    )


Message = TypeVar("Message", TracesData, MetricsData, LogsData)


def _messages(output: Path, kind: type[Message]) -> Iterator[Message]:
    """Yield the messages of the file exporter's `format: proto`: each follows its length in four bytes, big-endian."""
    content = output.read_bytes() if output.exists() else b""
    while len(content) >= 4:
        (length,) = struct.unpack_from(">I", content)
        if len(content) < 4 + length:
            return  # the collector still writes this message
        yield kind.FromString(content[4 : 4 + length])
        content = content[4 + length :]


def collected(output: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[Trace]:
    """Return the traces in a collector's output file, for each service with a `wanted` resource; SERVER span first."""
    traces: dict[tuple[bytes, str], tuple[dict[str, Any], list[OtlpSpan]]] = {}
    for message in _messages(output, TracesData):
        for group in message.resource_spans:
            resource = attributes(group.resource.attributes)
            if wanted(resource):
                for scope in group.scope_spans:
                    if scope.scope.name == "otel_nginx_ebpf":
                        seen.trace(resource, map(_span, scope.spans))
                        seen.schema(SCHEMA_URL, group.schema_url, scope.schema_url)
                for span in (span for scope in group.scope_spans for span in scope.spans):
                    first, spans = traces.setdefault((span.trace_id, resource["service.name"]), (resource, []))
                    assert first == resource, "a service with two resources in a trace"
                    spans.append(span)
    return [_trace(resource, spans) for resource, spans in traces.values()]


def collected_logs(output: Path, service: str) -> list[LogRecord]:
    """Return a service's log records in a collector's output file, in order of arrival."""
    records = []
    for message in _messages(output, LogsData):
        for group in message.resource_logs:
            resource = attributes(group.resource.attributes)
            if resource["service.name"] == service:
                for scope in group.scope_logs:
                    seen.schema(SCHEMA_URL, group.schema_url, scope.schema_url)
                    for record in scope.log_records:
                        seen.log_record(resource, record.event_name, attributes(record.attributes))
                        records.append(record)
    return records


def collected_metrics(output: Path, service: str) -> list[Metric]:
    """Return a service's metrics in a collector's output file, in order of arrival."""
    metrics = []
    for message in _messages(output, MetricsData):
        for group in message.resource_metrics:
            resource = attributes(group.resource.attributes)
            if resource["service.name"] == service:
                for scope in group.scope_metrics:
                    if scope.scope.name == "otel_nginx_ebpf":
                        seen.schema(SCHEMA_URL, group.schema_url, scope.schema_url)
                        for metric in scope.metrics:
                            _see(resource, metric)
                    metrics += scope.metrics
    return metrics


def _see(resource: dict[str, Any], metric: Metric) -> None:
    kind = metric.WhichOneof("data")
    instrument = kind.removeprefix("exponential_")
    if kind == "sum":
        instrument = "counter" if metric.sum.is_monotonic else "updowncounter"
    points = (attributes(point.attributes) for point in getattr(metric, kind).data_points)
    seen.metric(resource, metric.name, instrument, metric.unit, points)


def _trace(resource: dict[str, Any], spans: list[OtlpSpan]) -> Trace:
    spans.sort(key=lambda span: (span.kind != OtlpSpan.SPAN_KIND_SERVER, span.start_time_unix_nano))
    (flags,) = {span.flags & 0xFF for span in spans}
    (state,) = {span.trace_state for span in spans}
    return Trace(spans[0].trace_id.hex(), flags, state, resource, tuple(_span(span) for span in spans))

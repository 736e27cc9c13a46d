"""Traces of a real nginx in real collectors, configured by the standard variables.

The tests read what the collectors write.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from collector.process import CollectorProcess, attributes, collected, collected_logs, official, rotel
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from e2e.agent_process import AgentProcess, Trace
from e2e.error_lines import error_lines
from e2e.http1_client import Http1Connection
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until
from e2e.oracle import check_facts
from e2e.timing import NO_SLACK, Lags, check_times

TOKEN = "a-token-of-these-tests"

OFFICIAL = """\
extensions:
  bearertokenauth: { token: "@TOKEN@" }
receivers:
  otlp:
    protocols:
      grpc: { endpoint: "127.0.0.1:@GRPC@" }
      http: { endpoint: "127.0.0.1:@HTTP@" }
  otlp/secure:
    protocols:
      grpc:
        endpoint: "127.0.0.1:@SECURE_GRPC@"
        tls: { cert_file: "@CERTIFICATE@", key_file: "@KEY@" }
        auth: { authenticator: bearertokenauth }
      http:
        endpoint: "127.0.0.1:@SECURE_HTTP@"
        tls: { cert_file: "@CERTIFICATE@", key_file: "@KEY@" }
        auth: { authenticator: bearertokenauth }
        compression_algorithms: [gzip]  # and nothing uncompressed
exporters:
  file: { path: "@OUTPUT@", format: proto, flush_interval: 50ms }
  file/logs: { path: "@OUTPUT@.logs", format: proto, flush_interval: 50ms }
service:
  extensions: [bearertokenauth]
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp, otlp/secure], exporters: [file] }
    logs: { receivers: [otlp, otlp/secure], exporters: [file/logs] }
"""

NGINX_HTTP = """
    upstream app { server @UP@; keepalive 4; }
    upstream retried { server @DEAD1@ max_fails=0; server @UP@ backup; }
    upstream dead { server @DEAD1@ max_fails=0; server @DEAD2@ max_fails=0; }
    server {
        listen 127.0.0.1:@NGINX@;
        access_log logs/all.log json;
        location / { root @HTML@; }
        location /app/ { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }
        location /retried/ { proxy_pass http://retried; }
        location /dead/ { proxy_pass http://dead; }
    }
"""

# What to ask for, and the upstream spans that must come of it, in the order of time.
REQUESTS = {
    "/hello.txt": [],
    "/missing": [],
    "/app/new?bytes=3000&delay_ms=20": ["upstream connect", "upstream exchange"],
    "/app/kept": ["upstream exchange"],
    "/app/broken?status=503&keep_alive=0": ["upstream exchange ERROR"],
    "/retried/": ["upstream connect ERROR", "upstream connect", "upstream exchange"],
    "/dead/": ["upstream connect ERROR", "upstream connect ERROR"],
}


def fill(template: str, words: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda match: words[match[1]], template)


@dataclass(frozen=True)
class Stand:
    """nginx, and the collectors that wait for its traces."""

    directory: Path
    ports: dict[str, int]
    words: dict[str, str]
    output: Path
    """The official collector's file; what rotel sends on ends up there too."""
    nginx: NginxServer
    log: AccessLog

    def request_all(self) -> list[LogLine]:
        """Sends REQUESTS on one connection and returns nginx's lines about them."""
        before = len(self.log.poll())
        with Http1Connection(("127.0.0.1", self.ports["NGINX"])) as connection:
            for target in REQUESTS:
                connection.request(target)
        wait_until(lambda: len(self.log.poll()) == before + len(REQUESTS), "nginx's log lines")
        return self.log.lines[before:]

    def agent(self, service: str, protocol: str, endpoint: str, **variables: str) -> AgentProcess:
        environment = {
            "OTEL_SERVICE_NAME": service,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,tier=edge%20one",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            # With a value `requests` prefers them to OTEL_EXPORTER_OTLP_CERTIFICATE (merge_environment_settings).
            "REQUESTS_CA_BUNDLE": "",
            "CURL_CA_BUNDLE": "",
            **variables,
        }
        return AgentProcess(self.nginx.pid, self.directory, ["run", "--pid", str(self.nginx.pid)], environment)

    def run(self, service: str, protocol: str, endpoint: str, **variables: str) -> tuple[list[LogLine], str]:
        """Sends the requests while the program exports them; returns what nginx logged, the program's stderr."""
        agent = self.agent(service, protocol, endpoint, **variables)
        try:
            lines = self.request_all()
        finally:
            agent.stop()
        return lines, agent.stderr()

    def collected(self, service: str, count: int) -> list[Trace]:
        """Waits until the collector has written `count` traces of the service."""

        def traces() -> list[Trace]:
            return collected(self.output, lambda resource: resource["service.name"] == service)

        wait_until(lambda: len(traces()) >= count, f"{count} traces in the collector's file")
        return traces()

    def collected_logs(self, service: str, count: int) -> list[LogRecord]:
        """Waits until the collector has written `count` log records of the service."""
        output = self.output.with_name(f"{self.output.name}.logs")
        wait_until(lambda: len(collected_logs(output, service)) >= count, f"{count} log records")
        return collected_logs(output, service)


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    directory = public_directory / "collector"
    html = directory / "html"
    html.mkdir(parents=True)
    (html / "hello.txt").write_text("Hello!\n")
    names = ("NGINX", "GRPC", "HTTP", "SECURE_GRPC", "SECURE_HTTP")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    output = directory / "collected.bin"
    words = {
        **{name: str(port) for name, port in ports.items()},
        "UP": upstream_addresses["ipv4"],
        "DEAD1": upstream_addresses["dead1"],
        "DEAD2": upstream_addresses["dead2"],
        "HTML": str(html),
        "TOKEN": TOKEN,
        "CERTIFICATE": str(public_directory / "certificate.pem"),
        "KEY": str(public_directory / "key.pem"),
        "OUTPUT": str(output),
    }
    nginx = NginxServer(directory, fill(NGINX_HTTP, words))
    running: list[NginxServer | CollectorProcess] = []
    try:
        nginx.start([("127.0.0.1", ports["NGINX"])])
        running.append(nginx)
        running.append(official(fill(OFFICIAL, words), [ports[name] for name in names[1:]], directory))
        yield Stand(directory, ports, words, output, nginx, AccessLog(directory / "logs" / "all.log"))
    finally:
        for each in reversed(running):
            each.stop()
    assert nginx.problems() == []


@pytest.fixture(scope="module")
def rotel_ports(stand: Stand) -> Iterator[dict[str, int]]:
    if find_spec("rotel") is None:
        pytest.skip("rotel has no wheel for this Python; run it with Debian 13's, `make test PYTHON=python3.13`")
    ports = dict(zip(("GRPC", "HTTP"), free_ports(2), strict=True))
    collector = rotel(ports["GRPC"], ports["HTTP"], f"http://127.0.0.1:{stand.ports['HTTP']}", stand.directory)
    yield ports
    collector.stop()


def check(traces: list[Trace], lines: list[LogLine], resource: dict[str, str]) -> None:
    """Each log line has its trace and no trace is without one; they agree in every fact and time."""
    assert len(traces) == len(lines) == len(REQUESTS)
    by_uri = {trace.server.attributes["nginx.connection.requests"]: trace for trace in traces}
    lags = Lags()
    for number, (line, expected) in enumerate(zip(lines, REQUESTS.values(), strict=True), start=1):
        trace = by_uri[number]
        assert check_facts(trace, line) == []
        assert check_times(trace, line, lags, NO_SLACK) == []
        upstream = [span for span in trace.children if span.name.startswith("upstream")]
        outline = [f"{span.name} ERROR" if span.status == "ERROR" else span.name for span in upstream]
        assert outline == expected, line["request_uri"]
        assert {**trace.resource, **resource} == trace.resource
    assert lags.check_medians() == []


RESOURCE = {
    "deployment.environment.name": "test",
    "tier": "edge one",
    "telemetry.distro.name": "otel-nginx-ebpf",
    "telemetry.sdk.language": "python",
}


@pytest.mark.parametrize(("protocol", "port"), [("grpc", "GRPC"), ("http/protobuf", "HTTP")])
def test_official_collector(stand: Stand, protocol: str, port: str) -> None:
    service = f"plain {port}"
    error_log = stand.nginx.error_log
    before = len(error_lines(error_log))
    variables = {"OTEL_NGINX_EBPF_LOGS": "all"}
    lines, counts = stand.run(service, protocol, f"http://127.0.0.1:{stand.ports[port]}", **variables)
    traces = stand.collected(service, len(lines))
    check(traces, lines, {**RESOURCE, "service.name": service})
    logged = [line.message for line in error_lines(error_log)[before:] if line.level != "notice"]
    count = len(logged) + len(lines)
    both = stand.collected_logs(service, count)
    records = [record for record in both if record.event_name == "nginx.error_log"]
    assert len(logged) > len(REQUESTS) // 2
    assert sorted(record.body.string_value for record in records) == sorted(logged)
    assert Counter(map(key_of_record, records)) == Counter(key for trace in traces for key in keys_of_events(trace))
    check_access_records([record for record in both if record.event_name == "nginx.access_log"], traces, lines)
    assert f"received {len(lines)}, exported {len(lines)}, lost 0; log records: received {count}, " in counts
    assert f"exported {count}, lost 0" in counts


def check_access_records(records: list[LogRecord], traces: list[Trace], lines: list[LogLine]) -> None:
    """Each request has a record with the ids and attributes of its SERVER span, and with what nginx logged."""
    by_id = {record.span_id.hex(): record for record in records}
    assert len(by_id) == len(records) == len(traces)
    said = []
    for trace in traces:
        record, server = by_id[trace.server.span_id], trace.server
        own = attributes(record.attributes)
        duration_s = own.pop("nginx.request.duration")
        assert (record.trace_id.hex(), record.time_unix_nano) == (trace.trace_id, server.end_unix_ns)
        assert own == server.attributes
        assert duration_s == server.seconds
        said.append(record.body.string_value)
    assert sorted(said) == sorted(f"{line['request'].rpartition(' ')[0]} {line['status']}" for line in lines)


def key_of_record(record: LogRecord) -> tuple[str, str, int, str, str]:
    level, message = record.severity_text, record.body.string_value
    return record.trace_id.hex(), record.span_id.hex(), record.time_unix_nano, level, message


def keys_of_events(trace: Trace) -> Iterator[tuple[str, str, int, str, str]]:
    """Yield what log records of the trace's events must have."""
    for span in trace.spans:
        for event in span.events:
            level, message = event.attributes["log.severity"], event.attributes["nginx.error.message"]
            yield trace.trace_id, span.span_id, event.time_unix_ns, level, message


@pytest.mark.parametrize(("protocol", "port"), [("grpc", "SECURE_GRPC"), ("http/protobuf", "SECURE_HTTP")])
def test_tls_with_token_and_gzip(stand: Stand, protocol: str, port: str) -> None:
    service = f"secure {port}"
    lines, stderr = stand.run(
        service,
        protocol,
        f"https://127.0.0.1:{stand.ports[port]}",
        OTEL_EXPORTER_OTLP_CERTIFICATE=str(stand.directory.parent / "certificate.pem"),
        OTEL_EXPORTER_OTLP_HEADERS=f"authorization={quote(f'Bearer {TOKEN}')}",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    )
    assert f"exported {len(lines)}, lost 0" in stderr
    check(stand.collected(service, len(lines)), lines, {**RESOURCE, "service.name": service})


@pytest.mark.parametrize(("protocol", "port"), [("grpc", "SECURE_GRPC"), ("http/protobuf", "SECURE_HTTP")])
def test_refused_without_token(stand: Stand, protocol: str, port: str) -> None:
    """The token above was needed; and the program says what was lost and why."""
    service = f"refused {port}"
    lines, stderr = stand.run(
        service,
        protocol,
        f"https://127.0.0.1:{stand.ports[port]}",
        OTEL_EXPORTER_OTLP_CERTIFICATE=str(stand.directory.parent / "certificate.pem"),
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    )
    assert re.search("UNAUTHENTICATED|Unauthorized", stderr), stderr
    assert f"received {len(lines)}, exported 0, lost {len(lines)}" in stderr
    assert stand.collected(service, 0) == []


@pytest.mark.parametrize(("protocol", "port"), [("grpc", "GRPC"), ("http/protobuf", "HTTP")])
def test_rotel(stand: Stand, rotel_ports: dict[str, int], protocol: str, port: str) -> None:
    service = f"rotel {port}"
    lines, _ = stand.run(service, protocol, f"http://127.0.0.1:{rotel_ports[port]}")
    check(stand.collected(service, len(lines)), lines, {**RESOURCE, "service.name": service, "relay": "rotel"})


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_collector_that_comes_late(stand: Stand, protocol: str, tmp_path: Path) -> None:
    """What happened while there was no collector is delivered when there is one."""
    names = ("GRPC", "HTTP", "SECURE_GRPC", "SECURE_HTTP")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    late = replace(stand, output=tmp_path / "collected.bin")
    words = {**stand.words, **{name: str(port) for name, port in ports.items()}, "OUTPUT": str(late.output)}
    endpoint = f"http://127.0.0.1:{ports['GRPC' if protocol == 'grpc' else 'HTTP']}"
    agent = stand.agent("late", protocol, endpoint, OTEL_BSP_SCHEDULE_DELAY="0")
    collector = None
    try:
        lines = stand.request_all()
        wait_until(lambda: "otel-nginx-ebpf: collector:" in agent.stderr(), "the program to miss its collector")
        collector = official(fill(OFFICIAL, words), ports.values(), tmp_path)
        traces = late.collected("late", len(lines))
    finally:
        agent.stop()
        if collector:
            collector.stop()
    check(traces, lines, {**RESOURCE, "service.name": "late"})
    assert f"exported {len(lines)}, lost 0" in agent.stderr()


def expire(certificate: Path, key: Path, expired: Path) -> None:
    """Write a self-signed certificate for the same key and addresses, valid until yesterday."""
    valid = x509.load_pem_x509_certificate(certificate.read_bytes())
    signer = serialization.load_pem_private_key(key.read_bytes(), None)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "expired")])
    builder = x509.CertificateBuilder(name, name, valid.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(yesterday - timedelta(days=1)).not_valid_after(yesterday)
    for extension in valid.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    expired.write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("protocol", "port"), [("grpc", "SECURE_GRPC"), ("http/protobuf", "SECURE_HTTP")])
def test_expired_certificate(stand: Stand, protocol: str, port: str, tmp_path: Path) -> None:
    """The program says so, and delivers once the collector has a certificate that is valid."""
    names = ("GRPC", "HTTP", "SECURE_GRPC", "SECURE_HTTP")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    certificate, key, expired = Path(stand.words["CERTIFICATE"]), Path(stand.words["KEY"]), tmp_path / "expired.pem"
    expire(certificate, key, expired)
    (tmp_path / "trusted.pem").write_bytes(certificate.read_bytes() + expired.read_bytes())
    renewed = replace(stand, output=tmp_path / "collected.bin")
    words = {**stand.words, **{name: str(each) for name, each in ports.items()}, "OUTPUT": str(renewed.output)}
    collector = official(fill(OFFICIAL, {**words, "CERTIFICATE": str(expired)}), ports.values(), tmp_path)
    agent = None
    try:
        agent = stand.agent(
            "renewed",
            protocol,
            f"https://127.0.0.1:{ports[port]}",
            OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "trusted.pem"),
            OTEL_EXPORTER_OTLP_HEADERS=f"authorization={quote(f'Bearer {TOKEN}')}",
            OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
            OTEL_BSP_SCHEDULE_DELAY="0",
        )
        lines = stand.request_all()
        wait_until(lambda: "certificate has expired" in agent.stderr(), "the program to say what is wrong")
        collector.stop()
        collector = official(fill(OFFICIAL, words), ports.values(), tmp_path)
        traces = renewed.collected("renewed", len(lines))
    finally:
        if agent:
            agent.stop()
        collector.stop()
    check(traces, lines, {**RESOURCE, "service.name": "renewed"})
    assert f"exported {len(lines)}, lost 0" in agent.stderr()

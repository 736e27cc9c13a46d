"""Metrics of all requests in the official collector: they agree with the spans' durations, whatever is sampled."""

import os
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from collector.process import attributes, collected_metrics, official
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from registry import seen

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.kernel_maps import KernelMaps
from e2e.nginx_server import AccessLog, NginxServer, free_ports, wait_until
from e2e.request_metrics import (
    ALL,
    BOUNDS_S,
    EXPONENTIAL_BOUNDS_S,
    METRICS,
    differences,
    expected,
    exponential,
    measured_spans,
    series_of,
    told,
)

COLLECTOR = """\
receivers: { otlp: { protocols: { grpc: { endpoint: "127.0.0.1:@GRPC@" }, http: { endpoint: "127.0.0.1:@HTTP@" } } } }
exporters: { file: { path: "@OUTPUT@", format: proto, flush_interval: 50ms } }
service:
  telemetry: { metrics: { level: none } }
  pipelines: { metrics: { receivers: [otlp], exporters: [file] } }
"""

LOCATIONS = 8_500
"""More than the kernel program keeps names of, and more than the series of a metric."""
SERIES_MAX = 2_000
BODY_SIZE = "http.server.response.body.size"

NGINX_HTTP = """
keepalive_requests 100000;
log_format sizes "$status $body_bytes_sent";
proxy_cache_path @PREFIX@/temp/cache keys_zone=cache:1m;
upstream app { server @UP@; keepalive 4; }
upstream retried { server @DEAD1@ max_fails=0; server @UP@ backup; }
upstream dead { server @DEAD1@ max_fails=0; server @DEAD2@ max_fails=0; }
server {
    listen 127.0.0.1:@PORT@;
    listen 127.0.0.1:@H2@ http2;
    server_name edge.example *.example;
    access_log logs/all.log json;
    access_log logs/sizes.log sizes;
    location / { return 204; }
    location /missing { return 404; }
    location /blocking { access_log @PREFIX@/pipe; return 204; }
    location /broken { return 503; }
    location /app/ { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }
    location /cached/ { proxy_pass http://app; proxy_cache cache; proxy_cache_valid 1h; proxy_cache_bypass $arg_pass; }
    location /retried/ { proxy_pass http://retried; }
    location /dead/ { proxy_pass http://dead; }
    location /impatient/ { proxy_pass http://@UP@; proxy_read_timeout 100ms; }
    location /unix/ { proxy_pass http://@UNIX@; }
    location ~ ^/re[a-z]ex/ { return 200 "matched"; }
    location /guarded/ { auth_request /app/auth; proxy_pass http://app; }
    location /old/ { error_page 404 = @fallback; return 404; }
    location @fallback { proxy_pass http://app; }
}
server {
    listen 127.0.0.1:@PORT@;
    server_name many.example;
    access_log logs/many.log json;
    access_log logs/sizes.log sizes;
    @MANY@
}
"""


def points_of(metric: Metric) -> Any:
    return metric.histogram.data_points or metric.exponential_histogram.data_points


@dataclass(frozen=True)
class Stand:
    directory: Path
    nginx: NginxServer
    ports: dict[str, int]
    log: AccessLog
    many: AccessLog
    output: Path
    """The collector's."""
    pipe: int
    """A log of nginx."""

    def agent(self, service: str, *arguments: str, **variables: str) -> AgentProcess:
        output = self.directory / "traces.jsonl"
        output.unlink(missing_ok=True)
        options = ["--pid", str(self.nginx.pid), "--exporter", "json", "--output", str(output)]
        environment = {
            "OTEL_SERVICE_NAME": service,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.ports['GRPC']}",
            **variables,
        }
        return AgentProcess(self.nginx.pid, self.directory, ["run", *options, *arguments], environment)

    def metrics(self, service: str, names: Collection[str] = METRICS.values()) -> list[Metric]:
        """What the collector was told of requests at last, perhaps in several messages."""
        all_told = [metric for metric in collected_metrics(self.output, service) if metric.name in names]
        last_unix_ns = max((points_of(metric)[0].time_unix_nano for metric in all_told), default=0)
        return [metric for metric in all_told if points_of(metric)[0].time_unix_nano == last_unix_ns]

    def logged_sizes(self) -> Counter[tuple[int, str]]:
        """As `told_sizes`, from nginx's own log."""
        sizes: Counter[tuple[int, str]] = Counter()
        for line in (self.directory / "logs" / "sizes.log").read_text().splitlines():
            status, size = map(int, line.split())
            sizes[status, "count"] += 1
            sizes[status, "bytes"] += size
            sizes[status, "small"] += size <= 256
        return sizes

    def send(self, requests: Sequence[bytes]) -> None:
        """On one connection, a hundred at a time without waiting for answers."""
        with Http1Connection(("127.0.0.1", self.ports["PORT"])) as connection:
            for first in range(0, len(requests), 100):
                part = requests[first : first + 100]
                connection.send(b"".join(part))
                for each in part:
                    connection.read_response(each.split(b" ", 1)[0].decode())

    def rude(self, data: bytes) -> None:
        """A client that sends something and goes when nginx does."""
        with Http1Connection(("127.0.0.1", self.ports["PORT"])) as connection:
            connection.send(data)
            connection.read_until_closed()


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    directory = public_directory / "request_metrics"
    directory.mkdir()
    ports = dict(zip(("PORT", "H2", "GRPC", "HTTP"), free_ports(4), strict=True))
    output = directory / "metrics.bin"
    words = {
        **{name: str(port) for name, port in ports.items()},
        "UP": upstream_addresses["ipv4"],
        "UNIX": f"{upstream_addresses['unix']}:",
        "DEAD1": upstream_addresses["dead1"],
        "DEAD2": upstream_addresses["dead2"],
        "OUTPUT": str(output),
        "PREFIX": str(directory),
        "MANY": "\n".join(f"location = /{number} {{ return 204; }}" for number in range(LOCATIONS)),
    }
    http, config = NGINX_HTTP, COLLECTOR
    for word, value in words.items():
        http, config = http.replace(f"@{word}@", value), config.replace(f"@{word}@", value)
    os.mkfifo(directory / "pipe")
    pipe = os.open(directory / "pipe", os.O_RDWR)
    nginx = NginxServer(directory, http, workers=2)
    nginx.start([("127.0.0.1", ports["PORT"])])
    collector = official(config, [ports["GRPC"], ports["HTTP"]], directory)
    logs = (AccessLog(directory / "logs" / f"{name}.log") for name in ("all", "many"))
    yield Stand(directory, nginx, ports, *logs, output, pipe)
    collector.stop()
    nginx.stop()
    os.close(pipe)


def get(target: str, method: str = "GET", **headers: str) -> bytes:
    return request_bytes(method, target, headers)


ALL_KINDS = [
    get("/"),
    get("/", "HEAD"),
    get("/", "DELETE"),
    get("/", "QUERY"),
    get("/", "PROPFIND"),
    get("/", "BREW"),
    get("/missing"),
    get("/broken"),
    get("/regex/one"),
    get("/app/new?delay_ms=7"),
    get("/app/kept?delay_ms=30&bytes=100000"),
    get("/app/refused?status=403"),
    get("/app/broken?status=502"),
    get("/app/slow?stall_ms=120"),
    get("/app/cut?end=close"),
    get("/cached/one"),
    get("/cached/one?pass=1"),
    get("/retried/"),
    get("/dead/"),
    get("/impatient/?delay_ms=400"),
    get("/unix/"),
    get("/guarded/"),
    get("/old/"),
    get("/", Host="many.example"),
]


def send_all_kinds(stand: Stand) -> int:
    """How many requests."""
    before = len(stand.log.poll()) + len(stand.many.poll())
    stand.send(ALL_KINDS * 3)
    stand.rude(b"GET /regex/ HTTP/1.0\r\n\r\n")
    stand.rude(b"nonsense\r\n\r\n")
    stand.rude(b"GET / HTTP/1.1\r\n\r\n")  # without Host
    with Http1Connection(("127.0.0.1", stand.ports["PORT"])) as leaving:
        leaving.send(get("/app/unwanted?delay_ms=300"))
    http2 = Http2Connection(("127.0.0.1", stand.ports["H2"]), tls=False)
    http2.exchange([Http2Request("/"), Http2Request("/app/h2?delay_ms=20")])
    http2.close()
    sent = 3 * len(ALL_KINDS) + 6
    wait_until(lambda: len(stand.log.poll()) + len(stand.many.poll()) == before + sent, "nginx's log lines")
    return sent


@pytest.mark.parametrize(("detail", "protocol"), [("phases", "grpc"), ("request", "http/protobuf")])
def test_they_are_the_spans_durations(stand: Stand, detail: str, protocol: str) -> None:
    """With every request traced each series has the very durations of the spans with its attributes, to the nanosecond,
    and examples that are those spans."""
    port = stand.ports["GRPC" if protocol == "grpc" else "HTTP"]
    agent = stand.agent(
        detail,
        f"--detail={detail}",
        "--metrics",
        OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
    )
    before, sizes_before = len(stand.log.poll()), stand.logged_sizes()
    try:
        sent = send_all_kinds(stand)
    finally:
        agent.stop()
    metrics = stand.metrics(detail)
    sizes = stand.logged_sizes()
    sizes.subtract(sizes_before)
    assert told_sizes(stand.metrics(detail, {BODY_SIZE})) == +sizes
    assert sizes[200, "bytes"] > 300_000
    histograms = told(metrics, attributes)
    assert differences(histograms, expected(agent.traces)) == []
    cached: Counter[str] = Counter()
    for (_, series), (count, _, _) in histograms.items():
        cached[dict(series).get("nginx.cache.status", "")] += count
    del cached[""]
    assert cached == Counter(filter(None, (line["upstream_cache_status"] for line in stand.log.lines[before:])))
    assert {"HIT", "BYPASS"} <= cached.keys()
    servers = [metric for metric in metrics if metric.name == METRICS["SERVER"]]
    assert sum(point.count for metric in servers for point in metric.histogram.data_points) == sent
    for metric in metrics:
        assert (metric.unit, metric.histogram.aggregation_temporality) == (
            "s",
            AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE,
        )
    assert check_exemplars(metrics, agent.traces) >= len(told(metrics, attributes))


def told_sizes(metrics: list[Metric]) -> Counter[tuple[int, str]]:
    """By status: how many responses, how many bytes, and how many with no more than 256 bytes."""
    sizes: Counter[tuple[int, str]] = Counter()
    for metric in metrics:
        assert metric.unit == "By"
        for point in metric.histogram.data_points:
            status = int(attributes(point.attributes)["http.response.status_code"])
            assert list(point.explicit_bounds[:2]) == [0, 256]
            sizes[status, "count"] += point.count
            sizes[status, "bytes"] += int(point.sum)
            sizes[status, "small"] += sum(point.bucket_counts[:2])
    return +sizes


def test_a_blocked_worker(stand: Stand) -> None:
    """A worker that waits for somebody to read its log serves nobody else. The histogram of turns shows how long."""
    agent = stand.agent("blocked", "--metrics")
    try:
        stand.send([get("/")] * 20)
        os.set_blocking(stand.pipe, False)
        with suppress(BlockingIOError):
            while True:
                os.write(stand.pipe, bytes(4096))
        began_s = time.monotonic()
        stand.send([get("/blocking")])  # nginx logs it after it has answered
        wait_until(lambda: any(is_in_a_write(pid) for pid in stand.nginx.worker_pids()), "a blocked worker")
        blocked_s = time.monotonic()
        time.sleep(0.3)
        least_s = time.monotonic() - blocked_s
        os.read(stand.pipe, 1 << 20)
        wait_until(lambda: not any(is_in_a_write(pid) for pid in stand.nginx.worker_pids()), "no blocked worker")
        most_s = time.monotonic() - began_s
        for _ in range(20):
            stand.send([get("/")])  # both workers' turns end
    finally:
        agent.stop()
    (metric,) = stand.metrics("blocked", {"nginx.worker.loop"})
    (point,) = metric.histogram.data_points
    bounds, counts = list(point.explicit_bounds), list(point.bucket_counts)
    longest = max(index for index, count in enumerate(counts) if count)
    assert counts[longest] == 1
    assert bounds[longest - 1] < most_s
    assert bounds[longest] >= least_s
    assert point.sum > least_s
    assert sum(counts[:-6]) >= 20


def is_in_a_write(pid: int) -> bool:
    """Tells whether a worker waits in write(2)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == "1"


def check_exemplars(metrics: list[Metric], traces: list[Trace], chosen: Collection[str] = ALL) -> int:
    """Each is a span of its series, and of its bucket; how many they are."""
    spans = {(trace.trace_id, span.span_id): span for trace in traces for span in trace.spans}
    count = 0
    for metric in metrics:
        for point in points_of(metric):
            series = metric.name, frozenset(attributes(point.attributes).items())
            for example in point.exemplars:
                span = spans[example.trace_id.hex(), example.span_id.hex()]
                assert series_of(span, chosen) == series
                assert example.as_double == span.seconds
                assert example.time_unix_nano == span.end_unix_ns
                count += 1
            if metric.HasField("histogram"):
                assert len(point.exemplars) <= sum(bucket > 0 for bucket in point.bucket_counts)
    return count


def test_they_count_what_is_not_sampled(stand: Stand) -> None:
    """Of a tenth of the requests there are traces, of all of them metrics, also of workers that a reload or a signal
    has ended; and examples are kept traces only."""
    agent = stand.agent("sampled", "--sampler=traceidratio", "--sampler-arg=0.1", "--metrics")
    targets = ["/", "/missing", "/broken", "/app/x", "/retried/"] * 200
    before = len(stand.log.poll())

    def logged(count: int) -> None:
        wait_until(lambda: len(stand.log.poll()) == before + count, "nginx's log lines")

    try:
        stand.send([get(target) for target in targets])
        logged(len(targets))
        old = set(stand.nginx.worker_pids())
        stand.nginx.reload()
        wait_until(lambda: old.isdisjoint(stand.nginx.worker_pids()), "the old workers to end")
        stand.send([get(target) for target in targets])
        logged(2 * len(targets))
        old = set(stand.nginx.worker_pids())
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(stand.nginx.worker_pids()) - old) >= 2, "new workers")  # and the cache manager
        stand.send([get(target) for target in targets])
        logged(3 * len(targets))
    finally:
        agent.stop()

    lines = stand.log.lines[before:]
    assert 0 < len(agent.traces) < len(lines) / 4
    metrics = stand.metrics("sampled")
    found: Counter[tuple[str, Any]] = Counter()
    for metric in metrics:
        for point in metric.histogram.data_points:
            found[metric.name, attributes(point.attributes).get("http.response.status_code")] += point.count
    wanted = Counter((METRICS["SERVER"], int(line["status"])) for line in lines)
    # The last attempt of each has an exchange; the attempts before it have a refused connect.
    wanted.update((METRICS["CLIENT"], 200) for line in lines if line["upstream_addr"])
    wanted[METRICS["CLIENT"], None] = sum(line["upstream_addr"].count(",") for line in lines)
    assert wanted[METRICS["CLIENT"], None]
    assert found == wanted
    assert check_exemplars(metrics, agent.traces) > 0
    assert {span.span_id for span in measured_spans(agent.traces)}


def test_what_finds_no_room(stand: Stand) -> None:
    """Of more series than there is room for every request is counted, those beyond in one point that says so."""
    agent = stand.agent("many", "--sampler=always_off", "--metrics")
    try:
        stand.send([get(f"/{number}", Host="many.example") for number in range(LOCATIONS)])
    finally:
        agent.stop()
    histograms = told(stand.metrics("many"), attributes)
    overflow = histograms.pop((METRICS["SERVER"], frozenset({("otel.metric.overflow", True)})))
    assert len(histograms) == SERIES_MAX - 1
    assert {count for count, _, _ in histograms.values()} == {1}
    assert overflow[0] == LOCATIONS - len(histograms)
    assert overflow[1] > 0
    assert sum(overflow[2]) == overflow[0]


def test_the_choice_of_attributes(stand: Stand) -> None:
    """Series are added up, also in the kernel: thousands of locations without their names take one place."""
    chosen = {"url.scheme", "http.request.method", "http.response.status_code", "server.address", "server.port"}
    arguments = [f"--metrics-attributes={name}" for name in sorted(chosen)]
    agent = stand.agent("chosen", "--metrics", *arguments)
    try:
        send_all_kinds(stand)
        stand.send([get(f"/{number}", Host="many.example") for number in range(LOCATIONS)])
        entries = KernelMaps(agent).series()
    finally:
        agent.stop()
    metrics = stand.metrics("chosen")
    assert differences(told(metrics, attributes), expected(agent.traces, chosen)) == []
    assert check_exemplars(metrics, agent.traces, chosen) > 0
    assert entries < 200


def test_exponential_histograms(stand: Stand) -> None:
    """Each duration is in the bucket that the data model gives it. Prometheus still gets the conventions' buckets."""
    wanted = {"OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "base2_exponential_bucket_histogram"}
    address = f"127.0.0.1:{free_ports(1)[0]}"
    agent = stand.agent("exponential", "--metrics", f"--metrics-listen={address}", **wanted)
    try:
        sent = send_all_kinds(stand)
        name = "http_server_request_duration_seconds"
        wait_until(lambda: sum(scrape(address, f"{name}_count").values()) == sent, "metrics")
        scraped_buckets = scrape(address, f"{name}_bucket")
    finally:
        agent.stop()
    metrics = stand.metrics("exponential")
    spans = expected(agent.traces, bounds_s=EXPONENTIAL_BOUNDS_S)
    assert differences(exponential(metrics, attributes), spans) == []
    assert told(metrics, attributes) == {}
    assert check_exemplars(metrics, agent.traces) >= len(spans)
    # Prometheus' buckets contain the smaller buckets.
    buckets: Counter[float] = Counter()
    for labels, count in scraped_buckets.items():
        buckets[float(dict(labels)["le"])] += int(count)
    seconds = [trace.server.seconds for trace in agent.traces]
    assert buckets == Counter({bound: sum(each <= bound for each in seconds) for bound in (*BOUNDS_S, inf)})


def test_a_prometheus_server_fetches_them(stand: Stand) -> None:
    """Of one nginx, with exemplars for those who accept OpenMetrics."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    agent = stand.agent("prometheus", f"--metrics-listen={address}")
    try:
        stand.send([get("/app/x"), get("/broken")] * 5)
        wait_until(lambda: sum(scrape(address, "http_server_request_duration_seconds_count").values()) == 10, "metrics")
        labels_of = {
            labels["http_route"]: labels
            for labels in map(dict, scrape(address, "http_server_request_duration_seconds_count"))
        }
        examples = {
            sample.exemplar.labels["trace_id"]
            for family in scraped(address)
            for sample in family.samples
            if sample.exemplar
        }
    finally:
        agent.stop()
    assert labels_of.keys() == {"/app/", "/broken"}
    wanted = {
        "service_name": "prometheus",
        "http_request_method": "GET",
        "http_response_status_code": "503",
        "http_route": "/broken",
        "url_scheme": "http",
        "network_protocol_version": "1.1",
        "error_type": "503",
        "nginx_server_name": "edge.example",
    }
    assert {**labels_of["/broken"], **wanted} == labels_of["/broken"]
    assert labels_of["/broken"]["service_instance_id"]
    assert examples
    assert examples <= {trace.trace_id for trace in agent.traces}


def scraped(address: str) -> list[Any]:
    request = Request(f"http://{address}/metrics", headers={"Accept": "application/openmetrics-text"})
    with urlopen(request) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    for family in families:
        if family.name.startswith(("http_", "otel_nginx_ebpf_")):
            seen.labels(family.name, {name for sample in family.samples for name in sample.labels})
    return families


def scrape(address: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """By labels, the values of one sample name."""
    return {
        tuple(sample.labels.items()): sample.value
        for family in scraped(address)
        for sample in family.samples
        if sample.name == name
    }


def test_known_methods_and_names(stand: Stand) -> None:
    """Spans and series know the same methods. The names of CLIENT spans change nothing else."""
    known = {"OTEL_INSTRUMENTATION_HTTP_KNOWN_METHODS": "GET,PROPFIND"}
    agent = stand.agent("methods", "--metrics", "--span-names=semconv", **known)
    methods = ["GET", "POST", "BREW"]
    try:
        stand.send([get("/", "PROPFIND")])
        stand.send([get(path, method) for method in methods for path in ("/", "/app/x", "/dead/")])
    finally:
        agent.stop()
    assert differences(told(stand.metrics("methods"), attributes), expected(agent.traces)) == []
    servers = [trace.server for trace in agent.traces]
    assert {(span.name.split()[0], span.attributes.get("http.request.method_original")) for span in servers} == {
        ("GET", None),
        ("PROPFIND", None),
        ("HTTP", "POST"),
        ("HTTP", "BREW"),
    }
    clients = [span for trace in agent.traces for span in trace.spans if span.kind == "CLIENT"]
    assert len(clients) == len(methods) * (1 + 2)
    assert {span.name for span in clients} == {"GET", "HTTP"}


def test_they_can_be_left_out(stand: Stand) -> None:
    agent = stand.agent("without", "--metrics", "--request-metrics=off")
    try:
        stand.send([get("/app/x")])
    finally:
        agent.stop()
    assert len(agent.traces) == 1
    assert stand.metrics("without") == []
    assert "otel_nginx_ebpf.requests.received" in [
        metric.name for metric in collected_metrics(stand.output, "otel-nginx-ebpf")
    ]

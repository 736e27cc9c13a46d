"""The pipeline of examples/collector with tail sampling, and the logs of examples/fleet, into real engines.

Each fact is asked of the last backend (Jaeger, Prometheus, VictoriaLogs) by its own API, and compared with what nginx
logged. `make fleet` does so with more of everything, and with faults.
"""

import json
import re
import subprocess
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
import yaml
from collector.process import layered
from fleet import checks
from fleet.engines import DECIDED, MEASURED, Prometheus, VictoriaLogs, build
from fleet.nginx import EXAMPLES, http_block

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.jaeger_backend import Jaeger
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until
from e2e.oracle import logged_attempts

WORKLOAD = {
    "/": 120,
    "/broken?status=500": 8,
    "/slow?delay_ms=600": 4,
    "/retried": 8,
    "/static": 100,
}

# The collectors' own metrics, for Prometheus to ask for.
OWN_METRICS = """
service:
  telemetry:
    metrics: { readers: [pull: { exporter: { prometheus: { host: 127.0.0.1, port: %d } } }] }
"""


@dataclass(frozen=True)
class Fleet:
    port: int
    log: AccessLog
    jaeger: Jaeger
    prometheus: Prometheus
    logs: VictoriaLogs

    def oldest_s(self) -> float:
        """Return the time of the latest sample of the series that has the oldest one, in Unix seconds."""
        return self.prometheus.value(f"min(timestamp({MEASURED}) or timestamp(traces_span_metrics_calls_total))")

    def request(self, workload: dict[str, int]) -> None:
        """Send the requests, and wait until nginx has logged them and Prometheus has counted them."""
        before = len(self.log.poll())
        with Http1Connection(("127.0.0.1", self.port)) as connection:
            for target, count in workload.items():
                for _ in range(count):
                    connection.request(target)
        offered = before + sum(workload.values())
        wait_until(lambda: len(self.log.poll()) == offered, "nginx's log lines")
        wait_until(lambda: self.prometheus.value(f"sum({MEASURED})") == offered, "Prometheus to count the requests", 30)
        spans = 'sum(traces_span_metrics_calls_total{span_kind="SPAN_KIND_SERVER"})'
        wait_until(lambda: self.prometheus.value(spans) == offered, "the collector to count the spans", 30)


@pytest.fixture(scope="module")
def fleet(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Fleet]:
    directory = public_directory / "fleet"
    directory.mkdir()
    grpc, http, own, port = free_ports(4)
    with ExitStack() as stops:
        nginx = NginxServer(directory, http_block(upstream_addresses, port, directory / "logs"))
        nginx.start([("127.0.0.1", port)])
        stops.callback(nginx.stop)
        jaeger = Jaeger(directory)
        stops.callback(jaeger.stop)
        prometheus = Prometheus(EXAMPLES / "fleet" / "prometheus.yaml", [f"127.0.0.1:{own}"], directory)
        stops.callback(prometheus.stop)
        logs = VictoriaLogs(directory / "logs" / "fleet.log", directory)
        stops.callback(logs.stop)
        (directory / "own-metrics.yaml").write_text(OWN_METRICS % own)
        environment = {
            "OTLP_GRPC_LISTEN": f"127.0.0.1:{grpc}",
            "OTLP_HTTP_LISTEN": f"127.0.0.1:{http}",
            "TRACES_ENDPOINT": f"127.0.0.1:{jaeger.otlp}",
            "METRICS_ENDPOINT": f"http://127.0.0.1:{prometheus.port}/api/v1/otlp",
            "METRICS_INTERVAL": "200ms",
            "DECISION_WAIT": "1s",
        }
        example = EXAMPLES / "collector"
        configs = (example / "otel-collector.yaml", example / "tail-sampling.yaml", directory / "own-metrics.yaml")
        gateway = layered(configs, environment, [grpc, http, own], directory / "gateway.log")
        stops.callback(gateway.stop)
        variables = {
            "OTEL_SERVICE_NAME": "edge",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{grpc}",
            "OTEL_NGINX_EBPF_METRICS": "true",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        command = ["run", "--pid", str(nginx.pid), "--adopt-upstream-context"]
        agent = AgentProcess(nginx.pid, directory, command, variables)
        stops.callback(agent.stop)
        yield Fleet(port, AccessLog(directory / "logs" / "fleet.log"), jaeger, prometheus, logs)
    assert nginx.problems() == []
    assert "lost 0" in agent.stderr()


@dataclass(frozen=True)
class Round:
    """Requests for which every series was there before the first and after the last."""

    lines: list[LogLine]
    began_s: float
    ended_s: float

    @property
    def window(self) -> str:
        return f"{round((self.ended_s - self.began_s) * 1000)}ms"


@pytest.fixture(scope="module")
def second_round(fleet: Fleet) -> Round:
    fleet.request(dict.fromkeys(WORKLOAD, 1))
    began_s, first = time.time(), len(fleet.log.lines)
    wait_until(lambda: fleet.oldest_s() > began_s, "a sample of each series before the round", 30)
    fleet.request(WORKLOAD)
    offered = len(fleet.log.lines)
    wait_until(lambda: sum(fleet.prometheus.query(DECIDED).values()) == offered, "the sampler to decide", 30)
    # A rate is extrapolated to the window's edges, by up to an interval: the longer the window, the less that is.
    wait_until(lambda: time.time() > began_s + 20, "a window of 20 s", 30)
    ended_s = time.time()
    wait_until(lambda: fleet.oldest_s() > ended_s, "a sample of each series after the round", 30)
    return Round(fleet.log.lines[first:], began_s, ended_s)


@pytest.mark.usefixtures("second_round")
def test_offered_is_stored_and_counted(fleet: Fleet) -> None:
    """By the numbers of the last backends: Jaeger's traces, and what the sampler left out as Prometheus has it."""
    offered = len(fleet.log.lines)
    decided = {
        ("true" in labels): value for labels, value in fleet.prometheus.query(f"sum by (sampled) ({DECIDED})").items()
    }
    wait_until(lambda: len(checks.stored(fleet.jaeger, "edge")) == decided[True], "Jaeger to have what was kept")
    assert (
        decided[True] + decided[False]
        == offered
        == fleet.prometheus.value("sum(otel_nginx_ebpf_requests_received_total)")
    )
    assert fleet.prometheus.value("sum(otel_nginx_ebpf_requests_lost_total)") == 0


def route(line: LogLine) -> str:
    return re.split(r"[ ?]", line["message"])[1]


def test_errors_and_slow_traces_are_whole(fleet: Fleet, second_round: Round) -> None:
    kept = {line["trace_id"]: line for line in second_round.lines if checks.is_kept(line)}
    assert Counter(route(line) for line in kept.values()) == {"/broken": 8, "/slow": 4, "/retried": 8}
    wait_until(lambda: kept.keys() <= checks.stored(fleet.jaeger, "edge").keys(), "Jaeger to have them", 20)
    traces = checks.stored(fleet.jaeger, "edge")
    assert [fault for trace_id, line in kept.items() for fault in checks.faults_of(line, traces[trace_id])] == []


def test_share_of_the_others_is_whole(fleet: Fleet, second_round: Round) -> None:
    """A tenth, by trace id. nginx does not know the trace ids of /static."""
    logged = {line["trace_id"]: line for line in fleet.log.lines if line["trace_id"]}
    traces = checks.stored(fleet.jaeger, "edge")
    others = {trace_id: spans for trace_id, spans in traces.items() if not checks.is_kept(logged.get(trace_id, QUIET))}
    assert 0 < len(others) < len(fleet.log.lines) / 3
    known = others.keys() & logged.keys()
    assert [fault for trace_id in known for fault in checks.faults_of(logged[trace_id], others[trace_id])] == []


QUIET = {"status": "200", "request_time": "0.000", "upstream_addr": ""}
"""Stands for the line of a trace whose id nginx does not know."""


def test_log_lines_lead_to_traces_and_back(fleet: Fleet, second_round: Round) -> None:
    wait_until(lambda: fleet.logs.count() == len(fleet.log.lines), "VictoriaLogs to have every line", 30)
    fields = fleet.log.lines[0].keys() - {"time", "message"}
    as_logged = Counter(
        tuple(sorted((field, line[field]) for field in fields if line[field])) for line in fleet.log.lines
    )
    as_stored = Counter(
        tuple(sorted((field, line[field]) for field in fields if line.get(field))) for line in fleet.logs.query("*")
    )
    assert as_stored == as_logged
    failed = fleet.logs.query("status:=500")
    assert len(failed) == 9
    for line in failed:
        (found,) = fleet.jaeger.ask(f"/api/traces/{line['trace_id']}")
        assert found["traceID"] == line["trace_id"]
        (back,) = fleet.logs.query(f'trace_id:="{found["traceID"]}"')
        assert back == line


def test_metrics_count_every_request(fleet: Fleet, second_round: Round) -> None:
    """Whatever was sampled: by route and status, from the kernel."""
    counted = fleet.prometheus.query(
        "sum by (http_route, http_response_status_code) (http_server_request_duration_seconds_count)"
    )
    assert counted == Counter((line["status"], route(line)) for line in fleet.log.lines)


def test_exemplars_lead_to_traces(fleet: Fleet, second_round: Round) -> None:
    """An exemplar is of any request. Those of errors and of slow requests lead to traces that the sampler kept."""
    for selector, wanted in (('error_type="500"', "/broken"), ('http_route="/slow"', "/slow")):
        found = list(
            fleet.prometheus.exemplars(
                f"http_server_request_duration_seconds_bucket{{{selector}}}", second_round.began_s - 60, time.time()
            )
        )
        assert found
        for exemplar in found:
            (trace,) = fleet.jaeger.ask(f"/api/traces/{exemplar['labels']['trace_id']}")
            tags = [tag["value"] for span in trace["spans"] for tag in span["tags"] if tag["key"] == "url.path"]
            assert set(tags) == {wanted}


def alerts() -> dict[str, str]:
    groups = yaml.safe_load((EXAMPLES / "fleet" / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_each_alert_fires() -> None:
    """Prometheus' own tester runs alerts-test.yaml, which has a test of each alert."""
    tests = EXAMPLES / "fleet" / "alerts-test.yaml"
    subprocess.run([build("promtool"), "test", "rules", tests], check=True)
    tested = {
        each["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for each in test["alert_rule_test"]
        if each.get("exp_alerts")
    }
    assert tested == alerts().keys()


def test_alerts_find_what_happened(fleet: Fleet, second_round: Round) -> None:
    """In the real series, whose names and labels the tests above took for granted."""
    found = {name: fleet.prometheus.query(expression) for name, expression in alerts().items()}
    assert found["UpstreamErrors"].keys() == {("app",)}
    ((address, port, *rest),) = [
        (labels[1], labels[2], labels[0], labels[3]) for labels in found["UpstreamConnectFailures"]
    ]
    assert rest == ["ECONNREFUSED", "retried"]
    (dead,) = {logged_attempts(line)[0].peer for line in second_round.lines if route(line) == "/retried"}
    assert f"{address}:{port}" == dead
    assert not any(found[name] for name in ("TracesLost", "CollectorLosesSpans", "SamplerFull"))


@dataclass(frozen=True)
class Dashboard:
    """The queries of examples/collector/grafana/latency.json, over the second round."""

    prometheus: Prometheus
    round: Round

    def ask(self, title: str, target: int = 0) -> dict[tuple[str, ...], float]:
        panels = json.loads((EXAMPLES / "collector" / "grafana" / "latency.json").read_text())["panels"]
        (panel,) = [each for each in panels if each["title"] == title]
        expression = panel["targets"][target]["expr"].replace("$__rate_interval", self.round.window)
        return self.prometheus.query(expression, time=self.round.ended_s)

    def counts(self, title: str) -> dict[tuple[str, ...], float]:
        """What a panel in requests a second says, as requests."""
        seconds = self.round.ended_s - self.round.began_s
        return {labels: value * seconds for labels, value in self.ask(title).items() if value}

    def disagree(self, title: str, logged: dict[tuple[str, ...], list[float]]) -> list[str]:
        """Return the quantiles of a panel that are in other buckets than nginx's own times in seconds."""
        found = []
        for target, quantile in enumerate((0.5, 0.95, 0.99)):
            panel = self.ask(title, target)
            assert panel.keys() == logged.keys()
            for labels, times in logged.items():
                rank, times = quantile * len(times), sorted(times)
                low, high = times[max(0, floor(rank) - 1)], times[min(len(times) - 1, ceil(rank))]
                # nginx counts in milliseconds, and from other moments.
                if not bucket(low - 0.003)[0] <= panel[labels] <= bucket(high + 0.003)[1]:
                    found.append(f"{labels} p{quantile * 100:g}: {panel[labels]}, nginx: {low} to {high}")
        return found


BOUNDS = (0, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""The buckets of the semantic conventions, in seconds."""


def bucket(seconds: float) -> tuple[float, float]:
    index = max(1, bisect_left(BOUNDS, seconds))
    return BOUNDS[index - 1], BOUNDS[index]


def about(counts: Counter[tuple[str, ...]]) -> Any:
    return pytest.approx(dict(counts), rel=0.05)


def test_dashboard_gives_nginxs_figures(fleet: Fleet, second_round: Round) -> None:
    dashboard = Dashboard(fleet.prometheus, second_round)
    lines = second_round.lines
    assert dashboard.counts("Requests by route") == about(Counter((route(line),) for line in lines))
    failed = Counter((route(line),) for line in lines if line["status"] >= "500")
    assert dashboard.counts("Server errors by route") == about(failed)

    times: dict[tuple[str, ...], list[float]] = {}
    waits: dict[tuple[str, ...], list[float]] = {}
    failures: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        times.setdefault((route(line),), []).append(float(line["request_time"]))
        for attempt in logged_attempts(line):
            waits.setdefault(tuple(attempt.peer.split(":")), []).append(float(attempt.response_time))
            if attempt.bytes_sent == "0":
                failures["ECONNREFUSED", attempt.peer, "upstream connect"] += 1
            elif attempt.status >= "400":
                failures[attempt.status, attempt.peer, "upstream exchange"] += 1
    assert dashboard.disagree("Duration by route", times) == []
    assert dashboard.disagree("Duration by upstream peer", waits) == []
    assert dashboard.counts("Failed upstream attempts") == about(failures)
    exchanges = [
        float(attempt.response_time) for line in lines for attempt in logged_attempts(line) if attempt.bytes_sent != "0"
    ]
    mean_s = dashboard.ask("Mean duration of each phase")["upstream exchange",]
    assert mean_s == pytest.approx(sum(exchanges) / len(exchanges), abs=0.003)

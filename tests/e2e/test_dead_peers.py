"""What backends show of upstream peers that refuse connections: metrics of the official collector, and Jaeger.

Such a peer tells nothing of itself. A backend knows it only from nginx's CLIENT span: `upstream connect` with ERROR.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from collector.process import attributes, collected, collected_metrics, official

from e2e.agent_process import AgentProcess, Span
from e2e.http1_client import Http1Connection
from e2e.jaeger_backend import Jaeger
from e2e.nginx_server import NginxServer, free_ports, wait_until

COLLECTOR = """\
receivers:
  otlp: { protocols: { grpc: { endpoint: "127.0.0.1:%(otlp)d" } } }
connectors:
  span_metrics:
    metrics_flush_interval: 200ms
    dimensions:
      - name: network.peer.address
      - name: network.peer.port
      - name: server.address
      - name: error.type
exporters:
  file/traces: { path: "%(traces)s", format: proto, flush_interval: 50ms }
  file/metrics: { path: "%(metrics)s", format: proto, flush_interval: 50ms }
  otlp_grpc: { endpoint: "127.0.0.1:%(jaeger)d", tls: { insecure: true } }
service:
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [file/traces, otlp_grpc, span_metrics] }
    metrics: { receivers: [span_metrics], exporters: [file/metrics] }
"""

NGINX = """
    upstream app { server %(dead)s max_fails=0; server %(live)s backup; }
    server {
        listen 127.0.0.1:%(nginx)d;
        location /retried/ { proxy_pass http://app; proxy_set_header Host shop.example; }
        location /refused/ { proxy_pass http://%(dead)s; proxy_set_header Host pay.example; }
    }
"""

REFUSED, RETRIED = 3, 2


@dataclass(frozen=True)
class Stand:
    dead: str
    live: str
    traces: Path
    metrics: Path
    jaeger: Jaeger


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    """The backends, after three requests to a dead peer alone, and two that a live peer answered after a dead one."""
    directory = public_directory / "dead_peers"
    directory.mkdir()
    nginx_port, otlp = free_ports(2)
    stand = Stand(
        upstream_addresses["dead1"],
        upstream_addresses["ipv4"],
        directory / "traces.bin",
        directory / "metrics.bin",
        Jaeger(directory),
    )
    with ExitStack() as stops:
        stops.callback(stand.jaeger.stop)
        words = {"otlp": otlp, "traces": stand.traces, "metrics": stand.metrics, "jaeger": stand.jaeger.otlp}
        stops.callback(official(COLLECTOR % words, [otlp], directory).stop)
        nginx = NginxServer(directory, NGINX % {"nginx": nginx_port, "dead": stand.dead, "live": stand.live})
        nginx.start([("127.0.0.1", nginx_port)])
        stops.callback(nginx.stop)
        variables = {"OTEL_SERVICE_NAME": "edge", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp}"}
        agent = AgentProcess(nginx.pid, directory, ["run", "--pid", str(nginx.pid)], variables)
        stops.callback(agent.kill)
        with Http1Connection(("127.0.0.1", nginx_port)) as connection:
            answers = [connection.request("/refused/").status for _ in range(REFUSED)]
            answers += [connection.request("/retried/").status for _ in range(RETRIED)]
        assert answers == [502] * REFUSED + [200] * RETRIED
        agent.stop()
        yield stand
    assert f"exported {REFUSED + RETRIED}, lost 0" in agent.stderr()


def client_spans(stand: Stand) -> list[Span]:
    def spans() -> list[Span]:
        return [span for trace in collected(stand.traces, bool) for span in trace.spans if span.kind == "CLIENT"]

    expected = REFUSED + 2 * RETRIED
    wait_until(lambda: len(spans()) == expected, f"{expected} CLIENT spans in the collector's file")
    return spans()


Call = tuple[str, int, str, str, str | None]
"""Address and port of the peer, the host that nginx asked for, the span's status and error.type."""


def calls(stand: Stand) -> Counter[Call]:
    """The collector's latest counts of CLIENT spans."""
    latest: dict[Call, int] = {}
    for metric in collected_metrics(stand.metrics, "edge"):
        if metric.name == "traces.span.metrics.calls":
            for point in metric.sum.data_points:
                told = attributes(point.attributes)
                if told["span.kind"] == "SPAN_KIND_CLIENT":
                    latest[call_of(told, told["status.code"].removeprefix("STATUS_CODE_"))] = point.as_int
    return Counter(latest)


def call_of(told: dict[str, Any], status: str) -> Call:
    return (
        told["network.peer.address"],
        int(told["network.peer.port"]),
        told["server.address"],
        status,
        told.get("error.type"),
    )


def expected_calls(stand: Stand) -> Counter[Call]:
    (dead, dead_port), (live, live_port) = (each.rsplit(":", 1) for each in (stand.dead, stand.live))
    return Counter(
        {
            (dead, int(dead_port), "pay.example", "ERROR", "ECONNREFUSED"): REFUSED,
            (dead, int(dead_port), "shop.example", "ERROR", "ECONNREFUSED"): RETRIED,
            (live, int(live_port), "shop.example", "UNSET", None): RETRIED,
        }
    )


def test_a_client_span_tells_of_a_dead_peer(stand: Stand) -> None:
    """The collector's file: who refused, whom nginx asked for, and why it failed."""
    told = Counter(call_of(span.attributes, span.status) for span in client_spans(stand))
    assert told == expected_calls(stand)
    failed = [span for span in client_spans(stand) if span.status == "ERROR"]
    assert {span.name for span in failed} == {"upstream connect"}
    lines = [[event.attributes["nginx.error.message"] for event in span.events] for span in failed]
    assert lines == [["connect() failed (111: Connection refused) while connecting to upstream"]] * len(failed)


def test_the_collector_counts_dead_peers(stand: Stand) -> None:
    """The span-metrics connector: calls and errors of each peer, also of one without any span of its own."""
    wait_until(lambda: calls(stand) == expected_calls(stand), f"{expected_calls(stand)} in the collector's metrics")


def test_jaeger_finds_the_traces_of_a_dead_peer(stand: Stand) -> None:
    """By the attributes of the CLIENT span."""
    address, port = stand.dead.rsplit(":", 1)
    wanted = {"error.type": "ECONNREFUSED", "network.peer.address": address, "network.peer.port": port}

    def found() -> list[Any]:
        return stand.jaeger.ask("/api/traces", service="edge", tags=json.dumps(wanted), lookback="1h") or []

    wait_until(lambda: len(found()) == REFUSED + RETRIED, "the traces in Jaeger")
    others = {**wanted, "network.peer.port": "1"}
    assert stand.jaeger.ask("/api/traces", service="edge", tags=json.dumps(others), lookback="1h") == []


def test_jaegers_dependencies_know_no_peer_without_spans(stand: Stand) -> None:
    """An edge of Jaeger joins two spans of different services (GetDependencies of its storage in memory).

    It reads no attribute of a peer. Neither a live nor a dead peer is in its graph unless the peer tells spans itself;
    test_service_graph.py has one that does. Jaeger shows dead peers by a search for the CLIENT span's attributes.
    """
    client_spans(stand)
    wait_until(lambda: "edge" in (stand.jaeger.ask("/api/services") or []), "nginx's spans in Jaeger")
    end_ms = time.time_ns() // 10**6
    edges = stand.jaeger.ask("/api/dependencies", endTs=end_ms, lookback=3_600_000)
    assert {(each["parent"], each["child"]) for each in edges} == {("edge", "edge")}

"""`--detail request`: one probe a request, and times from nginx's millisecond clock, which nginx's log must confirm."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.agent_process import PROGRAM, AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until
from e2e.oracle import logged_attempts
from e2e.timing import LAG_MAX_MS

CLOCK_MS = 1.0
"""nginx's times are whole milliseconds."""


@dataclass
class Stand:
    nginx: NginxServer
    agent: AgentProcess
    http1: tuple[str, int]
    http2: tuple[str, int]
    log: AccessLog
    expected: int = 0
    """Log lines, and traces."""

    def exchanges(self, count: int) -> list[tuple[LogLine, Trace]]:
        """The last `count` log lines, each with its trace."""
        self.expected += count
        wait_until(lambda: len(self.log.poll()) == len(self.agent.poll()) == self.expected, "log lines and traces")
        keys = ("nginx.connection.id", "nginx.connection.requests")
        traces = {tuple(trace.server.attributes[key] for key in keys): trace for trace in self.agent.traces}
        return [
            (line, traces[int(line["connection"]), int(line["connection_requests"])])
            for line in self.log.lines[-count:]
        ]


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    directory = public_directory / "request-detail"
    directory.mkdir()
    http1, http2 = free_ports(2)
    up, dead = upstream_addresses["ipv4"], upstream_addresses["dead1"]
    nginx = NginxServer(
        directory,
        f"""
        upstream kept {{ server {up}; keepalive 4; }}
        upstream retried {{ server {dead} max_fails=0; server {up} max_fails=0; }}
        server {{
            listen 127.0.0.1:{http1}; listen 127.0.0.1:{http2} http2;
            access_log logs/all.log json;
            proxy_http_version 1.1; proxy_set_header Connection "";
            location /static {{ return 200 static; }}
            location /kept {{ proxy_pass http://kept; }}
            location /retried {{ proxy_pass http://retried; }}
            location /dead {{ proxy_pass http://{dead}; }}
        }}
        """,
    )
    nginx.start([("127.0.0.1", http1), ("127.0.0.1", http2)])
    output = directory / "traces.jsonl"
    arguments = ["run", "--pid", str(nginx.pid), "--detail", "request", "--exporter", "json", "--output", output]
    agent = AgentProcess(nginx.pid, directory, arguments)
    try:
        yield Stand(nginx, agent, ("127.0.0.1", http1), ("127.0.0.1", http2), AccessLog(directory / "logs" / "all.log"))
        agent.stop()
        assert f"received {len(agent.poll())}, exported {len(agent.traces)}, lost 0" in agent.stderr()
    finally:
        nginx.stop()
        shutil.rmtree(directory)


def seconds(text: str) -> float | None:
    return None if text == "-" else float(text)


def check(log: LogLine, trace: Trace) -> None:
    server, attributes = trace.server, trace.server.attributes
    assert attributes["http.response.status_code"] == int(log["status"])
    assert attributes["http.response.size"] == int(log["bytes_sent"])
    began_ms = float(log["msec"]) * 1000 - float(log["request_time"]) * 1000
    assert abs(server.start_unix_ns / 1e6 - began_ms) <= 2 * CLOCK_MS
    assert -2 * CLOCK_MS <= server.end_unix_ns / 1e6 - float(log["msec"]) * 1000 <= LAG_MAX_MS
    for child in trace.children:
        assert server.start_unix_ns <= child.start_unix_ns < child.end_unix_ns <= server.end_unix_ns

    logged = logged_attempts(log)
    assert attributes.get("nginx.upstream.attempts", 0) == (1 if logged else 0)
    assert attributes.get("nginx.upstream.attempts_lost", 0) == max(0, len(logged) - 1)
    if not logged:
        assert not trace.children
        return
    last = logged[-1]
    connect, exchange = trace.named("upstream connect"), trace.named("upstream exchange")
    assert {span.attributes["nginx.upstream.peer"] for span in connect + exchange} <= {last.peer}
    connect_seconds, response_seconds = seconds(last.connect_time), seconds(last.response_time)
    assert len(exchange) == (connect_seconds is not None)
    assert len(connect) == (connect_seconds is None or connect_seconds > 0)
    for span in exchange:
        assert span.attributes["http.response.status_code"] == int(last.status)
        assert span.attributes["http.response.size"] == int(last.bytes_received)
        assert connect_seconds is not None
        assert response_seconds is not None
        assert abs(span.seconds - (response_seconds - connect_seconds)) * 1000 <= 1.5 * CLOCK_MS


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/static", 200),
        ("/kept", 200),
        ("/kept?delay_ms=30", 200),
        ("/kept?status=503", 503),
        ("/retried", 200),
        ("/dead", 502),
    ],
)
def test_http1(stand: Stand, target: str, status: int) -> None:
    with Http1Connection(stand.http1) as connection:
        assert [connection.request(target).status for _ in range(5)] == [status] * 5
    for log, trace in stand.exchanges(5):
        assert log["request_uri"] == target
        check(log, trace)


def test_http2(stand: Stand) -> None:
    connection = Http2Connection(stand.http2, tls=False)
    connection.exchange([Http2Request(f"/kept?delay_ms={delay}") for delay in range(10)])
    connection.close()
    for log, trace in stand.exchanges(10):
        assert log["server_protocol"] == "HTTP/2.0"
        check(log, trace)


def test_an_upstream_that_takes_its_time_is_seen_to(stand: Stand) -> None:
    with Http1Connection(stand.http1) as connection:
        connection.request("/kept?delay_ms=50")
    ((_, trace),) = stand.exchanges(1)
    assert 0.049 <= trace.named("upstream exchange")[0].seconds < 0.049 + LAG_MAX_MS / 1000


def test_new_workers_are_traced(stand: Stand) -> None:
    """Without the tracepoint that sees them forked they are looked for each second, and their first requests missed."""
    stand.nginx.reload()
    requests = 0

    def traced() -> bool:
        nonlocal requests
        with Http1Connection(stand.http1) as connection:
            connection.request("/static")
        requests += 1
        return len(stand.agent.poll()) > stand.expected

    wait_until(traced, "a trace from a new worker")
    wait_until(lambda: len(stand.log.poll()) == stand.expected + requests, "the log lines")
    assert {trace.server.attributes["nginx.worker.pid"] for trace in stand.agent.traces[stand.expected :]} <= set(
        stand.nginx.worker_pids()
    )


EVERYTHING = ["--propagators", "tracecontext", "--propagators", "b3", "--propagators", "b3multi", "--propagators"]
EVERYTHING += ["xrequestid", "--keep-errors", "--keep-slower-than", "1s", "--sampler", "parentbased_traceidratio"]


@pytest.mark.parametrize("choice", [["--detail", "request"], ["--adopt-upstream-context"]], ids=lambda words: words[0])
def test_the_kernel_takes_the_program_with_all_that_can_be_chosen(stand: Stand, choice: list[str]) -> None:
    """The verifier has to follow each way through it; more choices are more ways."""
    command = [PROGRAM, "run", "--dry-run", "--pid", str(stand.nginx.pid), *EVERYTHING, *choice]
    attached = subprocess.run(command, capture_output=True, text=True, check=False)
    assert attached.returncode == 0, attached.stderr
    assert "ready: nginx" in attached.stderr

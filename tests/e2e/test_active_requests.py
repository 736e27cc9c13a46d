"""Many requests at once: how many there are, and more than `--max-active-requests` has room for."""

import os
import re
import signal
from pathlib import Path
from urllib.request import urlopen

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection, request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import free_ports, wait_until
from e2e.stage import Stage
from e2e.test_request_metrics import scrape
from e2e.timing import ONE_TURN

MOST = 64
"""The least that --max-active-requests takes."""
AT_ONCE = 100
SECONDS = 3


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_more_requests_at_once_than_there_is_room_for(stage: Stage, tmp_path: Path) -> None:
    pid = str(stage.site.nginx.pid)
    command = ["run", "--pid", pid, "--exporter", "line", "--output", "/dev/null", "--max-active-requests", str(MOST)]
    agent = AgentProcess(stage.site.nginx.pid, tmp_path, command)
    connections = [Http1Connection(stage.addresses["ipv4"]) for _ in range(AT_ONCE)]
    for connection in connections:
        connection.send(f"GET /?delay_ms={SECONDS}000 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    for connection in connections:
        assert connection.read_response().status == 200
        connection.close()
    wait_until(lambda: len(stage.log.poll()) == AT_ONCE, "nginx's log lines")
    agent.stop()
    assert f"received {AT_ONCE}, exported {AT_ONCE}, lost 0" in agent.stderr()
    ends = [float(line["msec"]) for line in stage.log.lines]
    begins = [end - float(line["request_time"]) for end, line in zip(ends, stage.log.lines, strict=True)]
    assert max(begins) < min(ends), "all were in flight at once"
    stage.exchanges(AT_ONCE, ONE_TURN)


def counts(address: str) -> tuple[int, int, int]:
    """Open connections, running requests and accepted connections, as Prometheus gets them."""
    names = ("nginx_connections_open", "nginx_requests_active", "nginx_connections_accepted_total")
    open_, active, accepted = (int(sum(scrape(address, name).values())) for name in names)
    return open_, active, accepted


@pytest.mark.nginx(
    listen="listen @LISTEN@; listen @LISTEN6@ ssl http2; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;",
    server="location / { proxy_pass http://@UP@; } location /status { stub_status; }",
)
def test_connections_and_running_requests(stage: Stage, tmp_path: Path) -> None:
    """nginx's stub_status counts the same, but not any more after a worker was killed."""
    nginx = stage.site.nginx
    host, port = stage.addresses["ipv4"]
    status = f"http://{host}:{port}/status"

    def nginx_says() -> tuple[int, int]:
        """Active connections and accepts; the question itself is one of each."""
        with urlopen(status) as answer:
            text = answer.read().decode()
        found = re.search(r"connections: (\d+).*requests\s+(\d+)", text, re.DOTALL)
        assert found is not None
        return int(found[1]), int(found[2])

    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = ["run", "--pid", str(nginx.pid), "--exporter", "line", "--output", tmp_path / "lines"]
    agent = AgentProcess(nginx.pid, tmp_path, [*command, "--metrics-listen", address])
    wait_until(lambda: nginx_says()[0] == 1, "no connection of earlier tests")
    _, accepts_before = nginx_says()
    idle = [stage.connect() for _ in range(5)] + [stage.connect("ipv6", trusting_tls()) for _ in range(4)]
    for connection in idle:
        assert connection.request("/idle").status == 200
    busy = [stage.connect() for _ in range(3)] + [stage.connect("ipv6", trusting_tls()) for _ in range(2)]
    for connection in busy:
        connection.send(request_bytes("GET", "/busy?delay_ms=60000"))
    streams = Http2Connection(stage.addresses["ipv6"], tls=True)
    streams.start([Http2Request("/stream?delay_ms=60000")] * 20)
    opened = len(idle) + len(busy) + 1
    wait_until(lambda: counts(address)[:2] == (opened, len(busy) + 20), "the connections and requests")
    active, accepts = nginx_says()
    assert active == opened + 1
    wait_until(lambda: counts(address)[2] >= accepts - accepts_before, "the accepted connections")
    seen_from_the_beginning = counts(address)[2] - (accepts - accepts_before)
    for connection in idle[:3]:
        connection.close()
    wait_until(lambda: counts(address)[0] == opened - 3, "three connections less")
    (worker,) = nginx.worker_pids()
    os.kill(worker, signal.SIGKILL)
    stage.site.expected_problems.append(f"{worker} exited on signal 9")
    stage.site.losses_max += len(busy) + 20  # lost_worker_gone
    wait_until(lambda: counts(address)[:2] == (0, 0), "no connection of the killed worker")
    active, accepts = nginx_says()
    assert active > 1
    wait_until(lambda: counts(address)[2] - seen_from_the_beginning == accepts - accepts_before, "the accepts")
    agent.stop()
    streams.close()

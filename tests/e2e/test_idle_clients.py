"""Ten thousand idle connections, and clients that send a byte from time to time."""

import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from e2e.http1_client import request_bytes
from e2e.kernel_maps import KernelMaps
from e2e.nginx_server import wait_until
from e2e.stage import Stage
from e2e.timing import Slack

WORKERS = 2
IDLE = 10_000
CONNECTIONS = IDLE + 100
SLOW = 200

SERVER = "keepalive_timeout 300; location / { return 200 ok; } location /app { proxy_pass http://@UP@; }"


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (IDLE + 1000, max(hard, IDLE + 1000)))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_sockets(stage: Stage) -> int:
    """In nginx's workers."""
    count = 0
    for descriptor in (each for pid in stage.site.nginx.worker_pids() for each in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # closed meanwhile
            count += str(descriptor.readlink()).startswith("socket:")
    return count


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.nginx(server=SERVER)
def test_idle_connections(stage: Stage) -> None:
    """Half of them have made a request. Whoever asks next is traced whole; what is closed is forgotten."""
    maps = KernelMaps(stage.site.agent)
    at_rest = open_sockets(stage)
    connections = []
    for number in range(IDLE):
        connections.append(stage.connect())
        if number % 2:
            assert connections[-1].request("/").status == 200
    wait_until(lambda: open_sockets(stage) == at_rest + IDLE, "nginx to accept all")
    assert len(maps.sockets()) >= IDLE
    assert maps.in_flight() == {"active_requests": 0, "attempts": 0}
    for connection in connections[:: IDLE // 100]:
        assert connection.request("/app").status == 200
    stage.exchanges(IDLE // 2 + 100, seconds=60)
    for connection in connections:
        connection.close()
    wait_until(lambda: open_sockets(stage) == at_rest, "nginx to close all", 20)
    assert maps.in_flight() == {"active_requests": 0, "attempts": 0}
    assert maps.stale_sockets() == set()


@pytest.mark.nginx(
    server="""
    client_header_timeout 2s;
    client_body_timeout 1s;
    lingering_timeout 1s;
    location / { return 200 ok; }
    location /app { proxy_pass http://@UP@; }
    """
)
def test_slowloris(stage: Stage) -> None:
    """Headers and bodies that come byte by byte, until nginx has had enough of it; the others are served meanwhile."""
    maps = KernelMaps(stage.site.agent)
    header = request_bytes("GET", "/app", {"User-Agent": "slow"})
    body = request_bytes("POST", "/app", {"Content-Length": "1000"})
    slow = [(stage.connect(), header if number % 2 else body, number) for number in range(SLOW)]
    sent = {number: len(body) if text is body else 0 for _, text, number in slow}
    for connection, text, number in slow:
        connection.send(text[: sent[number]])
    answered: set[int] = set()
    served = 0

    def all_answered() -> bool:
        nonlocal served
        served += stage.get("/").status == 200
        for connection, text, number in slow:
            if number not in answered:
                connection.socket.setblocking(False)
                try:
                    if text is header and sent[number] < len(header) - 2:
                        sent[number] += connection.socket.send(header[sent[number] : sent[number] + 1])
                    if connection.socket.recv(1000, socket.MSG_PEEK) is not None:
                        answered.add(number)
                except BlockingIOError:
                    pass
        return len(answered) == SLOW

    wait_until(all_answered, "nginx to give all of them up", 30)
    exchanges = stage.exchanges(SLOW + served, Slack(end_early=True, late_max_ms=200), 20)
    given_up = [each for each in exchanges if each.log["status"] == "408"]
    assert len(given_up) == SLOW
    assert {each.trace.server.attributes["nginx.termination"] for each in given_up} == {"timeout"}
    for connection, _, _ in slow:
        connection.close()
    wait_until(lambda: maps.in_flight() == {"active_requests": 0, "attempts": 0}, "nothing in flight")
    wait_until(lambda: maps.stale_sockets() == set(), "closed sockets to be forgotten")

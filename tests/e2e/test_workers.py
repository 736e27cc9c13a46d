"""Several workers at once, and workers that start and end."""

import os
import re
import signal
import threading
import urllib.request
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection, request_bytes
from e2e.nginx_server import free_ports, wait_until
from e2e.scenario import BEGINNINGS
from e2e.stage import Stage

WORKERS = 4
CLIENTS = 40
REQUESTS_EACH = 20
RELOADS = 3


@pytest.mark.nginx(
    listen="listen @LISTEN@ reuseport;",
    server="location / { return 200 ok; } location /app { proxy_pass http://@UP@; }",
)
def test_four_workers(stage: Stage) -> None:
    def client(number: int) -> None:
        with Http1Connection(stage.addresses["ipv4"]) as connection:
            for index in range(REQUESTS_EACH):
                target = f"/app/{number}/{index}" if index % 2 else f"/{number}/{index}"
                assert connection.request(target).status == 200

    run_all([threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)])
    exchanges = stage.exchanges(CLIENTS * REQUESTS_EACH)
    workers = {each.trace.server.attributes["nginx.worker.pid"] for each in exchanges}
    assert workers == set(stage.site.nginx.worker_pids())


@pytest.mark.nginx(server="location / { return 200 ok; } location /app { proxy_pass http://@UP@; }")
def test_reload_under_light_load(stage: Stage) -> None:
    """The workers of before finish what they have, the new ones are traced from their first request on."""
    stop = threading.Event()
    answered: list[int] = []

    def client() -> None:
        count = 0
        while not stop.is_set():
            assert stage.get(f"/app?delay_ms={count % 5 * 10}").status == 200
            assert stage.get("/").status == 200
            count += 2
        answered.append(count)

    def more_requests() -> None:
        done = len(stage.log.poll())
        wait_until(lambda: len(stage.log.poll()) > done + 50, "more requests")

    before = set(stage.site.nginx.worker_pids())
    clients = [threading.Thread(target=client) for _ in range(4)]
    for each in clients:
        each.start()
    try:
        for _ in range(RELOADS):
            more_requests()
            stage.site.nginx.reload()
        more_requests()
    finally:
        stop.set()
        for each in clients:
            each.join()
    exchanges = stage.exchanges(sum(answered))
    seen = {each.trace.server.attributes["nginx.worker.pid"] for each in exchanges}
    assert len(answered) == 4
    assert len(seen - before) >= RELOADS


def run_all(threads: list[threading.Thread]) -> None:
    for each in threads:
        each.start()
    for each in threads:
        each.join()


@pytest.mark.nginx(server="location /app { proxy_pass http://@UP@; proxy_buffering off; }")
def test_a_response_that_a_reload_cuts_off(stage: Stage) -> None:
    """worker_shutdown_timeout ends it: the server's fault, and when nginx says."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/app?bytes=1000&parts=2&part_ms=20000"))
        assert connection.socket.recv(1) == b"H"
        stage.site.nginx.reload()
        connection.read_until_closed()
    each = stage.exchange()
    assert float(each.log["request_time"]) > 4
    server, exchange = each.trace.server, each.trace.named("upstream exchange")[0]
    assert (server.attributes["nginx.termination"], server.error, exchange.error) == ("shutdown", "shutdown", None)


@pytest.mark.parametrize("beginnings_are", BEGINNINGS, ids=["by probe", "by socket"])
@pytest.mark.nginx(
    server="location / { return 200 ok; } location /app { proxy_pass http://@UP@; proxy_buffering off; }"
)
def test_worker_that_dies(stage: Stage, tmp_path: Path, beginnings_are: str) -> None:
    """Its request is in no log and no trace, and is counted; those of its successor are traced."""
    nginx = stage.site.nginx
    before = nginx.worker_pids()
    metrics = f"127.0.0.1:{free_ports(1)[0]}"
    environment = {**BEGINNINGS[beginnings_are], "OTEL_NGINX_EBPF_METRICS_LISTEN": metrics}
    agent = AgentProcess(nginx.pid, tmp_path, environment=environment)
    with stage.connect() as idle, stage.connect() as connection:
        assert idle.request("/idle").status == 200
        assert connection.request("/busy").status == 200
        connection.send(request_bytes("GET", "/app?bytes=10&parts=2&part_ms=2000"))
        assert connection.socket.recv(1) == b"H"
        # Two workers may log in another order than they answer.
        worker = int(next(line["pid"] for line in stage.lines(2) if line["request_uri"] == "/busy"))
        os.kill(worker, signal.SIGKILL)
        connection.read_until_closed()
    wait_until(lambda: len(set(nginx.worker_pids()) - set(before)) == 1, "the worker's successor")
    for index in range(20):
        assert stage.get(f"/app/{index}").status == 200
    assert len(stage.match(stage.lines(22), agent.poll)) == 22

    def is_counted() -> bool:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
            return re.search(rb'cause="lost_worker_gone".*} 1', answer.read()) is not None

    wait_until(is_counted, "the count")
    agent.stop()
    assert "lost 1 (lost_worker_gone 1)" in agent.stderr()
    stage.exchanges(22)
    stage.site.expected_problems.append(f"{worker} exited on signal 9")
    stage.site.losses_max += 1  # the request that was in flight, once the agent has noticed

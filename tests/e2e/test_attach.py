"""Attaching and detaching: a second agent on a working nginx that is traced already."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from e2e.agent_process import OPT_IN, PROGRAM, AgentProcess, Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.nginx_server import NGINX, NginxServer, free_ports
from e2e.stage import Stage

WORKERS = 2
HTTP = "upstream @NAME@ { server @UP@; keepalive 4; }"
SERVER = """
    location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }
    location /tunnel {
        proxy_pass http://@UP@;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection upgrade;
    }
"""


def open_tunnel(stage: Stage) -> Http1Connection:
    """A request that lasts until the connection is closed."""
    connection = stage.connect()
    connection.send(request_bytes("GET", "/tunnel", {"Upgrade": "echo", "Connection": "Upgrade"}))
    assert connection.read_response().status == 101
    return connection


def echo(tunnel: Http1Connection) -> bytes:
    tunnel.send(b"ping")
    return tunnel.socket.recv(10)


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_attach_while_requests_run(stage: Stage, tmp_path: Path) -> None:
    """A request that began before is not traced and is counted; those after it are, whole, on old connections."""
    with stage.connect() as connection:
        assert connection.request("/before").status == 200
        tunnel = open_tunnel(stage)
        agent = AgentProcess(stage.site.nginx.pid, tmp_path)
        assert echo(tunnel) == b"ping"
        tunnel.close()
        assert connection.request("/after?delay_ms=50").status == 200
        assert connection.request("/last").status == 200
    lines = stage.lines(4)
    after = [line for line in lines if line["request_uri"].startswith(("/after", "/last"))]
    exchanges = stage.match(after, agent.poll)
    agent.stop()
    assert len(agent.traces) == 2
    assert "began_before_attach 1" in agent.stderr()
    reused = ["downstream read", "upstream exchange", "downstream write"]
    assert [each.trace.outline() for each in exchanges] == [reused, reused]
    stage.exchanges(4)


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_detach_while_a_request_runs(stage: Stage, tmp_path: Path) -> None:
    """The agent goes at once, and nginx and the request go on."""
    agent = AgentProcess(stage.site.nginx.pid, tmp_path)
    tunnel = open_tunnel(stage)
    agent.stop(signal.SIGTERM)
    assert agent.traces == []
    assert echo(tunnel) == b"ping"
    tunnel.close()
    stage.exchange()


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_killed_agent(stage: Stage, tmp_path: Path) -> None:
    """Nothing of it stays behind: nginx answers, and the next agent finds all in order."""
    agent = AgentProcess(stage.site.nginx.pid, tmp_path)
    assert stage.get("/").status == 200
    agent.kill()
    assert stage.get("/").status == 200
    (tmp_path / "successor").mkdir()
    successor = AgentProcess(stage.site.nginx.pid, tmp_path / "successor")
    assert stage.get("/?last").status == 200
    stage.match(stage.lines(3)[2:], successor.poll)
    successor.stop()
    assert len(successor.traces) == 1
    stage.exchanges(3)


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_named_by_binary_or_worker(stage: Stage, tmp_path: Path) -> None:
    """A path stands for every process that runs it; a worker's pid for the nginx it belongs to."""
    nginx = stage.site.nginx
    names = {"binary": ["--binary", str(NGINX)], "worker": ["--pid", str(nginx.worker_pids()[0])]}
    agents = {}
    for name, arguments in names.items():
        output = tmp_path / name / "traces.jsonl"
        output.parent.mkdir()
        arguments = ["run", *arguments, "--exporter", "json", "--output", str(output)]
        agents[name] = AgentProcess(nginx.pid, output.parent, arguments)
    for _ in range(10):
        assert stage.get("/").status == 200
    lines = stage.lines(10)
    for agent in agents.values():
        stage.match(lines, agent.poll)
        agent.stop()
    assert len(agents["worker"].traces) == 10
    stage.exchanges(10)


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_record_and_replay(stage: Stage, tmp_path: Path) -> None:
    """A capture file, replayed without privileges, gives the traces that `run` gives at once."""
    capture = tmp_path / "requests.capture"
    recorder = AgentProcess(
        stage.site.nginx.pid, tmp_path, ["record", "--pid", str(stage.site.nginx.pid), "-o", capture]
    )
    for index in range(5):
        assert stage.get(f"/{index}?bytes={index}").status == 200
    lines = stage.lines(5)
    recorder.stop()
    replayed = subprocess.run(
        [PROGRAM, "replay", "--exporter", "json", capture],
        env={**os.environ, **OPT_IN},
        capture_output=True,
        check=True,
        timeout=30,
    )
    traces = [Trace.parse(line) for line in replayed.stdout.splitlines()]
    again = stage.match(lines, lambda: traces)
    at_once = stage.exchanges(5)
    assert len(traces) == 5
    for one, other in zip(again, at_once, strict=True):
        assert one.trace.outline() == other.trace.outline()
        assert json.dumps(one.trace.server.attributes) == json.dumps(other.trace.server.attributes)


@pytest.mark.nginx(http=HTTP, server=SERVER)
def test_other_nginx_of_the_same_binary(stage: Stage, public_directory: Path) -> None:
    """Its workers hit the same probes, but it was not named: the agent has no trace of it."""
    prefix = public_directory / "other"
    prefix.mkdir()
    port = free_ports(1)[0]
    other = NginxServer(
        prefix,
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{stage.site.upstreams['ipv4']}; }} }}",
    )
    other.start([("127.0.0.1", port)])
    try:
        with Http1Connection(("127.0.0.1", port)) as connection:
            for index in range(10):
                assert connection.request(f"/{index}").status == 200
                assert stage.get(f"/{index}").status == 200
        workers = other.worker_pids()
    finally:
        other.stop()
    stage.exchanges(10)
    traced = {trace.server.attributes["nginx.worker.pid"] for trace in stage.site.agent.poll()}
    assert not traced & set(workers)

"""Tracing exceeds a limit that the user set: the probes are detached, nginx continues, and the probes return later."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from e2e.agent_process import AgentProcess
from e2e.kernel_maps import links
from e2e.nginx_server import free_ports, wait_until
from e2e.stage import Stage, key_of_log, key_of_trace
from e2e.steady_load import SteadyLoad

SERVER = "keepalive_requests 1000000; location / { return 200 ok; }"
RATE = 500
SECONDS = 60


@contextmanager
def attached(stage: Stage, directory: Path, *options: object) -> Iterator[AgentProcess]:
    output = directory / "traces.jsonl"
    arguments = [
        "run",
        "--pid",
        stage.site.nginx.pid,
        "--exporter",
        "json",
        "--output",
        output,
        "--reattach-seconds",
        1,
    ]
    agent = AgentProcess(stage.site.nginx.pid, directory, [str(each) for each in (*arguments, *options)])
    try:
        yield agent
    except BaseException:
        agent.kill()
        raise
    agent.stop()


def load(stage: Stage) -> SteadyLoad:
    return SteadyLoad(["http://{}:{}/".format(*stage.addresses["ipv4"])], SECONDS * RATE, RATE)


def says(agent: AgentProcess, pattern: str, times: int = 1) -> Callable[[], bool]:
    return lambda: len(re.findall(pattern, agent.stderr(), re.MULTILINE)) >= times


def measured(port: int, name: str, label: str = "") -> list[float]:
    """What a metric is; empty: nothing was measured yet."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and label in line]


def hits(port: int, probe: str) -> list[float]:
    return measured(port, "otel_nginx_ebpf_probe_hits_per_second", probe)


@pytest.mark.nginx(server=SERVER)
def test_cost(stage: Stage, tmp_path: Path) -> None:
    """No program takes less than a tenth of a microsecond: it detaches, comes back, detaches for longer."""
    with attached(stage, tmp_path, "--max-cost-per-request", "0.1us") as agent, load(stage) as running:
        probes = links(agent)
        assert probes
        wait_until(says(agent, r"took [\d.]+ µs a request, more than the 0.1 µs allowed; detached for 1 s"), "it", 30)
        wait_until(lambda: not probes & links(agent), "the probes to go")
        detached = len(stage.log.poll())
        wait_until(lambda: len(stage.log.poll()) > detached + 20, "nginx to go on")
        wait_until(says(agent, "^ready", 2), "the probes to be back", 30)
        back = len(stage.log.poll())
        wait_until(says(agent, "detached for 2 s"), "the second time", 30)
        assert not running.is_over
    logged = [key_of_log(line) for line in stage.log.poll()]
    traced = [key_of_trace(trace) for trace in agent.traces]
    assert len(set(traced)) == len(traced)
    assert set(traced) <= set(logged)
    assert set(traced) & set(logged[:detached])
    assert set(traced) & set(logged[back:])
    stage.match(stage.log.lines, stage.site.agent.poll)


@pytest.mark.nginx(server=SERVER)
def test_loss(stage: Stage, tmp_path: Path) -> None:
    """Nobody reads the ring buffer any more."""
    limit = ("--max-loss", "0.01", "--ring-buffer-mib", "1")
    with attached(stage, tmp_path, *limit) as agent, load(stage) as running:
        (emitter,) = set(agent.pids) - {agent.pid}
        os.kill(emitter, signal.SIGSTOP)
        try:
            wait_until(says(agent, r"[\d.]+% of the traces were lost, more than the 1.00% allowed; detached"), "it", 60)
        finally:
            os.kill(emitter, signal.SIGCONT)
        assert not running.is_over
    stage.match(stage.log.poll(), stage.site.agent.poll)


@pytest.mark.nginx(server=SERVER)
def test_within_the_limits(stage: Stage, tmp_path: Path) -> None:
    """It stays, and its metrics tell what was measured."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    limits = ("--max-cost-per-request", "1s", "--max-loss", "1", "--metrics-listen", address)
    with attached(stage, tmp_path, *limits) as agent, load(stage):
        # A measurement begins before the first request does; another comes in ten seconds.
        wait_until(lambda: sum(hits(port, "ngx_http_free_request")) > 0, "a measurement", 30)
        (cost,) = measured(port, "otel_nginx_ebpf_request_cost_seconds")
        # Of each request at least a read and a write.
        assert sum(hits(port, "sys_exit")) > 2 * sum(hits(port, "ngx_http_free_request"))
        assert measured(port, "otel_nginx_ebpf_detachments_total") == [0]
    assert 1e-6 < cost < 1e-3
    assert "detached" not in agent.stderr()
    stage.match(stage.log.poll(), stage.site.agent.poll)

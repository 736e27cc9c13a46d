"""The agent ends, is killed or stalls under load: nginx does not notice, and every lost request is counted."""

import signal
import statistics
import time
from pathlib import Path

import pytest
from unit.otlp_receiver import GrpcReceiver

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.kernel_maps import is_there, links
from e2e.nginx_server import PATIENCE, wait_until
from e2e.stage import Stage, key_of_log, key_of_trace
from e2e.steady_load import SteadyLoad

WORKERS = 2
SERVER = "keepalive_requests 1000000; location / { return 200 ok; }"
RATE = 1000
"""Requests a second."""


def url(stage: Stage) -> str:
    return "http://{}:{}/".format(*stage.addresses["ipv4"])


def wait_for_lines(stage: Stage, count: int) -> None:
    wait_until(lambda: len(stage.log.poll()) >= count, f"{count} log lines", 30)


@pytest.mark.nginx(server=SERVER)
def test_sigterm_under_load(stage: Stage, tmp_path: Path) -> None:
    """All that was completed before is delivered in time, though its batch was neither full nor due."""
    nginx = stage.site.nginx
    with GrpcReceiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "100000",
        }
        agent = AgentProcess(nginx.pid, tmp_path, ["run", "--pid", str(nginx.pid)], environment)
        with SteadyLoad([url(stage)], 6 * RATE, RATE) as load:
            wait_for_lines(stage, 2 * RATE)
            receiver.delay_s = 1  # a slow collector
            completed = len(stage.log.poll())
            assert len(receiver.trace_ids) < completed
            agent.stop(signal.SIGTERM)
            assert not load.is_over
            load.wait(30)
        wait_for_lines(stage, 6 * RATE)
        traced = {
            (each["nginx.connection.id"], each["nginx.connection.requests"], str(each["nginx.worker.pid"]))
            for each in receiver.attributes
        }
    logged = [key_of_log(line) for line in stage.log.lines]
    assert set(logged[:completed]) <= traced <= set(logged)
    assert len(receiver.trace_ids) == len(traced) < len(logged)
    assert f"received {len(traced)}, exported {len(traced)}, lost 0" in agent.stderr()
    stage.exchanges(len(logged))


@pytest.mark.nginx(server=SERVER)
def test_sigkill_under_load(stage: Stage, tmp_path: Path) -> None:
    """Its probes go with it; no request fails; the next agent traces from its first moment on, and nothing twice."""
    nginx = stage.site.nginx
    workers = nginx.worker_pids()
    agent = AgentProcess(
        nginx.pid, tmp_path, ["run", "--pid", str(nginx.pid), "--exporter", "json", "--output", "/dev/null"]
    )
    probes = links(agent)
    assert all(map(is_there, probes))
    with SteadyLoad([url(stage)], 6 * RATE, RATE) as load:
        wait_for_lines(stage, RATE)
        agent.signal_all(signal.SIGKILL)
        agent.kill()
        killed = len(stage.log.poll())
        wait_until(lambda: not any(map(is_there, probes)), "the kernel to forget the probes")
        wait_for_lines(stage, killed + RATE)
        successor = AgentProcess(nginx.pid, tmp_path)
        ready = len(stage.log.poll())
        load.wait(30)
    wait_for_lines(stage, 6 * RATE)
    successor.stop()
    assert nginx.worker_pids() == workers
    logged = [key_of_log(line) for line in stage.log.lines]
    traced = [key_of_trace(trace) for trace in successor.traces]
    assert set(logged[ready:]) <= set(traced) <= set(logged[killed:])
    assert len(set(traced)) == len(traced)
    stage.exchanges(6 * RATE)


@pytest.mark.nginx(server=SERVER)
def test_two_agents_under_load(stage: Stage, tmp_path: Path) -> None:
    """Both see all; and the one goes without the other noticing."""
    agents = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        agents.append(AgentProcess(stage.site.nginx.pid, tmp_path / name))
    with SteadyLoad([url(stage)], 2 * RATE, RATE) as load:
        load.wait(30)
    lines = stage.lines(2 * RATE)
    stage.match(lines, agents[0].poll)
    agents[0].stop()
    with SteadyLoad([url(stage)], RATE, RATE) as load:
        load.wait(30)
    stage.match(stage.lines(3 * RATE), agents[1].poll)
    agents[1].stop()
    assert f"received {2 * RATE}, exported {2 * RATE}, lost 0" in agents[0].stderr()
    assert f"received {3 * RATE}, exported {3 * RATE}, lost 0" in agents[1].stderr()
    stage.exchanges(3 * RATE)


def latencies(stage: Stage, seconds: float, rate: int) -> list[float]:
    """Of one request after another with pauses, seconds each: as fast as it can go it would be the load itself."""
    taken = []
    with Http1Connection(stage.addresses["ipv4"]) as connection:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            assert connection.request("/").status == 200
            taken.append(time.perf_counter() - began)
            time.sleep(1 / rate)
    return taken


# What a minute at the full rate would leave in the log takes a gigabyte to read.
@pytest.mark.parametrize(
    ("stalls_s", "rate"), [((3.0, 3.0, 3.0), RATE), ((60.0,), RATE // 5)], ids=["again_and_again", "for_a_minute"]
)
@pytest.mark.nginx(server=SERVER)
def test_stalled_agent(stage: Stage, tmp_path: Path, stalls_s: tuple[float, ...], rate: int) -> None:
    """While it does not run nginx answers as fast as before; afterwards it has what fitted, and counts the rest."""
    arguments = ["run", "--pid", str(stage.site.nginx.pid), "--exporter", "json", "--output"]
    output = tmp_path / "traces.jsonl"
    agent = AgentProcess(stage.site.nginx.pid, tmp_path, [*arguments, str(output), "--ring-buffer-mib", "1"])
    running: list[float] = []
    stalled: list[float] = []
    total = int(sum(1 + seconds for seconds in stalls_s)) * rate // 20 * 20
    with SteadyLoad([url(stage)], total, rate) as load:
        for seconds in stalls_s:
            running += latencies(stage, 1, rate)
            agent.signal_all(signal.SIGSTOP)
            try:
                stalled += latencies(stage, seconds, rate)
            finally:
                agent.signal_all(signal.SIGCONT)
        load.wait(60)
    wait_for_lines(stage, total + len(running) + len(stalled))
    agent.stop()
    logged = [key_of_log(line) for line in stage.log.lines]
    traced = [key_of_trace(trace) for trace in agent.traces]
    assert len(set(traced)) == len(traced)
    assert set(traced) <= set(logged)
    lost = len(logged) - len(traced)
    assert lost > rate * max(stalls_s) / 2
    assert (
        f"received {len(traced)}, exported {len(traced)}, lost {lost} (lost_ring_buffer_full {lost})" in agent.stderr()
    )
    medians = [statistics.median(each) for each in (running, stalled)]
    assert medians[1] < 1.5 * medians[0] + 100e-6 * PATIENCE, f"medians running and stalled: {medians} s"

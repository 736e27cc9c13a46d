"""A collector that stops under load and comes back: every request, and its log record, is delivered."""

from pathlib import Path

import pytest
from unit.otlp_receiver import GrpcReceiver, Received

from e2e.agent_process import AgentProcess
from e2e.nginx_server import wait_until
from e2e.stage import Stage, key_of_log
from e2e.steady_load import SteadyLoad

WORKERS = 2
RATE, SECONDS = 1000, 8


def record_ids(*receivers: Received) -> set[tuple[bytes, bytes]]:
    return {(each.trace_id, each.span_id) for receiver in receivers for each in receiver.log_records}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.nginx(server="keepalive_requests 1000000; location / { return 200 ok; }")
def test_outage_under_load(stage: Stage, where: str, tmp_path: Path) -> None:
    """On disk with less memory than the outage's traces take. `make soak` has longer ones."""
    queue = stage.site.prefix / "queue"  # where another user may go
    options = ["--queue-dir", queue, "--queue-mib", "1"] if where == "disk" else []
    with GrpcReceiver() as first:
        command = ["run", "--pid", str(stage.site.nginx.pid), "--batch-delay-ms", "200", "--logs", "access", *options]
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{first.port}"}
        agent = AgentProcess(stage.site.nginx.pid, tmp_path, command, environment)
        load = SteadyLoad(["http://{}:{}/".format(*stage.addresses["ipv4"])], RATE * SECONDS, RATE)
        wait_until(lambda: len(first.trace_ids) > RATE, "the first messages", 30)
    with load:
        wait_until(lambda: "collector: UNAVAILABLE" in agent.stderr(), "the agent to miss its collector", 30)
        load.wait(60)
    wait_until(lambda: len(stage.log.poll()) == RATE * SECONDS, "nginx's log lines")
    assert not queue.exists() or (list(queue.glob("*.otlp.gz")) and list(queue.glob("logs/*.otlp.gz")))
    with GrpcReceiver(first.port) as second:
        wait_until(lambda: len(set(first.trace_ids + second.trace_ids)) == RATE * SECONDS, "the rest", 60)
        wait_until(lambda: len(record_ids(first, second)) == RATE * SECONDS, "the rest of the log records", 60)
        agent.stop()
    assert len(second.trace_ids) > RATE
    delivered = {
        (each["nginx.connection.id"], each["nginx.connection.requests"], str(each["nginx.worker.pid"]))
        for each in first.attributes + second.attributes
    }
    assert delivered == set(map(key_of_log, stage.log.lines))
    counts = f"received {RATE * SECONDS}, exported {RATE * SECONDS}, lost 0"
    assert f"{counts}; log records: {counts}" in agent.stderr()
    assert record_ids(first, second) == {(each.trace_id, each.span_id) for each in first.roots + second.roots}
    stage.exchanges(RATE * SECONDS)

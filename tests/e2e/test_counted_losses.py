"""What does not fit is counted by its cause: every request that nginx logged is a trace or a loss."""

import re
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import wait_until
from e2e.stage import Stage

MOST = 64
"""The least that --max-active-requests takes."""
AT_ONCE = 100


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_more_requests_at_once_than_there_is_room_for(stage: Stage, tmp_path: Path) -> None:
    pid = str(stage.site.nginx.pid)
    command = ["run", "--pid", pid, "--exporter", "line", "--output", "/dev/null", "--max-active-requests", str(MOST)]
    agent = AgentProcess(stage.site.nginx.pid, tmp_path, command)
    connections = [Http1Connection(stage.addresses["ipv4"]) for _ in range(AT_ONCE)]
    for connection in connections:
        connection.send(b"GET /?delay_ms=3000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for connection in connections:
        assert connection.read_response().status == 200
        connection.close()
    wait_until(lambda: len(stage.log.poll()) == AT_ONCE, "nginx's log lines")
    agent.stop()
    # Their ends are counted as those of requests that began before it attached, which are no losses.
    counts = re.search(r"received (\d+), exported (\d+), lost (\d+) .*lost_active_requests_full (\d+)", agent.stderr())
    assert counts, agent.stderr()
    assert list(map(int, counts.groups())) == [MOST, MOST, AT_ONCE - MOST, AT_ONCE - MOST]
    stage.exchanges(AT_ONCE)

"""More requests at once than `--max-active-requests` has room for: each request still has a trace."""

from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import wait_until
from e2e.stage import Stage
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

"""Every line of nginx's error log is one log record, also if it is for no request."""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.otlp_receiver import GrpcReceiver

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NginxServer, free_ports, wait_until

HTTP = """
    server {{
        listen 127.0.0.1:{port};
        access_log off;
        location / {{ root {prefix}; }}
        location /dead/ {{ proxy_pass http://{dead}; }}
    }}
"""
LINE = re.compile(r"^\d{4}/\d\d/\d\d [\d:]{8} \[(\w+)\] \d+#\d+: (?:\*\d+ )?(.*)$", re.MULTILINE)


@pytest.fixture
def nginx(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[tuple[NginxServer, int]]:
    prefix = public_directory / "logs"
    prefix.mkdir()
    (port,) = free_ports(1)
    http = HTTP.format(port=port, prefix=prefix, dead=upstream_addresses["dead1"])
    server = NginxServer(prefix, http, main=f"error_log {prefix}/all.log info;")
    server.start([("127.0.0.1", port)])
    yield server, port
    server.stop()


def lines(log: Path) -> list[tuple[str, str]]:
    """Return level and text of all lines."""
    return [(match[1], match[2]) for match in LINE.finditer(log.read_text())]


def test_every_line_is_a_record(nginx: tuple[NginxServer, int], tmp_path: Path) -> None:
    server, port = nginx
    log = server.prefix / "all.log"
    configuration = (server.prefix / "nginx.conf").read_text()
    with GrpcReceiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}"}
        command = ["run", "--pid", str(server.pid), "--logs", "--log-level", "info", "--batch-delay-ms", "100"]
        agent = AgentProcess(server.pid, tmp_path, command, environment)
        try:
            before = len(lines(log))
            for _ in range(3):
                with Http1Connection(("127.0.0.1", port)) as connection:
                    assert [connection.request(target).status for target in ("/missing", "/dead/")] == [404, 502]
            wait_until(lambda: log.read_text().count("closed keepalive connection") == 3, "nginx to see the end")
            server.reload()
            wait_until(lambda: "exited with code 0" in log.read_text(), "the old worker's end")
            (server.prefix / "nginx.conf").write_text("nonsense;\n" + configuration)
            os.kill(server.pid, signal.SIGHUP)
            wait_until(lambda: 'unknown directive "nonsense"' in log.read_text(), "nginx to refuse it")
            os.kill(server.worker_pids()[0], signal.SIGKILL)
            wait_until(lambda: "exited on signal 9" in log.read_text(), "nginx to see the worker's end")
            wait_until(lambda: len(server.worker_pids()) == 1, "another worker")
            with Http1Connection(("127.0.0.1", port)) as connection:
                connection.request("/missing")
            wait_until(lambda: log.read_text().count("closed keepalive connection") == 4, "nginx to see the end")
            logged = lines(log)[before:]
            wait_until(lambda: len(receiver.log_records) >= len(logged), f"{len(logged)} records of {logged}")
        finally:
            agent.stop()
    of_requests = [(level, text.partition(", client: ")[0]) for level, text in logged if ", request: " in text]
    others = [(level, text) for level, text in logged if ", request: " not in text]
    traced = [record for record in receiver.log_records if record.trace_id]
    untraced = [record for record in receiver.log_records if not record.trace_id]
    assert len(of_requests) == 7
    assert Counter((each.severity_text, each.body.string_value) for each in traced) == Counter(of_requests)
    assert Counter((each.severity_text, each.body.string_value) for each in untraced) == Counter(others)
    assert {each.trace_id for each in traced} <= {span.trace_id for span in receiver.spans}
    assert f"log records: received {len(logged)}, exported {len(logged)}, lost 0" in agent.stderr()
    (resource,) = {
        tuple((pair.key, pair.value.string_value) for pair in group.resource.attributes)
        for request in receiver.log_requests
        for group in request.resource_logs
    }
    assert "service.instance.id" in dict(resource)

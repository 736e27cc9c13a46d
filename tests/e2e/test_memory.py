"""The memory of the two long-lived processes: only the libraries that their work needs, and not much memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.otlp_receiver import GrpcReceiver

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NginxServer, free_ports, wait_until

NGINX_HTTP = "server { listen 127.0.0.1:@PORT@; keepalive_requests 100000; location / { return 200 ok; } }"
REQUESTS = 2000

# Shared objects that each brings; elftools, typer and rich have none, and come with one of these.
FOREIGN = ("_pydantic_core", "libcapstone", "libbcc", "libLLVM", "libclang")
OURS = {"run": "cygrpc", "record": "libpython|python3"}
# Together; what both map counts half for each.
PROPORTIONAL_MIB_MAX = 70
KINDS = ("Rss", "Pss")


class Process:
    def __init__(self, pid: int) -> None:
        self._directory = Path(f"/proc/{pid}")

    @property
    def mapped(self) -> str:
        return (self._directory / "maps").read_text()

    def memory_mib(self, kind: str) -> float:
        """Resident (Rss), or with each page shared out among those who map it (Pss)."""
        rollup = (self._directory / "smaps_rollup").read_text()
        (kib,) = re.findall(rf"^{kind}: +(\d+) kB$", rollup, re.MULTILINE)
        return int(kib) / 1024

    @property
    def command(self) -> list[str]:
        return (self._directory / "cmdline").read_text().split("\0")[:-1]

    @property
    def name(self) -> str:
        return (self._directory / "comm").read_text().strip()


@pytest.fixture
def port() -> int:
    (found,) = free_ports(1)
    return found


@pytest.fixture
def nginx(tmp_path: Path, port: int) -> Iterator[NginxServer]:
    server = NginxServer(tmp_path, NGINX_HTTP.replace("@PORT@", str(port)))
    server.start([("127.0.0.1", port)])
    yield server
    server.stop()
    assert server.problems() == []


def load(port: int) -> None:
    with Http1Connection(("127.0.0.1", port)) as connection:
        for number in range(REQUESTS):
            assert connection.request(f"/{number}").status == 200


@pytest.mark.parametrize("command", ["run", "record"])
def test_what_stays(
    command: str, nginx: NginxServer, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, "--pid", str(nginx.pid)]
    if command == "record":
        arguments += ["-o", str(tmp_path / "day.capture")]
    with GrpcReceiver() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.port}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        agent = AgentProcess(nginx.pid, tmp_path, arguments, environment)
        processes = {"supervisor": Process(agent.pid), "emitter": Process(agent.emitter_pid)}
        try:
            load(port)
            if command == "run":
                wait_until(lambda: len(receiver.trace_ids) == REQUESTS, "all traces")
            found = {
                f"{name} {kind}": process.memory_mib(kind) for name, process in processes.items() for kind in KINDS
            }
            mapped = {name: process.mapped for name, process in processes.items()}
            assert {process.name for process in processes.values()} == {"otel-nginx-ebpf"}
            assert processes["supervisor"].command[-len(arguments) :] == arguments
        finally:
            agent.stop()
    with capsys.disabled():
        print(f"\n{command}, MiB:", ", ".join(f"{what} {mib:.1f}" for what, mib in found.items()))
    assert f"received {REQUESTS}, exported {REQUESTS}, lost 0" in agent.stderr()
    assert re.search(OURS[command], mapped["emitter"])
    assert [name for name in FOREIGN if name in mapped["supervisor"] + mapped["emitter"]] == []
    assert "cygrpc" not in mapped["supervisor"]
    assert sum(mib for what, mib in found.items() if what.endswith("Pss")) < PROPORTIONAL_MIB_MAX

"""Runs an nginx with its own binary, and agents that find it."""

from pathlib import Path
from typing import Protocol

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import AccessLog, NginxServer, free_ports, wait_until


class PrivateNginx:
    """An nginx with its own binary: a copy of the machine's, with another inode."""

    def __init__(self, directory: Path, name: str, binary: Path, command: tuple[str, ...] = (), main: str = "") -> None:
        self.address = ("127.0.0.1", free_ports(1)[0])
        self.binary = binary
        prefix = directory / name
        prefix.mkdir()
        http = f"server {{ listen 127.0.0.1:{self.address[1]}; access_log logs/all.log json; return 200 {name}; }}"
        self.server = NginxServer(prefix, http, 2, main, (*command, binary))
        self.log = AccessLog(prefix / "logs" / "all.log")
        self.running = False

    def start(self) -> None:
        self.server.start([self.address])
        self.running = True

    def stop(self) -> None:
        self.running = False
        self.server.stop()

    def get(self, target: str) -> None:
        with Http1Connection(self.address) as connection:
            assert connection.request(target).status == 200


class StartAgent(Protocol):
    def __call__(self, *arguments: str | Path, name: str = "agent") -> AgentProcess: ...


def paths(agent: AgentProcess) -> list[str]:
    return sorted(trace.server.attributes["url.path"] for trace in agent.poll())


def wait_for_paths(agent: AgentProcess, *expected: str) -> None:
    try:
        wait_until(lambda: paths(agent) == sorted(expected), f"traces of {expected}")
    except TimeoutError:
        raise AssertionError(f"{paths(agent)}, not {sorted(expected)}\n{agent.stderr()}") from None


def wait_for_ready_lines(agent: AgentProcess, count: int) -> None:
    wait_until(lambda: agent.stderr().count("ready: nginx") == count, f"{count} ready lines", 20)

"""`run --dry-run` on a real nginx."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.agent_process import PROGRAM, AgentProcess
from e2e.nginx_server import NGINX, NginxServer, free_ports

_BREAKPOINT = 0xCC


@pytest.fixture
def start(public_directory: Path) -> Iterator[Callable[..., NginxServer]]:
    """Starts an nginx that runs a copy of the machine's, in a directory of the given name, changed as wanted."""
    servers: list[NginxServer] = []
    directories: list[Path] = []

    def start_copy(name: str, change: Callable[[bytes], bytes] = bytes) -> NginxServer:
        directory = public_directory / name
        directories.append(directory)
        (directory / "prefix").mkdir(parents=True)
        binary = directory / "nginx"
        binary.write_bytes(change(NGINX.read_bytes()))
        binary.chmod(0o755)
        address = ("127.0.0.1", free_ports(1)[0])
        http = f"server {{ listen {address[0]}:{address[1]}; }}"
        server = NginxServer(directory / "prefix", http, workers=2, command=(binary,))
        server.start([address])
        servers.append(server)
        return server

    yield start_copy
    for server in servers:
        server.stop()
    for directory in directories:
        shutil.rmtree(directory)


def run(*command: str | Path, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "XDG_", "COLUMNS"))}
    ended = subprocess.run(
        command, env={**inherited, **(environment or {})}, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in ended.stderr
    return ended


def instruction_bytes(server: NginxServer, binary: Path) -> set[int]:
    """What each worker has in its memory at the entry of the function that begins a request."""
    symbols = run("readelf", "--wide", "--dyn-syms", binary).stdout
    entry = re.search(r"([0-9a-f]{16}) .* ngx_http_create_request$", symbols, re.MULTILINE)
    assert entry
    found = set()
    for pid in server.worker_pids():
        base = int(Path(f"/proc/{pid}/maps").read_text().split("-")[0], 16)
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(base + int(entry[1], 16))
            found.update(struct.unpack("B", memory.read(1)))
    return found


def test_a_dry_run_says_ready_and_leaves_nothing(start: Callable[..., NginxServer], tmp_path: Path) -> None:
    server = start("dry")
    binary = server.prefix.parent / "nginx"
    before = instruction_bytes(server, binary)
    assert _BREAKPOINT not in before
    agent = AgentProcess(server.pid, tmp_path)
    assert instruction_bytes(server, binary) == {_BREAKPOINT}, "this shows whether a probe is there"
    agent.stop()
    assert instruction_bytes(server, binary) == before

    output = tmp_path / "dry"
    ended = run(PROGRAM, "run", "--dry-run", "--pid", str(server.pid), "--exporter", "json", "--output", output)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.startswith(f"ready: nginx 1.22.1 (pid {server.pid}), 2 workers, sites ")
    assert ended.stderr.count("\n") == 1
    assert not output.exists()
    assert instruction_bytes(server, binary) == before


def test_a_dry_run_says_why_not(start: Callable[..., NginxServer]) -> None:
    server = start("refused", lambda raw: raw.replace(b"nginx/1.22.1", b"nginx/9.22.1"))
    ended = run(PROGRAM, "run", "--dry-run", "--pid", str(server.pid))
    assert ended.returncode == 2
    assert "the struct layout of nginx 9.22.1" in ended.stderr
    assert "ready" not in ended.stderr

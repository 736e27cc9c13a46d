"""Two instances of one nginx binary. One stops matching its layout; the other is traced without a break."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.layout_facts import Worker
from e2e.nginx_server import NGINX, NginxServer, free_ports, wait_until


class Instance:
    def __init__(self, directory: Path, binary: Path, name: str) -> None:
        prefix = directory / name
        prefix.mkdir()
        self.address = ("127.0.0.1", free_ports(1)[0])
        http = f"server {{ listen 127.0.0.1:{self.address[1]}; access_log off; return 200 {name}; }}"
        self.server = NginxServer(prefix, http, command=(binary,))
        self.server.start([self.address])

    def get(self, target: str) -> None:
        with Http1Connection(self.address) as connection:
            assert connection.request(target).status == 200

    def write_over(self) -> None:
        """Overwrites the address of the server's name, which has no length here, so that nginx never reads it."""
        (pid,) = self.server.worker_pids()
        worker = Worker(pid)
        with Http1Connection(self.address) as connection:
            connection.send(b"GET /half")
            wait_until(lambda: bool(worker.main_requests()), "a request to find the server by")
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:

                def pointer(at: int) -> int:
                    return int.from_bytes(os.pread(memory.fileno(), 8, at), "little")

                (request,) = worker.main_requests()
                server = pointer(pointer(request + worker.structs["ngx_http_request_s"]["srv_conf"]))
                assert worker.contradicted(request) == set()
                name = server + worker.structs["ngx_http_core_srv_conf_t"]["server_name"]
                assert pointer(name) == 0
                os.pwrite(memory.fileno(), bytes(8), name + 8)
                assert worker.contradicted(request) == {"configuration"}
        worker.close()


@pytest.fixture
def instances(public_directory: Path) -> Iterator[tuple[Instance, Instance]]:
    directory = public_directory / "doubted"
    directory.mkdir()
    binary = directory / "nginx"
    shutil.copy(NGINX, binary)
    first, second = Instance(directory, binary, "first"), Instance(directory, binary, "second")
    try:
        yield first, second
    finally:
        first.server.stop()
        second.server.stop()
        shutil.rmtree(directory)


def test_the_other_nginx_of_a_binary_is_traced_on(instances: tuple[Instance, Instance], tmp_path: Path) -> None:
    first, second = instances
    binary = first.server.prefix.parent / "nginx"
    output = tmp_path / "traces.jsonl"
    command = ["run", "--binary", binary, "--exporter", "json", "--output", output]
    tmp_path.chmod(0o755)
    agent = AgentProcess(first.server.pid, tmp_path, command)

    def traced() -> set[str]:
        return {trace.server.attributes["url.path"] for trace in agent.poll() if "url.path" in trace.server.attributes}

    try:
        first.get("/before")
        second.get("/before-second")
        wait_until(lambda: {"/before", "/before-second"} <= traced(), "traces of both")
        first.write_over()
        # The hundredth request that agrees was the last one to be looked at: these are not so many.
        for number in range(5):
            first.get(f"/contradicts-{number}")
        wait_until(lambda: "is traced on" in agent.stderr(), "the first to be given up")
        second.get("/after")
        wait_until(lambda: "/after" in traced(), "a trace of the second one")
        assert not any(path.startswith("/contradicts") for path in traced())
        stderr = agent.stderr()
        assert "does not look in memory as its layout" in stderr
        assert f"master process {second.server.pid} " in stderr
        assert "detached" not in stderr
        second.write_over()
        deadline_s = time.monotonic() + 20
        for number in range(5):
            second.get(f"/contradicts-{number}")
        assert agent.wait(deadline_s - time.monotonic()) == 2
        assert "detached. Is it a patched build?" in agent.stderr()
        assert "lost_layout_mismatch" in agent.stderr()
        assert not any(path.startswith("/contradicts") for path in traced())
    finally:
        agent.kill()

"""Privileges: the process that reads requests and sends traces may do nothing else."""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from unit.otlp_receiver import GrpcReceiver

import otel_nginx_ebpf
from e2e.agent_process import PROGRAM, AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import AccessLog, NginxServer, free_ports, wait_until

PACKAGE = Path(otel_nginx_ebpf.__file__).parent

NGINX_HTTP = """server {
    listen 127.0.0.1:@PORT@;
    keepalive_requests 100000;
    access_log logs/all.log json;
    location / { return 200 ok; }
}"""
# Of linux/capability.h.
TOO_MUCH = {"DAC_OVERRIDE": 1, "NET_ADMIN": 12, "NET_RAW": 13, "SYS_MODULE": 16, "SYS_ADMIN": 21, "SYS_BOOT": 22}
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
# What an emitter may do, tried by a process that has given up what an emitter gives up.
ATTEMPTS = """
import ctypes, os, sys
from otel_nginx_ebpf.process import handover, privileges
from otel_nginx_ebpf.kernel import maps
handover.take_over(handover.Handover(privileges.account(None), None, {}))
def refused(attempt):
    try:
        return not attempt()
    except OSError as error:
        return error.strerror
print(*(f"{name}: {refused(attempt)}" for name, attempt in {
    "memory": lambda: open(f"/proc/{sys.argv[1]}/mem", "rb"),
    "memory of a worker of the same user": lambda: open(f"/proc/{sys.argv[2]}/mem", "rb"),
    "bpf": lambda: maps.create_map(2, 4, 4, 1),
    "root": lambda: os.setuid(0),
    "program": lambda: os.execv("/bin/true", ["true"]),
}.items()), sep="\\n")
"""


class Site:
    """One nginx, and requests to it."""

    def __init__(self, prefix: Path) -> None:
        self.address = ("127.0.0.1", free_ports(1)[0])
        self.nginx = NginxServer(prefix, NGINX_HTTP.replace("@PORT@", str(self.address[1])))
        self.nginx.start([self.address])
        self.log = AccessLog(prefix / "logs" / "all.log")

    def load(self, count: int) -> None:
        with Http1Connection(self.address) as connection:
            for number in range(count):
                assert connection.request(f"/{number}").status == 200

    def logged(self) -> int:
        return len(self.log.poll())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    found.nginx.stop()
    assert found.nginx.problems() == []


StartAgent = Callable[..., AgentProcess]


@pytest.fixture
def start_agent() -> Iterator[StartAgent]:
    """Starts agents, of which none is left behind, whatever fails."""
    started: list[AgentProcess] = []

    def start(site: Site, *arguments: Any) -> AgentProcess:
        started.append(AgentProcess(site.nginx.pid, *arguments))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()


def status(pid: int, thread: int | None = None) -> dict[str, str]:
    """Of a process's first thread, or of another."""
    lines = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def counts(agent: AgentProcess) -> tuple[int, int, int, dict[str, int]]:
    """Received, exported, lost, and what was lost by cause."""
    match = re.search(r"received (\d+), exported (\d+), lost (\d+)(?: \((.*?)\))?", agent.stderr())
    assert match, agent.stderr()
    causes = dict(each.rsplit(" ", 1) for each in (match[4] or "").split(", ") if each)
    return int(match[1]), int(match[2]), int(match[3]), {cause: int(count) for cause, count in causes.items()}


def test_what_each_process_may_do(site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    """Seen while requests are traced, and sent to a collector."""
    with GrpcReceiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        agent = start_agent(site, tmp_path, ["run", "--pid", str(site.nginx.pid)], environment)
        supervisor, emitter = psutil.Process(agent.pid), psutil.Process(agent.emitter_pid)
        site.load(500)
        wait_until(lambda: len(receiver.trace_ids) == 500, "the traces")
        threads = [status(emitter.pid, thread.id) for thread in emitter.threads()]
        assert len(threads) > 1, "gRPC has some of its own"
        for found in threads:
            assert found["Uid"].split() == ["65534"] * 4
            assert len(set(found["Gid"].split()) - {"0", "65534"}) == 1
            assert found["Groups"] == ""
            assert {name: int(found[name], 16) for name in CAPABILITIES} == dict.fromkeys(CAPABILITIES, 0)
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        assert [each.status for each in emitter.net_connections("tcp")] == ["ESTABLISHED"]
        assert supervisor.net_connections("inet") == []
        held = int(status(supervisor.pid)["CapBnd"], 16)
        assert held == int(status(supervisor.pid)["CapEff"], 16)
        assert [name for name, bit in TOO_MUCH.items() if held >> bit & 1] == []
        lines = Path(f"/proc/{supervisor.pid}/maps").read_text().splitlines()
        mapped = [line for line in lines if "bpf-map" in line]
        assert [line for line in mapped if line.split()[1:3] != ["r--s", "00000000"]] == [], "a ring buffer's"
        descriptors = [os.readlink(path) for path in Path(f"/proc/{emitter.pid}/fd").iterdir()]
        assert [name for name in descriptors if "bpf_link" in name or "bpf-prog" in name] == []
        agent.stop()
    assert counts(agent)[:3] == (500, 500, 0)
    assert site.logged() == 500


def test_what_an_emitter_cannot_do(site: Site) -> None:
    (worker,) = site.nginx.worker_pids()
    wait_until(lambda: psutil.Process(worker).username() == "nobody", "the worker to become who it is")
    command = [sys.executable, "-c", ATTEMPTS, str(site.nginx.pid), str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == [
        "memory: Permission denied",
        "memory of a worker of the same user: Permission denied",
        "bpf: Operation not permitted",
        "root: Operation not permitted",
        "program: Operation not permitted",
    ]


@pytest.mark.parametrize("message", [b"\0" * 12, b"\xff" * 12, b"x", b"x" * 65536, b"\x02\0\0\0\x07\0\0\0\0\0\0\0"])
def test_what_no_emitter_says(message: bytes, site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    """The supervisor lives, and starts another; an attachment that there is not is not detached."""
    agent = start_agent(site, tmp_path)
    before = agent.emitter_pid
    site.load(10)
    wait_until(lambda: len(agent.poll()) == 10, "the traces")
    say(before, message)
    if len(message) == 12 and message[0] == 2:
        site.load(10)
    else:
        wait_until(lambda: agent.stderr().count("ready") == 2, "another emitter", 60)
        assert "it sent" in agent.stderr()
        assert agent.emitter_pid != before
        site.load(10)
    wait_until(lambda: len(agent.poll()) == 20, "the traces")
    agent.stop()
    assert counts(agent)[:3] == (20, 20, 0)


def say(emitter: int, message: bytes) -> None:
    """Sends as an emitter does, over a copy of its socket."""
    for path in Path(f"/proc/{emitter}/fd").iterdir():
        if os.readlink(path).startswith("socket:"):
            process = os.pidfd_open(emitter)
            # x86-64's number of pidfd_getfd, which Python does not have.
            descriptor = ctypes.CDLL(None, use_errno=True).syscall(438, process, int(path.name), 0)
            os.close(process)
            assert descriptor >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=descriptor) as channel:
                channel.send(message)
            return
    raise AssertionError("the emitter has no channel")


def test_a_killed_emitter(site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    """The probes go at once, another emitter begins, and what the first one had counts."""
    with GrpcReceiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}"}
        arguments = ["run", "--pid", str(site.nginx.pid), "--batch-delay-ms", "60000", "--batch-size", "200"]
        arguments += ["--logs", "access"]
        agent = start_agent(site, tmp_path, arguments, environment)
        site.load(150)
        wait_until(lambda: len(receiver.trace_ids) >= 100, "some of the traces")
        sent = len(receiver.trace_ids)
        wait_until(lambda: kept_counts(agent)[:2] == [150, sent], "the emitter to note that")
        os.kill(agent.emitter_pid, signal.SIGSTOP)
        site.load(30)  # which stay in the ring buffer
        os.kill(agent.emitter_pid, signal.SIGKILL)
        wait_until(lambda: "the emitter was killed by SIGKILL; detached" in agent.stderr(), "the supervisor to notice")
        assert not any("bpf" in os.readlink(path) for path in probes(agent.pid))
        site.load(7)  # which nobody sees
        wait_until(lambda: agent.stderr().count("ready") == 2, "another emitter", 60)
        site.load(50)
        agent.stop(signal.SIGTERM)
    assert site.logged() == 150 + 30 + 7 + 50
    received, exported, lost, causes = counts(agent)
    assert len(receiver.trace_ids) == exported == sent + 50
    assert causes == {"lost_emitter_killed": 150 - sent + 30}
    assert (received, lost) == (200, 180 - sent)
    assert len(receiver.log_records) == 50
    assert "; log records: received 200, exported 50, lost 150 (lost_emitter_killed 150)" in agent.stderr()


def kept_counts(agent: AgentProcess) -> list[Any]:
    """What of the traces outlives an emitter: received, exported, ...."""
    (file,) = (path for path in Path(f"/proc/{agent.pid}/fd").iterdir() if "memfd:counts" in os.readlink(path))
    return list(json.loads(file.read_bytes())[0])


def probes(pid: int) -> list[Path]:
    """The descriptors of live probes."""
    return [path for path in Path(f"/proc/{pid}/fd").iterdir() if "bpf_link" in os.readlink(path)]


def test_a_killed_supervisor(site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    """The probes go with it; the emitter delivers what it has, and ends."""
    with GrpcReceiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}"}
        arguments = ["run", "--pid", str(site.nginx.pid), "--batch-delay-ms", "60000"]
        agent = start_agent(site, tmp_path, arguments, environment)
        emitter = psutil.Process(agent.emitter_pid)
        site.load(100)
        agent.kill()
        emitter.wait(20)
        site.load(7)
    assert counts(agent)[:3] == (100, 100, 0)
    assert len(receiver.trace_ids) == 100


def test_what_only_root_may_open(site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    """The emitter gets it all the same: a file in a directory that it may not enter."""
    (tmp_path / "closed").mkdir(mode=0o700)
    capture = tmp_path / "closed" / "day.capture"
    agent = start_agent(site, tmp_path, ["record", "--pid", str(site.nginx.pid), "-o", capture])
    assert status(agent.emitter_pid)["Uid"].split() == ["65534"] * 4
    site.load(20)
    agent.stop()
    assert counts(agent)[:3] == (20, 20, 0)
    assert (capture.stat().st_uid, capture.stat().st_mode & 0o777) == (0, 0o600)


def test_another_user(site: Site, start_agent: StartAgent, tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    arguments = ["run", "--pid", str(site.nginx.pid), "--exporter", "line", "--output", str(tmp_path / "lines")]
    agent = start_agent(site, tmp_path / "agent", [*arguments, "--user", "daemon"])
    assert status(agent.emitter_pid)["Uid"].split()[0] == "1"
    agent.stop()
    done = subprocess.run([PROGRAM, *arguments, "--user", "no-such"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "otel-nginx-ebpf: --user no-such: there is no such user\n")


def test_a_program_that_the_emitter_s_user_cannot_read(site: Site, tmp_path: Path) -> None:
    """A clone in root's home, say: refused before tracing starts; `--user root` asks for root."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(PACKAGE, home / PACKAGE.name)
    program = [sys.executable, "-P", "-m", PACKAGE.name, "run", "--pid", str(site.nginx.pid), "--exporter", "line"]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ready" not in done.stderr
    assert (
        f"user nobody, who is to read requests and send traces, cannot read the program's own files, such as {home}"
        in (done.stderr)
    )
    process = subprocess.Popen([*program, "--user", "root"], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("ready")
    process.terminate()
    assert process.communicate(timeout=60)[1].endswith("received 0, exported 0, lost 0\n")


def test_a_queue_directory_that_the_emitter_may_not_enter(tmp_path: Path) -> None:
    """One line that names it, and whose rights it is about."""
    queue = tmp_path / "closed" / "queue"
    queue.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    done = subprocess.run(
        [PROGRAM, "run", "--queue-dir", queue], capture_output=True, text=True, check=False, timeout=60
    )
    why = "Permission denied for nobody, who reads requests and sends traces (--user)"
    assert (done.returncode, done.stderr) == (2, f"otel-nginx-ebpf: --queue-dir {queue}: {why}\n")

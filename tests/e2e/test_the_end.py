"""The end of the program, with default settings: every trace is counted, however the program ends.

The collector may do anything. All cases run at once, on one nginx.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from unit.otlp_receiver import GrpcReceiver, HttpReceiver, Received

from e2e.agent_process import PROGRAM, AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import PATIENCE, NginxServer, free_ports
from e2e.terminal import Terminal

GRACE_S = 10
LOST = "received 3, exported 0, lost 3 (lost_export_failed 3)"
DELIVERED = "received 3, exported 3, lost 0"
KEPT = "received 3, exported 0, kept for the next run 3, lost 0"


class Collector:
    """One that takes nothing, at a port of its own, until the end has begun."""

    def __init__(self, protocol: str) -> None:
        self._kind: type[GrpcReceiver | HttpReceiver] = HttpReceiver if protocol == "http/protobuf" else GrpcReceiver
        self._stack = ExitStack()
        self.received: Received | None = None
        (self.port,) = free_ports(1)

    def end_begins(self) -> None:
        """Called when the program has been asked to end."""

    def close(self) -> None:
        self._stack.close()

    def _receive(self) -> Received:
        self.received = self._stack.enter_context(self._kind(self.port))
        return self.received


class Silent(Collector):
    """Takes connections, and says nothing."""

    def __init__(self, protocol: str) -> None:
        super().__init__(protocol)
        self._stack.enter_context(socket.create_server(("127.0.0.1", self.port)))


class Slow(Collector):
    """Answers after 8 s."""

    def __init__(self, protocol: str) -> None:
        super().__init__(protocol)
        self._receive().delay_s = 8


class Back(Collector):
    """Comes back 7 s after the program was asked to end."""

    def end_begins(self) -> None:
        timer = threading.Timer(7, self._receive)
        timer.start()
        self._stack.callback(timer.join)


class Asked:
    """The program, started by a test, and the way in which it is asked to end."""

    def __init__(self, command: list[str | Path], environment: dict[str, str], directory: Path) -> None:
        self.directory = directory
        self.start(command, environment)

    def start(self, command: list[str | Path], environment: dict[str, str]) -> None:
        self.agent = AgentProcess(0, self.directory, command, environment)

    def end(self) -> None:
        os.kill(self.agent.pid, signal.SIGINT)

    def wait(self) -> tuple[int, str]:
        """The exit code and what was said."""
        return self.agent.wait(GRACE_S + 20), self.agent.stderr()

    def close(self) -> None:
        self.agent.kill()


class Terminated(Asked):
    """As by `kill`."""

    def end(self) -> None:
        os.kill(self.agent.pid, signal.SIGTERM)


class Twice(Asked):
    """The user is in a hurry."""

    def end(self) -> None:
        super().end()
        time.sleep(1)
        super().end()


class Killed(Asked):
    """The process that delivers is killed meanwhile."""

    def end(self) -> None:
        emitter_pid = self.agent.emitter_pid
        super().end()
        time.sleep(1)
        os.kill(emitter_pid, signal.SIGKILL)


class UnderTimeout(Asked):
    """`timeout` tells its child, and then its process group, in which the child is."""

    def start(self, command: list[str | Path], environment: dict[str, str]) -> None:
        self.agent = AgentProcess(0, self.directory, ["300", PROGRAM, *command], environment, Path("timeout"))

    def end(self) -> None:
        os.kill(self.agent.pid, signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        code, said = super().wait()
        return 0 if code == 124 else code, said  # what timeout says of one that it had to end


class AtTerminal(Asked):
    """Ctrl-C, which reaches the shell's whole foreground process group."""

    pipe = ""

    def start(self, command: list[str | Path], environment: dict[str, str]) -> None:
        self._terminal = Terminal(self.directory)
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        self._terminal.type(f"{variables} {PROGRAM} {' '.join(map(str, command))} {self.pipe}", "Enter")
        self._terminal.wait_for("^ready: nginx", 60)

    def end(self) -> None:
        self._terminal.type("C-c")
        self._terminal.type("echo code ${PIPESTATUS[0]}", "Enter")

    def wait(self) -> tuple[int, str]:
        lines = self._terminal.wait_for("^code [0-9]", GRACE_S + 20)
        (code,) = (line.removeprefix("code ") for line in lines if line.startswith("code "))
        return int(code), "\n".join(lines)

    def close(self) -> None:
        self._terminal.close()


class Piped(AtTerminal):
    """What it says goes through a process that the Ctrl-C ends at once."""

    pipe = "2>&1 | cat"


@dataclass
class Case:
    collector: type[Collector]
    asked: type[Asked]
    says: str
    """The last line."""
    seconds: tuple[float, float] = (GRACE_S - 0.5, GRACE_S + 8)
    """How long it takes from the first signal on."""
    protocol: str = "grpc"
    options: tuple[str, ...] = ()
    code: int = 0


AT_ONCE = (0.0, 7.0)
IN_TIME = (7.0, GRACE_S + 8)
CASES = {
    "absent": Case(Collector, Asked, LOST),
    "absent, in a hurry": Case(Collector, Twice, LOST, AT_ONCE),
    "absent, over HTTP": Case(Collector, Terminated, LOST, protocol="http/protobuf"),
    "absent, with a directory": Case(Collector, AtTerminal, KEPT, options=("--queue-dir", "@DIRECTORY@/queue")),
    "absent, with metrics": Case(Collector, Asked, LOST, options=("--metrics",)),
    "absent, and killed": Case(
        Collector, Killed, "received 3, exported 0, lost 3 (lost_emitter_killed 3)", AT_ONCE, code=1
    ),
    "silent": Case(Silent, Terminated, LOST),
    "silent, in a hurry": Case(Silent, Twice, LOST, AT_ONCE, protocol="http/protobuf"),
    "slow": Case(Slow, UnderTimeout, DELIVERED, IN_TIME),
    "slow, over HTTP": Case(Slow, Asked, DELIVERED, IN_TIME, protocol="http/protobuf"),
    "back": Case(Back, AtTerminal, DELIVERED, IN_TIME),
    "back, over HTTP": Case(Back, Terminated, DELIVERED, IN_TIME, protocol="http/protobuf"),
    "back, said to nobody": Case(Back, Piped, "", IN_TIME),
}


@dataclass
class Outcome:
    code: int
    said: str
    seconds: float
    received: int
    """Traces, by the collector."""


class Running:
    """A case's collector and program."""

    def __init__(self, case: Case, directory: Path, nginx_pid: int) -> None:
        directory.mkdir(mode=0o755)
        self._collector = case.collector(case.protocol)
        options = [option.replace("@DIRECTORY@", str(directory)) for option in case.options]
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._collector.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": case.protocol,
        }
        try:
            self._asked = case.asked(["run", "--pid", str(nginx_pid), *options], environment, directory)
        except BaseException:
            self._collector.close()
            raise

    def end(self) -> Outcome:
        began_s = time.monotonic()
        self._collector.end_begins()
        self._asked.end()
        code, said = self._asked.wait()
        seconds = time.monotonic() - began_s
        received = self._collector.received
        return Outcome(code, said, seconds, len(received.trace_ids) if received else 0)

    def close(self) -> None:
        self._asked.close()
        self._collector.close()


@pytest.fixture(scope="module")
def outcomes(public_directory: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Outcome]]:
    """Of the cases that are selected, all at once: each sees the same three requests."""
    wanted = {each.callspec.params["name"] for each in request.session.items if each.path == request.path}
    directory = public_directory / "the_end"
    directory.mkdir()
    address = ("127.0.0.1", free_ports(1)[0])
    nginx = NginxServer(directory, f"server {{ listen 127.0.0.1:{address[1]}; return 200 ok; }}")
    nginx.start([address])
    running: dict[str, Running] = {}

    def start(number: int, name: str) -> None:
        running[name] = Running(CASES[name], directory / str(number), nginx.pid)

    try:
        with ThreadPoolExecutor(2) as starting:  # each has to be ready in time
            list(starting.map(start, range(len(wanted)), wanted))
        with Http1Connection(address) as connection:
            for _ in range(3):
                assert connection.request("/").status == 200
        with ThreadPoolExecutor(len(wanted)) as ending:
            ended: dict[str, Future[Outcome]] = {name: ending.submit(each.end) for name, each in running.items()}
            yield lambda name: ended[name].result()
    finally:
        for each in running.values():
            each.close()
        nginx.stop()
    assert nginx.problems() == []


@pytest.mark.parametrize("name", CASES)
def test_counts_all(name: str, outcomes: Callable[[str], Outcome]) -> None:
    case, outcome = CASES[name], outcomes(name)
    assert outcome.code == case.code, outcome
    assert case.says in outcome.said, outcome
    least, most = case.seconds
    assert least <= outcome.seconds <= most * PATIENCE, outcome
    assert outcome.received == (3 if case.seconds == IN_TIME else 0), outcome

"""Runs the program under test as a user does, and reads the traces that it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from registry import seen

from e2e.nginx_server import PATIENCE, wait_until

EMPTY: Mapping[str, str] = {}
OPT_IN: Mapping[str, str] = {"OTEL_NGINX_EBPF_OPT_IN_ATTRIBUTES": "client.port,http.request.size,http.response.size"}
"""Facts that nginx logs, too: the oracle compares them. By default spans do not have them."""
PROGRAM = Path(sys.executable).with_name("otel-nginx-ebpf")


@dataclass(frozen=True)
class Event:
    name: str
    time_unix_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    name: str
    kind: str
    span_id: str
    parent_span_id: str | None
    start_unix_ns: int
    end_unix_ns: int
    status: str
    error: str | None
    attributes: dict[str, Any]
    events: tuple[Event, ...] = ()

    @property
    def seconds(self) -> float:
        return (self.end_unix_ns - self.start_unix_ns) / 1e9


@dataclass(frozen=True)
class Trace:
    """A line of the JSON exporter."""

    trace_id: str
    trace_flags: int
    trace_state: str
    resource: dict[str, Any]
    spans: tuple[Span, ...]

    @classmethod
    def parse(cls, line: bytes) -> "Trace":
        fields = json.loads(line)
        spans = tuple(
            Span(**{**span, "events": tuple(Event(**event) for event in span["events"])}) for span in fields["spans"]
        )
        seen.trace(fields["resource"], spans)
        return cls(fields["trace_id"], fields["trace_flags"], fields["trace_state"], fields["resource"], spans)

    @property
    def server(self) -> Span:
        return self.spans[0]

    @property
    def children(self) -> tuple[Span, ...]:
        """The child spans by start time."""
        return tuple(sorted(self.spans[1:], key=lambda span: span.start_unix_ns))

    def named(self, name: str) -> list[Span]:
        return [span for span in self.children if span.name == name]

    def outline(self) -> list[str]:
        """The children's names by start time."""
        return [span.name for span in self.children]


class AgentProcess:
    """Attaches the program to an nginx. The probes are live when the constructor returns.

    `arguments` replace `run` with the JSON exporter. The program gets only the OTEL_* variables in `OPT_IN` and
    `environment`.
    """

    def __init__(
        self,
        nginx_pid: int,
        directory: Path,
        arguments: Sequence[str | Path] = (),
        environment: Mapping[str, str] = EMPTY,
        program: Path = PROGRAM,
        ready_s: float = 30,
    ) -> None:
        self.output = directory / "traces.jsonl"
        default = ["run", "--pid", str(nginx_pid), "--exporter", "json", "--output", self.output]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        self._stderr_path = directory / "agent.log"
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [program, *(arguments or default)],
                env={**inherited, **OPT_IN, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        self._read_bytes = 0
        self.traces: list[Trace] = []
        try:
            wait_until(self._is_ready, "the agent's `ready` line", ready_s)
        except BaseException:
            self.kill()
            sys.stderr.write(self.stderr())
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The pids of the program and of its children."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    @property
    def emitter_pid(self) -> int:
        """The pid of the emitter, which the process `pid` started."""
        (emitter,) = (child for child in psutil.Process(self.pid).children() if child.cmdline()[-1].startswith("emit"))
        return emitter.pid

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the program."""
        for pid in self.pids:
            os.kill(pid, number)

    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="backslashreplace")

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"the agent ended with {self._process.returncode}: {self.stderr()}")
        return any(line.startswith("ready") for line in self.stderr().splitlines())

    def poll(self) -> list[Trace]:
        """Return all traces so far, in the order of the file."""
        if self.output.exists():
            with self.output.open("rb") as file:
                file.seek(self._read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole) + len(newline)
            self.traces += [Trace.parse(line) for line in whole.splitlines() if newline]
        return self.traces

    def wait(self, seconds: float = 30) -> int:
        """Wait until the program ends by itself; return its exit code."""
        return self._process.wait(seconds * PATIENCE)

    def kill(self) -> None:
        """Kill the program, without a chance to detach."""
        self._process.kill()
        self._process.wait()

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop the program as Ctrl-C does: it delivers what it has and exits with 0."""
        if self._process.poll() is not None:
            raise AssertionError(f"the agent ended early with {self._process.returncode}: {self.stderr()}")
        self._process.send_signal(number)
        started = time.monotonic()
        try:
            code = self._process.wait(30 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert code == 0, f"exit code {code} after {time.monotonic() - started:.1f} s: {self.stderr()}"
        self.poll()

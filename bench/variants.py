"""Names what is compared with an untraced nginx: the program with different arguments, or from another checkout."""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.agent_process import PROGRAM, AgentProcess

OFF = "off"

# The probe that plain HTTP/1 does not need detaches after 30 seconds, but a turn lasts a second. Here it detaches after
# 1,000 requests.
_AT_ONCE = {"OTEL_NGINX_EBPF_TEST_QUIET": "1000 0"}

# For the records of a whole turn, while nobody reads them (`stopped`).
_ROOM = ("--ring-buffer-mib", "128")


FLOORS = {"floor": "phases", "request, floor": "request"}
"""Variants with programs that do nothing (floor.py), and the detail whose places they have."""


@dataclass(frozen=True)
class Variant:
    name: str
    program: Path
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse `NAME`, `NAME=ARGUMENTS`, `NAME=PATH/otel-nginx-ebpf ARGUMENTS`, or a name of `FLOORS`."""
        name, _, rest = text.partition("=")
        words = shlex.split(rest)
        program = Path(words.pop(0)) if words and not words[0].startswith("-") else PROGRAM
        return cls(name, program, tuple(words))


SETTINGS = (
    "floor",
    "all",
    "1 %=--sampler traceidratio --sampler-arg 0.01",
    "request, floor",
    "request=--detail request",
    "request, 0 %=--detail request --sampler always_off",
)
"""What `worker` compares by default: all requests, one in a hundred, and both with less detail; and their floors."""


_RULES = Path(__file__).with_name("rules.toml")
_HEADERS = "--capture-request-headers user-agent,accept,host --capture-response-headers content-type,content-length"

FEATURES = (
    "all",
    "no log=--log-level none",
    f"headers={_HEADERS}",
    f"rules=--config {shlex.quote(str(_RULES))}",
)
"""What `features` compares: all requests, without the error log, with captured headers, with ten rules."""


@contextmanager
def tracing(variant: Variant | None, nginx_pid: int) -> Iterator[AgentProcess | None]:
    """Trace with `variant` while the block runs, and only write the records to a file. None: do not trace."""
    if variant is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as directory:
        if variant.name in FLOORS:
            program, arguments = Path(sys.executable), ["-m", "bench.floor", str(nginx_pid), FLOORS[variant.name]]
        else:
            program = variant.program
            arguments = ["record", "--pid", str(nginx_pid), *_ROOM, *variant.arguments, "-o", f"{directory}/capture"]
        agent = AgentProcess(nginx_pid, Path(directory), arguments, _AT_ONCE, program=program)
        try:
            yield agent
        except BaseException:
            agent.kill()
            raise
        agent.stop()
        _say_losses(variant, agent)


@contextmanager
def stopped(agent: AgentProcess | None) -> Iterator[None]:
    """Let the process that reads records stand still while the block runs. The records wait in the ring buffer."""
    readers = agent.pids[1:] if agent else []
    for pid in readers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in readers:
            os.kill(pid, signal.SIGCONT)


def turns(
    variants: Sequence[Variant], names: Iterable[str], nginx_pid: int, rounds: int, untraced: Sequence[str] = (OFF,)
) -> Iterator[tuple[int, str, str, AgentProcess | None]]:
    """Yield a round's number, a variant's label, a name and the program, while the variant traces.

    Each round has every variant and each label of `untraced`, in an order that changes. Each variant has every name.
    """
    names = list(names)
    order = [*((None, label) for label in untraced), *((variant, variant.name) for variant in variants)]
    for number in range(1, rounds + 1):
        for variant, label in reversed(order) if number % 2 else order:
            with tracing(variant, nginx_pid) as agent:
                for name in names:
                    yield number, label, name, agent


def _say_losses(variant: Variant, agent: AgentProcess) -> None:
    last = agent.stderr().strip().splitlines()[-1]
    if "lost 0" not in last:
        print(f"{variant.name}: {last}", flush=True)

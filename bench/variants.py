"""Names what is compared with an untraced nginx: the program with different arguments, or from another checkout."""

import shlex
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


@dataclass(frozen=True)
class Variant:
    name: str
    program: Path
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse `NAME`, `NAME=ARGUMENTS` or `NAME=PATH/otel-nginx-ebpf ARGUMENTS`."""
        name, _, rest = text.partition("=")
        words = shlex.split(rest)
        program = Path(words.pop(0)) if words and not words[0].startswith("-") else PROGRAM
        return cls(name, program, tuple(words))


SETTINGS = (
    "all",
    "1 %=--sampler traceidratio --sampler-arg 0.01",
    "request=--detail request",
    "request, 0 %=--detail request --sampler always_off",
)
"""What `worker` compares by default: all requests, one in a hundred, and both with less detail."""


@contextmanager
def tracing(variant: Variant | None, nginx_pid: int) -> Iterator[AgentProcess | None]:
    """Trace with `variant` while the block runs, and only write the records to a file. None: do not trace."""
    if variant is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as directory:
        arguments = ["record", "--pid", str(nginx_pid), *variant.arguments, "-o", f"{directory}/capture"]
        agent = AgentProcess(nginx_pid, Path(directory), arguments, _AT_ONCE, program=variant.program)
        try:
            yield agent
        except BaseException:
            agent.kill()
            raise
        agent.stop()
        _say_losses(variant, agent)


def turns(
    variants: Sequence[Variant], names: Iterable[str], nginx_pid: int, rounds: int, untraced: Sequence[str] = (OFF,)
) -> Iterator[tuple[int, str, str]]:
    """Yield a round's number, a variant's label and a name, while the variant traces.

    Each round has every variant and each label of `untraced`, in an order that changes. Each variant has every name.
    """
    names = list(names)
    order = [*((None, label) for label in untraced), *((variant, variant.name) for variant in variants)]
    for number in range(1, rounds + 1):
        for variant, label in reversed(order) if number % 2 else order:
            with tracing(variant, nginx_pid):
                for name in names:
                    yield number, label, name


def _say_losses(variant: Variant, agent: AgentProcess) -> None:
    last = agent.stderr().strip().splitlines()[-1]
    if "lost 0" not in last:
        print(f"{variant.name}: {last}", flush=True)

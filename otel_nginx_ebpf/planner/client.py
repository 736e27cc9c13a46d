"""Starts the planner (`plan`) as a short-lived process, so that the long-lived one never parses an executable."""

import json
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import BinaryIO

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.nginx.processes import Instance
from otel_nginx_ebpf.settings.model import Settings


@dataclass(frozen=True, slots=True)
class Target:
    """An nginx binary that can be traced: what the readers of its records need to know."""

    name: str
    """The binary's path."""
    product: str
    """`nginx`, or the name of the fork."""
    version: str
    layout_source: str
    sites: list[str]
    functions: dict[str, str]
    """The nginx function that marks each boundary, by the boundary's name."""

    def __str__(self) -> str:
        return f"{self.product} {self.version} ({self.name})"

    @property
    def service_version(self) -> str:
        """The release; for a fork the name comes first, as in the output of `-v`, such as `Angie/1.12.1`."""
        return self.version if self.product == "nginx" else f"{self.product}/{self.version}"

    def ready_line(self, instances: tuple[Instance, ...]) -> str:
        """Returns the line that says that the probes are live, with product, workers, sites and layout source."""
        workers = sum(instance.workers for instance in instances)
        masters = ", ".join(str(instance.master_pid) for instance in instances)
        return (
            f"ready: {self.product} {self.version} (pid {masters}), {workers} worker{'s' if workers != 1 else ''}, "
            f"sites {', '.join(self.sites)}, layout {self.layout_source}"
        )


def make_target(
    instances: tuple[Instance, ...], settings: Settings, silent: frozenset[str] = frozenset()
) -> tuple[Target, bytes]:
    """Plans the probes for one binary in a process of its own.

    Args:
        instances: The instances that run the binary.
        settings: The settings; some boundaries are probed only if a setting asks for them.
        silent: Exported functions that are known never to be called.

    Returns:
        The target, and the loader's request (`LoadRequest` as JSON).

    Raises:
        UserError: The binary, its layout or a required site cannot be used.
        TemporaryError: The binary could not be examined; a retry may succeed.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "otel_nginx_ebpf.planner.plan"],
        # Plain data in both directions. The answer is JSON, not pickle: its sender has parsed an untrusted binary.
        input=pickle.dumps((instances, settings, silent)),
        stdout=subprocess.PIPE,
        check=False,
        process_group=0,  # so that Ctrl-C reaches this process only
    )
    about, newline, load_request = done.stdout.partition(b"\n")
    if not newline:
        # SIGXCPU: the binary took more than the limit of processor time. Other signals do not come from the binary.
        kind = TemporaryError if done.returncode < 0 and done.returncode != -signal.SIGXCPU else UserError
        raise kind(f"{instances[0].executable}: its planner ended without an answer (status {done.returncode})")
    answer = json.loads(about)
    if "error" in answer:
        raise (TemporaryError if answer["temporary"] else UserError)(answer["error"])
    return Target(**answer), load_request


def write_answer(file: BinaryIO, target: Target, load_request: bytes) -> None:
    """Writes the planner's answer to `make_target`."""
    file.write(json.dumps(asdict(target)).encode() + b"\n" + load_request)


def write_error(file: BinaryIO, error: UserError) -> None:
    """Writes the planner's answer for a binary that cannot be traced."""
    temporary = isinstance(error, TemporaryError)
    file.write(json.dumps({"error": str(error), "temporary": temporary}).encode() + b"\n")

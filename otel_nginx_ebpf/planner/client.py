"""A plan made by a process of its own (`plan`), which exits: the long-lived one takes no executable apart."""

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
    """An nginx binary that can be traced, as far as it concerns those who read its records."""

    name: str
    """The binary's path."""
    product: str
    """nginx, or the fork of it."""
    version: str
    layout_source: str
    sites: list[str]
    functions: dict[str, str]
    """The function that marks a boundary, by the boundary's name."""

    def __str__(self) -> str:
        return f"{self.product} {self.version} ({self.name})"

    @property
    def service_version(self) -> str:
        """nginx's release; of a fork with its name, as its `-v` says it, such as `Angie/1.12.1`."""
        return self.version if self.product == "nginx" else f"{self.product}/{self.version}"

    def ready_line(self, instances: tuple[Instance, ...]) -> str:
        """What says that probes are live: names product, version, workers, probe sites and layout source."""
        workers = sum(instance.workers for instance in instances)
        masters = ", ".join(str(instance.master_pid) for instance in instances)
        return (
            f"ready: {self.product} {self.version} (pid {masters}), {workers} worker{'s' if workers != 1 else ''}, "
            f"sites {', '.join(self.sites)}, layout {self.layout_source}"
        )


def make_target(
    instances: tuple[Instance, ...], settings: Settings, silent: frozenset[str] = frozenset()
) -> tuple[Target, bytes]:
    """The target that instances of one binary are, and the loader's request.

    Args:
        instances: What runs it.
        settings: Some boundaries are probed only where a setting wants them.
        silent: Functions that are exported and were found to be never called.

    Raises:
        UserError: The binary, its layout or a required site cannot be used.
        TemporaryError: It could not be looked at.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "otel_nginx_ebpf.planner.plan"],
        # Both ways plain data; what comes back comes from who has read the binary, and cannot be more.
        input=pickle.dumps((instances, settings, silent)),
        stdout=subprocess.PIPE,
        check=False,
        process_group=0,  # Ctrl-C is for this process alone
    )
    about, newline, load_request = done.stdout.partition(b"\n")
    if not newline:
        # By its limits it ends for what the binary is; other signals are not about that.
        kind = TemporaryError if done.returncode < 0 and done.returncode != -signal.SIGXCPU else UserError
        raise kind(f"{instances[0].executable}: its planner ended without an answer (status {done.returncode})")
    answer = json.loads(about)
    if "error" in answer:
        raise (TemporaryError if answer["temporary"] else UserError)(answer["error"])
    return Target(**answer), load_request


def write_answer(file: BinaryIO, target: Target, load_request: bytes) -> None:
    """The planner's side of `make_target`."""
    file.write(json.dumps(asdict(target)).encode() + b"\n" + load_request)


def write_error(file: BinaryIO, error: UserError) -> None:
    """Of a binary that is none to trace."""
    temporary = isinstance(error, TemporaryError)
    file.write(json.dumps({"error": str(error), "temporary": temporary}).encode() + b"\n")

"""Describes the machine, and says on which processors the parts of a measurement run."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from e2e.nginx_server import nginx_build

NGINX_CPU = 0
"""The traced worker has this processor for itself, if the machine has another one."""


def pin_all_but_nginx() -> None:
    """Keep this process, and all that it starts from now on, off nginx's processor."""
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {NGINX_CPU} or {NGINX_CPU})


def on_any_cpu() -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def cpu_ns(pid: int, thread: str = "*") -> int:
    """Return the processor time of all threads of a process, or of one, in nanoseconds.

    It is the first field of /proc/PID/task/*/schedstat.
    """
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob(f"{thread}/schedstat"))


def describe() -> dict[str, Any]:
    """Return what the figures depend on, for the JSON file."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip() or None,
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "processor": models[0].partition(": ")[2] if models else None,
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "python": platform.python_version(),
        "nginx": nginx_build().partition("\n")[0],
        "pinned": f"nginx's worker on CPU {NGINX_CPU}; load generator, upstream and program on the others",
    }

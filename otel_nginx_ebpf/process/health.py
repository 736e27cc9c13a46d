"""The container's health check. It starts every few seconds, so it imports little.

Exits with 0 if a process of this container holds live probes, or waits for an nginx (`--wait`); otherwise with 1.
"""

import os
import sys
from collections.abc import Iterator

WAITS = "otel-nginx-ebpf-waits"
"""The name of a file in memory. A process that holds it is healthy without probes."""

# The names in /proc of that file's descriptor, and of probes: BPF links, or perf events on older kernels.
_SIGNS = (f"/memfd:{WAITS} (deleted)", "anon_inode:bpf_link", "anon_inode:bpf-link", "anon_inode:[perf_event]")


def _descriptors(pid: str) -> Iterator[str]:
    """Yields the names of a process's descriptors; nothing if the process is gone or may not be looked at."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            yield os.readlink(f"/proc/{pid}/fd/{name}")
    except OSError:
        return


def _shares_our_mounts(pid: str) -> bool:
    """Returns whether a process is in this container. A shared pid namespace shows other containers' processes too."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False


def is_well() -> bool:
    """Returns whether a process of this container holds such a descriptor."""
    pids = (name for name in os.listdir("/proc") if name.isdigit())
    return any(_shares_our_mounts(pid) and any(each in _SIGNS for each in _descriptors(pid)) for pid in pids)


if __name__ == "__main__":
    sys.exit(0 if is_well() else "otel-nginx-ebpf: no live probes in this container, and nobody who waits for an nginx")

"""Whether all is well: for a container's health check, which starts this every few seconds and so imports little.

Exits with 0 where a process of this container holds live probes or, with `--wait`, may be without; else with 1.
"""

import os
import sys
from collections.abc import Iterator

WAITS = "otel-nginx-ebpf-waits"
"""The name of a file in memory that a process holds which may be without probes."""

# What its descriptor is called in /proc, and those of probes: BPF links, or perf events on older kernels.
_SIGNS = (f"/memfd:{WAITS} (deleted)", "anon_inode:bpf_link", "anon_inode:bpf-link", "anon_inode:[perf_event]")


def _descriptors(pid: str) -> Iterator[str]:
    """What the descriptors of a process are; nothing for one that is gone or may not be looked at."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            yield os.readlink(f"/proc/{pid}/fd/{name}")
    except OSError:
        return


def _shares_our_mounts(pid: str) -> bool:
    """Whether a process is of this container, which with a shared pid namespace not all are that can be seen."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False


def is_well() -> bool:
    """Whether a process of this container holds such a descriptor."""
    pids = (name for name in os.listdir("/proc") if name.isdigit())
    return any(_shares_our_mounts(pid) and any(each in _SIGNS for each in _descriptors(pid)) for pid in pids)


if __name__ == "__main__":
    sys.exit(0 if is_well() else "otel-nginx-ebpf: no live probes in this container, and nobody who waits for an nginx")

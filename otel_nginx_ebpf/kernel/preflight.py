"""Whether this kernel and this process can trace at all, told before anything is attempted."""

import os
import re
from pathlib import Path

from otel_nginx_ebpf.errors import UserError

_UPROBE_PMU = Path("/sys/bus/event_source/devices/uprobe/type")
_BPF_SETTINGS = (Path("/proc/sys/kernel/unprivileged_bpf_disabled"), Path("/proc/sys/net/core/bpf_jit_enable"))

# linux/capability.h
_CAPABILITIES = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_OLDEST_KERNEL = (5, 8)


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return int(match[1], 16) if match else 0


def missing_capabilities(effective: int) -> tuple[str, ...]:
    """Names of the capabilities that tracing needs and the bit set lacks. CAP_SYS_ADMIN stands for BPF and PERFMON."""

    def has(name: str) -> bool:
        return bool(effective >> _CAPABILITIES[name] & 1)

    needed = ["CAP_SYS_PTRACE"] if has("CAP_SYS_ADMIN") else ["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]
    return tuple(name for name in needed if not has(name))


def check_kernel(release: str) -> None:
    """Raises `UserError` for a kernel before 5.8, which has no BPF ring buffer."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_KERNEL:
        raise UserError(f"Linux {release} is too old: the BPF ring buffer came with 5.8; use a newer kernel")


def check() -> None:
    """Raises `UserError` when tracing cannot work here: kernel, BPF, uprobes or permissions."""
    check_kernel(os.uname().release)
    missing = missing_capabilities(_effective_capabilities())
    if missing:
        raise UserError(
            f"not permitted to trace: {', '.join(missing)} missing; "
            "run as root, or grant CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE"
        )
    if not any(path.exists() for path in _BPF_SETTINGS):
        raise UserError("this kernel has no BPF (CONFIG_BPF_SYSCALL is off); use a kernel that has it")
    if not _UPROBE_PMU.exists():
        raise UserError(
            f"this kernel has no uprobes ({_UPROBE_PMU} is missing: CONFIG_UPROBE_EVENTS); use one that has them"
        )

"""Whether this kernel and this process can trace at all, told before anything is attempted, and touching nothing."""

import errno
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel.loader import loader_command
from otel_nginx_ebpf.kernel.maps import create_map
from otel_nginx_ebpf.kernel.release import release_numbers
from otel_nginx_ebpf.kernel.uprobes import PERF_EVENTS_ADVICE, links_work
from otel_nginx_ebpf.linux import Capability

State = Literal["ok", "note", "fail"]
"""`note`: works, or may work, but is worth knowing; `fail`: in the way of tracing."""

_UPROBE_PMU = Path("/sys/bus/event_source/devices/uprobe/type")
_JIT = Path("/proc/sys/net/core/bpf_jit_enable")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_MOUNTS = Path("/proc/self/mounts")

_CAPABILITIES = {
    f"CAP_{each.name}": each
    for each in (Capability.SYS_PTRACE, Capability.SYS_ADMIN, Capability.PERFMON, Capability.BPF)
}

# linux/bpf.h
_MAP_TYPE_ARRAY = 2
_MAP_TYPE_RINGBUF = 27

_RING_BUFFER_CAME_WITH = (5, 8)
_BCC_S = 60


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at. `advice` says, unless all is well, what is wrong and the next step."""

    name: str
    state: State
    found: str
    advice: str = ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def kernel(release: str | None = None) -> Check:
    """The kernel's release; by default the running one's."""
    release = release or os.uname().release
    numbers = release_numbers(release)
    if numbers and numbers < _RING_BUFFER_CAME_WITH:
        advice = f"Linux {release} is too old: the BPF ring buffer came with 5.8; use a newer kernel"
        return Check("kernel", "fail", f"Linux {release}", advice)
    return Check("kernel", "ok", f"Linux {release}")


def _effective_capabilities() -> int:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(Path("/proc/self/status")) or "", re.MULTILINE)
    return int(match[1], 16) if match else 0


def capabilities(effective: int | None = None) -> Check:
    """The capabilities that tracing needs, of a bit set; by default of this process. SYS_ADMIN is BPF and PERFMON."""
    bits = _effective_capabilities() if effective is None else effective
    held = [name for name, bit in _CAPABILITIES.items() if bits >> bit & 1]
    needed = ["CAP_SYS_PTRACE"] if "CAP_SYS_ADMIN" in held else ["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]
    missing = ", ".join(name for name in needed if name not in held)
    if missing:
        return Check(
            "capabilities",
            "fail",
            f"{missing} missing",
            f"not permitted to trace: {missing} missing; run as root, or grant CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE",
        )
    return Check("capabilities", "ok", ", ".join(held))


def _make_map(kind: int, key_bytes: int, entries: int) -> None:
    try:
        os.close(create_map(kind, key_bytes, key_bytes, entries))
    except PermissionError:
        # Before Linux 5.11 maps counted as locked memory, the same user's others too. BCC does away with the limit.
        with suppress(ValueError):  # it may not be raised
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.close(create_map(kind, key_bytes, key_bytes, entries))


def _try_map(name: str, kind: int, key_bytes: int, entries: int, absent: Check) -> Check:
    """What becomes of a map that is made and dropped at once; `absent` where the kernel does not know such a thing."""
    try:
        _make_map(kind, key_bytes, entries)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL):
            return absent
        if error.errno == errno.EPERM and capabilities().state == "fail":
            return Check(name, "note", "unknown", "not permitted to try it; see capabilities")
        advice = (
            f"bpf() is refused: {error.strerror}; is it a seccomp filter, as containers have? Allow the system call bpf"
        )
        return Check(name, "fail", f"refused ({error.strerror})", advice)
    return Check(name, "ok", "works")


def bpf() -> Check:
    """Whether the system call bpf() works."""
    advice = "this kernel has no BPF (CONFIG_BPF_SYSCALL is off); use a kernel that has it"
    return _try_map("bpf", _MAP_TYPE_ARRAY, 4, 1, Check("bpf", "fail", "none", advice))


def ring_buffer() -> Check:
    """Whether the kernel has BPF ring buffers."""
    if bpf().state != "ok":
        return Check("ring buffer", "note", "unknown", "cannot be tried; see bpf")
    advice = "this kernel has no BPF ring buffer, which came with 5.8; use a newer kernel"
    return _try_map("ring buffer", _MAP_TYPE_RINGBUF, 0, 4096, Check("ring buffer", "fail", "none", advice))


def jit() -> Check:
    """Whether the kernel compiles BPF programs (Documentation/admin-guide/sysctl/net.rst)."""
    enabled = _read(_JIT)
    if enabled is None:
        return Check("jit", "note", "unknown", f"{_JIT} cannot be read here, as in a container")
    if enabled == "0":
        advice = "BPF programs are interpreted and so cost several times as much; sysctl net.core.bpf_jit_enable=1"
        return Check("jit", "note", "off", advice)
    return Check("jit", "ok", "on")


def uprobes() -> Check:
    """Whether uprobes can be attached, and how: by BPF links, or, as older kernels do it, as perf events."""
    if _read(_UPROBE_PMU) is None:
        advice = f"this kernel has no uprobes ({_UPROBE_PMU} is missing: CONFIG_UPROBE_EVENTS); use one that has them"
        return Check("uprobes", "fail", "none", advice)
    try:
        by_links = links_work()
    except OSError:
        return Check("uprobes", "note", "unknown", "cannot be tried; see capabilities and bpf")
    if by_links:
        return Check("uprobes", "ok", "by BPF links")
    if _effective_capabilities() >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1:
        return Check("uprobes", "ok", "as perf events")
    return Check("uprobes", "note", "as perf events", PERF_EVENTS_ADVICE)


def lockdown(text: str | None = None) -> Check:
    """The lockdown state (kernel_lockdown(7)), of the file's text; by default of this kernel."""
    text = text or _read(_LOCKDOWN)
    if text is None:
        advice = f"{_LOCKDOWN} cannot be read: securityfs is not mounted, or the kernel has no lockdown"
        return Check("lockdown", "note", "unknown", advice)
    active = re.search(r"\[(\w+)\]", text)
    state = active[1] if active else text
    if state == "confidentiality":
        advice = (
            "kernel lockdown “confidentiality” keeps BPF from reading system calls' arguments; boot with "
            "lockdown=integrity, or without"
        )
        return Check("lockdown", "fail", state, advice)
    return Check("lockdown", "ok", state)


def tracefs() -> Check:
    """Where tracefs is mounted. The probes do without."""
    mounts = [line.split() for line in (_read(_MOUNTS) or "").splitlines()]
    points = [fields[1] for fields in mounts if len(fields) > 2 and fields[2] == "tracefs"]
    return Check("tracefs", "ok", points[0] if points else "not mounted, and not needed")


def bcc() -> Check:
    """Which BCC the loader would use. Asks the loader, a process of its own."""
    try:
        answer = subprocess.run(loader_command("--version"), capture_output=True, timeout=_BCC_S, check=False)
        told = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Check("bcc", "fail", "unknown", f"the loader does not tell its BCC: {error}; reinstall this program")
    if "error" in told:
        return Check("bcc", "fail", told["found"], told["error"])
    return Check("bcc", "ok", told["found"])


CHECKS: tuple[Callable[[], Check], ...] = (kernel, capabilities, bpf, ring_buffer, jit, uprobes, lockdown, tracefs)
"""What does not take long. `bcc` does; and where it is in the way, the loader says the same."""


def check() -> None:
    """Raises `UserError` when tracing cannot work here: kernel, BPF, uprobes or permissions."""
    for each in CHECKS:
        result = each()
        if result.state == "fail":
            raise UserError(result.advice)

"""Checks whether this kernel and this process can trace at all, before tracing starts. Changes nothing."""

import errno
import json
import mmap
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
from otel_nginx_ebpf.kernel.socket_propagation import cgroup_root, fionread_works
from otel_nginx_ebpf.kernel.uprobes import PERF_EVENTS_ADVICE, links_work
from otel_nginx_ebpf.linux import Capability

State = Literal["ok", "note", "fail"]
"""`note`: it works or may work, but the user should know; `fail`: it prevents tracing."""

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
    """The result of a check. If `state` is not `ok`, `advice` says what is wrong and what to do next."""

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
    """Checks a kernel's release, by default the running kernel's."""
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
    """Checks for the capabilities that tracing needs. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON.

    Args:
        effective: The capabilities as a bit set; by default this process's.
    """
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
        # Before Linux 5.11 all maps of a user counted as locked memory. BCC removes the limit, so this does too.
        with suppress(ValueError):  # this process may not raise the limit
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.close(create_map(kind, key_bytes, key_bytes, entries))


def _try_map(name: str, kind: int, key_bytes: int, entries: int, absent: Check) -> Check:
    """Makes a map and closes it at once. Returns `absent` if the kernel does not know maps of this kind."""
    try:
        _make_map(kind, key_bytes, entries)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL):
            return absent
        if error.errno == errno.EPERM and capabilities().state == "fail":
            return Check(name, "note", "unknown", "not permitted to test it; see capabilities")
        advice = (
            f"bpf() is refused: {error.strerror}; if a container's seccomp filter does so, allow the system call bpf"
        )
        return Check(name, "fail", f"refused ({error.strerror})", advice)
    return Check(name, "ok", "works")


def bpf() -> Check:
    """Checks whether the system call bpf() works."""
    advice = "this kernel has no BPF (CONFIG_BPF_SYSCALL is off); use a kernel that has it"
    return _try_map("bpf", _MAP_TYPE_ARRAY, 4, 1, Check("bpf", "fail", "none", advice))


def ring_buffer() -> Check:
    """Checks whether the kernel has BPF ring buffers."""
    if bpf().state != "ok":
        return Check("ring buffer", "note", "unknown", "cannot be tested; see bpf")
    advice = "this kernel has no BPF ring buffer, which came with 5.8; use a newer kernel"
    return _try_map("ring buffer", _MAP_TYPE_RINGBUF, 0, mmap.PAGESIZE, Check("ring buffer", "fail", "none", advice))


def jit() -> Check:
    """Checks whether the kernel compiles BPF programs (Documentation/admin-guide/sysctl/net.rst)."""
    enabled = _read(_JIT)
    if enabled is None:
        return Check("jit", "note", "unknown", f"{_JIT} cannot be read here, as in a container")
    if enabled == "0":
        advice = "BPF programs are interpreted, which costs several times as much; sysctl net.core.bpf_jit_enable=1"
        return Check("jit", "note", "off", advice)
    return Check("jit", "ok", "on")


def uprobes() -> Check:
    """Checks how uprobes can be attached: by BPF links or, on older kernels, as perf events."""
    if _read(_UPROBE_PMU) is None:
        advice = f"this kernel has no uprobes ({_UPROBE_PMU} is missing: CONFIG_UPROBE_EVENTS); use one that has them"
        return Check("uprobes", "fail", "none", advice)
    try:
        by_links = links_work()
    except OSError:
        return Check("uprobes", "note", "unknown", "cannot be tested; see capabilities and bpf")
    if by_links:
        return Check("uprobes", "ok", "by BPF links")
    if _effective_capabilities() >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1:
        return Check("uprobes", "ok", "as perf events")
    return Check("uprobes", "note", "as perf events", PERF_EVENTS_ADVICE)


def lockdown(text: str | None = None) -> Check:
    """Checks the lockdown state (kernel_lockdown(7)) in the text of its file; by default the running kernel's."""
    text = text or _read(_LOCKDOWN)
    if text is None:
        advice = f"{_LOCKDOWN} cannot be read: securityfs is not mounted, or the kernel has no lockdown"
        return Check("lockdown", "note", "unknown", advice)
    active = re.search(r"\[(\w+)\]", text)
    state = active[1] if active else text
    if state == "confidentiality":
        advice = (
            "kernel lockdown “confidentiality” keeps BPF from reading system calls' arguments; boot with "
            "lockdown=integrity or without lockdown"
        )
        return Check("lockdown", "fail", state, advice)
    return Check("lockdown", "ok", state)


def _holds(capability: Capability) -> bool:
    return bool(_effective_capabilities() >> capability & 1)


def memory_refusal() -> str:
    """Returns why upstreams cannot be told in nginx's memory here. Empty: they may be."""
    state = lockdown().found
    if state in ("integrity", "confidentiality"):
        return f"the kernel is locked down ({state})"
    return "" if _holds(Capability.SYS_ADMIN) else "CAP_SYS_ADMIN is missing"


def socket_refusal() -> str:
    """Returns why upstreams cannot be told on the socket here. Empty: they may be; the loader rehearses it."""
    if cgroup_root() is None:
        return "no cgroup2 is mounted"
    return "" if _holds(Capability.NET_ADMIN) else "CAP_NET_ADMIN is missing"


def propagation() -> Check:
    """Reports by which ways --propagate can tell upstreams here, and why not by the others."""
    ways: list[str] = []
    reasons: list[str] = []
    if why := socket_refusal():
        reasons.append(f"not on the socket: {why}")
    else:
        try:
            first = "" if fionread_works() else ", only the first request of each connection (FIONREAD)"
            ways.append(f"on the socket{first}")
        except OSError as error:
            reasons.append(f"not on the socket: {error.strerror}")
    if why := memory_refusal():
        reasons.append(f"not in nginx's memory: {why}")
    else:
        ways.append("in nginx's memory" + ", if the kernel is not locked down" * (lockdown().found == "unknown"))
    return Check("propagate", "ok" if ways else "note", "; ".join(ways) or "no way", "; ".join(reasons))


def tracefs() -> Check:
    """Reports where tracefs is mounted. The probes do not need it."""
    mounts = [line.split() for line in (_read(_MOUNTS) or "").splitlines()]
    points = [fields[1] for fields in mounts if len(fields) > 2 and fields[2] == "tracefs"]
    return Check("tracefs", "ok", points[0] if points else "not mounted, and not needed")


def bcc() -> Check:
    """Reports which BCC the loader finds. Starts the loader as a process to ask it."""
    try:
        answer = subprocess.run(loader_command("--version"), capture_output=True, timeout=_BCC_S, check=False)
        told = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return Check("bcc", "fail", "unknown", f"the loader cannot report its BCC: {error}; reinstall this program")
    if "error" in told:
        return Check("bcc", "fail", told["found"], told["error"])
    return Check("bcc", "ok", told["found"])


CHECKS: tuple[Callable[[], Check], ...] = (kernel, capabilities, bpf, ring_buffer, jit, uprobes, lockdown, tracefs)
"""The quick checks. `bcc` is slow, and the loader reports the same problem when it runs."""


def check() -> None:
    """Runs the quick checks. Raises `UserError` if the kernel or the permissions make tracing impossible."""
    for each in CHECKS:
        result = each()
        if result.state == "fail":
            raise UserError(result.advice)

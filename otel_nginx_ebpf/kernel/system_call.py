"""The system call bpf(2), called without libbpf."""

import ctypes

from otel_nginx_ebpf.linux import checked, libc
from otel_nginx_ebpf.machine import this_machine


def bpf(command: int, attribute: ctypes.Structure) -> int:
    """Calls bpf(2) and returns its result. Raises `OSError` if the kernel refuses the command.

    Args:
        command: A member of enum bpf_cmd (linux/bpf.h).
        attribute: The command's part of union bpf_attr.
    """
    return checked(int(libc.syscall(this_machine().bpf, command, ctypes.byref(attribute), ctypes.sizeof(attribute))))

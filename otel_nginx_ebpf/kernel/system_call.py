"""The system call bpf(2), called without libbpf."""

import ctypes

from otel_nginx_ebpf.linux import checked, libc

# x86-64's system call number.
_SYS_BPF = 321


def bpf(command: int, attribute: ctypes.Structure) -> int:
    """Calls bpf(2) and returns its result. Raises `OSError` if the kernel refuses the command.

    Args:
        command: A member of enum bpf_cmd (linux/bpf.h).
        attribute: The command's part of union bpf_attr.
    """
    return checked(int(libc.syscall(_SYS_BPF, command, ctypes.byref(attribute), ctypes.sizeof(attribute))))

"""bpf(2), without a library."""

import ctypes

from otel_nginx_ebpf.linux import checked, libc

# x86-64's system call number.
_SYS_BPF = 321


def bpf(command: int, attribute: ctypes.Structure) -> int:
    """What the command returns. Raises `OSError` where the kernel refuses it.

    Args:
        command: A member of enum bpf_cmd (linux/bpf.h).
        attribute: The command's part of union bpf_attr.
    """
    return checked(int(libc.syscall(_SYS_BPF, command, ctypes.byref(attribute), ctypes.sizeof(attribute))))

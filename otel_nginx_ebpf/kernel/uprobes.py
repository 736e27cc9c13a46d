"""Uprobes attached by BPF links, which do not need CAP_SYS_ADMIN.

The older way is a perf event. Since July 2025 kernels, stable ones too, demand CAP_SYS_ADMIN for it (CVE-2025-38466).
Links for uprobes came with Linux 6.6. They need CAP_BPF and CAP_PERFMON when the program is loaded.
"""

import ctypes
import errno
import os
from functools import cache

from otel_nginx_ebpf.kernel.system_call import bpf

# linux/bpf.h
ATTACH_TYPE = 48  # BPF_TRACE_UPROBE_MULTI
_BPF_PROG_LOAD = 5
_BPF_LINK_CREATE = 28
_PROG_TYPE_KPROBE = 2

PERF_EVENTS_ADVICE = (
    "this kernel has no BPF links for uprobes, which came with Linux 6.6; without them uprobes may need CAP_SYS_ADMIN"
)

# r0 = 0; exit
_PROGRAM = bytes.fromhex("b7000000000000009500000000000000")


class _LinkAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_LINK_CREATE of uprobes."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("path", ctypes.c_char_p),
        ("offsets", ctypes.POINTER(ctypes.c_uint64)),
        ("ref_ctr_offsets", ctypes.c_uint64),
        ("cookies", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("multi_flags", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
    )


class _LoadAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_PROG_LOAD."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("instruction_count", ctypes.c_uint32),
        ("instructions", ctypes.c_char_p),
        ("license", ctypes.c_char_p),
        ("_logging", ctypes.c_uint32 * 4),
        ("kernel_version", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("interface_index", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
    )


def attach(program: int, executable: str, file_offset: int) -> int:
    """Attaches a program of `ATTACH_TYPE` to every process that runs `executable`. Returns the link's descriptor.

    Raises:
        OSError: The kernel refuses the link; EINVAL if it has no links for uprobes.
    """
    offsets = (ctypes.c_uint64 * 1)(file_offset)
    attribute = _LinkAttribute(program, 0, ATTACH_TYPE, 0, os.fsencode(executable), offsets, count=1)
    return bpf(_BPF_LINK_CREATE, attribute)


def load(instructions: bytes) -> int:
    """Loads instructions as a program of `ATTACH_TYPE` and returns its descriptor. Raises `OSError` on refusal."""
    attribute = _LoadAttribute(
        _PROG_TYPE_KPROBE, len(instructions) // 8, instructions, b"GPL", expected_attach_type=ATTACH_TYPE
    )
    return bpf(_BPF_PROG_LOAD, attribute)


@cache
def links_work() -> bool:
    """Tells whether the kernel has links for uprobes; makes no link. Raises `OSError` if no program may be loaded."""
    program = load(_PROGRAM)
    try:
        # "/" is not a file. A kernel that knows the links gets far enough to answer EBADF.
        os.close(attach(program, "/", 0))
    except OSError as error:
        return error.errno == errno.EBADF
    finally:
        os.close(program)
    return True

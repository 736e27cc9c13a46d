"""How often and how long the kernel ran a BPF program. Counting costs time, so the kernel counts only on request."""

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple

from otel_nginx_ebpf.kernel.system_call import bpf

# linux/bpf.h
_BPF_OBJ_GET_INFO_BY_FD = 15
_BPF_ENABLE_STATS = 32
_BPF_STATS_RUN_TIME = 0

# struct bpf_prog_info up to run_cnt. All bytes must be zero: a length of 0 asks the kernel for no list.
_INFO_BYTES = 208
_RUNS = struct.Struct("=QQ")
_RUNS_AT = 192

_ALWAYS = Path("/proc/sys/kernel/bpf_stats_enabled")


class Runs(NamedTuple):
    """The runs of one program."""

    time_ns: int
    hits: int


class _StatsAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_ENABLE_STATS."""

    _fields_ = (("kind", ctypes.c_uint32),)


class _InfoAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_OBJ_GET_INFO_BY_FD."""

    _fields_ = (("object_fd", ctypes.c_uint32), ("info_bytes", ctypes.c_uint32), ("info", ctypes.c_uint64))


def runs_of(program: int) -> Runs:
    """Returns the runs that the kernel counted since the program was loaded. `program` is its descriptor."""
    info = ctypes.create_string_buffer(_INFO_BYTES)
    bpf(_BPF_OBJ_GET_INFO_BY_FD, _InfoAttribute(program, _INFO_BYTES, ctypes.addressof(info)))
    return Runs(*_RUNS.unpack_from(info, _RUNS_AT))


class Counting:
    """Makes the kernel count the runs of every program of the machine, until `close`.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, EINVAL before Linux 5.8. Not raised if the kernel always counts
            (sysctl kernel.bpf_stats_enabled).
    """

    def __init__(self) -> None:
        self._descriptor = None if _counts_always() else bpf(_BPF_ENABLE_STATS, _StatsAttribute(_BPF_STATS_RUN_TIME))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _counts_always() -> bool:
    try:
        return _ALWAYS.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False

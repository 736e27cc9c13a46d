"""What several packages use of Linux: the C library, with its errors as `OSError`, and the capabilities."""

import ctypes
import os
from enum import IntEnum

libc = ctypes.CDLL(None, use_errno=True)


class Capability(IntEnum):
    """The capabilities that this program speaks of (linux/capability.h)."""

    DAC_READ_SEARCH = 2
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_ADMIN = 12
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    PERFMON = 38
    BPF = 39


def checked(result: int) -> int:
    """Returns the result of a function of `libc`.

    Raises:
        OSError: The result is negative: the call failed.
    """
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result

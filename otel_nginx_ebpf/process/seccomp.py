"""Refuses system calls that the emitter does not need (seccomp(2)).

The emitter reads what clients send. A client that takes over the emitter cannot execute a program, look into another
process, or reach the parts of the kernel where most holes were found. The list says what is refused: a list of what is
allowed would have to follow each release of Python, gRPC and the C library. The filter is written as instructions: the
library for it (pyseccomp) has had no release since 2021, and these are few.
"""

import ctypes
import struct

from otel_nginx_ebpf.linux import libc
from otel_nginx_ebpf.machine import Machine, this_machine

# linux/bpf.h: what the emitter does with the maps that it was given (`kernel.maps`): lookup, delete, next key, lookup
# batch. It may not make maps, load programs, or find either by id.
_BPF_ALLOWED = (1, 3, 4, 24)
# x86-64 with pointers of 32 bits. No other number is so great.
_X32 = 0x40000000

# linux/prctl.h, linux/seccomp.h
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 1  # EPERM
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16

# linux/filter.h, linux/bpf_common.h: an instruction and its classes.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_of(machine: Machine) -> list[tuple[int, int, int, int]]:
    """Returns the instructions: operation, jump if true, jump if false, operand."""
    commands_at = 6 + len(machine.refused)
    refuse_at = commands_at + len(_BPF_ALLOWED)
    allow_at = refuse_at + 1
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 0, refuse_at - 2, machine.audit_architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, refuse_at - 4, 0, _X32),
        *((_IF_EQUAL, refuse_at - at - 1, 0, number) for at, number in enumerate(machine.refused.values(), 4)),
        (_IF_EQUAL, 0, allow_at - commands_at + 1, machine.bpf),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        *((_IF_EQUAL, allow_at - at - 1, 0, command) for at, command in enumerate(_BPF_ALLOWED, commands_at)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]


def refuse_system_calls() -> bool:
    """Installs the filter for the calling thread, which must have no_new_privs set, and the threads that it starts.

    Returns:
        Whether the kernel supports such filters.
    """
    instructions = filter_of(this_machine())
    program = _Program(len(instructions), b"".join(_INSTRUCTION.pack(*each) for each in instructions))
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0)

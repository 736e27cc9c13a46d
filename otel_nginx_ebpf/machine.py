"""All that differs between the processors that this program runs on, except what the kernel program needs.

That is in `probes/x86_64.h` and `probes/arm64.h`. The layout of nginx's structs is the same on both.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from otel_nginx_ebpf.errors import UserError

Handling = Literal["emulated", "simulated", "stepped"]
"""What the kernel does about the instruction under a uprobe.

`emulated` (x86-64) and `simulated` (arm64): it does the instruction's work itself. `stepped`: it lets the processor
execute a copy, and is entered once more behind it.
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of processor."""

    name: str
    """As uname(2) says it."""
    title: str
    elf: str
    """pyelftools' name of it."""
    header: str
    """Its file in `probes/`."""
    argument_registers: tuple[frozenset[str], ...]
    """capstone's names of the registers of a function's first arguments."""
    handling: Callable[[bytes], Handling | None]
    """What the kernel does about an instruction. None: it refuses a uprobe there, or we do not know."""
    may_step: bool
    """A probe may sit where the kernel steps, if nothing else is there. On x86-64 that costs too much."""
    hit_us: tuple[float, float] | None
    """What a hit costs nginx if the kernel does not step: in a hot loop, and while nginx proxies.

    None: not measured.
    """
    weakly_ordered: bool
    """Another processor may see writes in another order than they were made, and reads may be made in another order."""
    audit_architecture: int
    """linux/audit.h."""
    bpf: int
    """The number of bpf(2)."""
    refused: Mapping[str, int]
    """The numbers of the system calls that the emitter may not call (`process.seccomp`)."""


def _on_x86_64(code: bytes) -> Handling:
    """Follows branch_setup_xol_ops and push_setup_xol_ops (arch/x86/kernel/uprobes.c).

    The kernel emulates push %reg, jcc, jmp rel, call rel32 and the one-byte nop.
    """
    emulated = (
        0x50 <= code[0] <= 0x57
        or (code[0] == 0x41 and 0x50 <= code[1] <= 0x57)
        or code[0] in (0x90, 0xE8, 0xE9, 0xEB)
        or 0x70 <= code[0] <= 0x7F
        or (code[0] == 0x0F and 0x80 <= code[1] <= 0x8F)
    )
    return "emulated" if emulated else "stepped"


# Mask and value. The kernel simulates what reads or writes the program counter (arm_probe_decode_insn).
_SIMULATED = (
    (0x7C000000, 0x14000000),  # b, bl
    (0xFF000010, 0x54000000),  # b.cond
    (0x7E000000, 0x34000000),  # cbz, cbnz
    (0x7E000000, 0x36000000),  # tbz, tbnz
    (0x1F000000, 0x10000000),  # adr, adrp
    (0xFFFFFC1F, 0xD61F0000),  # br
    (0xFFFFFC1F, 0xD63F0000),  # blr
    (0xFFFFFC1F, 0xD65F0000),  # ret
)
# It steps all but a few (aarch64_insn_is_steppable). Here are the ones that it refuses, and atomic instructions:
# capstone does not tell which registers those write.
_NOT_STEPPED = (
    (0x3B000000, 0x18000000),  # ldr, ldrsw and prfm relative to the program counter
    (0x3F000000, 0x08000000),  # exclusive and ordered ones, compare and swap
    (0x3F200C00, 0x38200000),  # atomic operations on memory
    (0x3B200C00, 0x19000400),  # cpy…, set…
)
_HINT = (0xFFFFF01F, 0xD503201F)
# aarch64_insn_is_steppable_hint, since Linux 5.8: nop, bti and pointer authentication of the link register.
_STEPPED_HINTS = frozenset((0, *range(24, 32), 32, 34, 36, 38))
# Bits 25 to 28: data processing with immediate values, registers and vectors; loads and stores.
_STEPPED_GROUPS = frozenset((4, 5, 6, 7, 8, 9, 12, 13, 14, 15))


def _on_arm64(code: bytes) -> Handling | None:
    """Follows arch/arm64/kernel/probes/decode-insn.c; Linux 6.13 and later also simulate nop."""
    word = int.from_bytes(code, "little")
    if any(word & mask == value for mask, value in _SIMULATED):
        return "simulated"
    if word & _HINT[0] == _HINT[1]:
        return "stepped" if word >> 5 & 0x7F in _STEPPED_HINTS else None
    if word >> 25 & 0xF not in _STEPPED_GROUPS or any(word & mask == value for mask, value in _NOT_STEPPED):
        return None
    return "stepped"


_X86_64 = Machine(
    name="x86_64",
    title="x86-64",
    elf="x64",
    header="x86_64.h",
    argument_registers=(
        frozenset(("rdi", "edi", "di", "dil")),
        frozenset(("rsi", "esi", "si", "sil")),
        frozenset(("rdx", "edx", "dx", "dl", "dh")),
    ),
    handling=_on_x86_64,
    may_step=False,
    hit_us=(0.6, 1.1),
    weakly_ordered=False,
    audit_architecture=0xC000003E,
    bpf=321,
    refused={
        "execve": 59,
        "ptrace": 101,
        "mount": 165,
        "umount2": 166,
        "init_module": 175,
        "delete_module": 176,
        "kexec_load": 246,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "finit_module": 313,
        "kexec_file_load": 320,
        "execveat": 322,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_uring_register": 427,
        "pidfd_getfd": 438,
    },
)

_ARM64 = Machine(
    name="aarch64",
    title="arm64",
    elf="AArch64",
    header="arm64.h",
    argument_registers=tuple(frozenset((f"x{number}", f"w{number}")) for number in range(3)),
    handling=_on_arm64,
    may_step=True,
    hit_us=None,
    weakly_ordered=True,
    audit_architecture=0xC00000B7,
    bpf=280,
    refused={
        "umount2": 39,
        "mount": 40,
        "unshare": 97,
        "kexec_load": 104,
        "init_module": 105,
        "delete_module": 106,
        "ptrace": 117,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "execve": 221,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "finit_module": 273,
        "execveat": 281,
        "userfaultfd": 282,
        "kexec_file_load": 294,
        "io_uring_setup": 425,
        "io_uring_enter": 426,
        "io_uring_register": 427,
        "pidfd_getfd": 438,
    },
)

MACHINES = (_X86_64, _ARM64)


@cache
def this_machine() -> Machine:
    """Returns the machine that this process runs on. Raises `UserError` if this program does not know it."""
    name = os.uname().machine
    for machine in MACHINES:
        if machine.name == name:
            return machine
    known = " and ".join(machine.title for machine in MACHINES)
    raise UserError(f"this machine is {name}; only {known} are supported so far")

"""Where the kernel keeps the stacks of the programs that can be preempted: with the worker, never with its processor.

Since Linux 6.13, a program with a large stack may get a private stack, one for each processor (bpf_enable_priv_stack()
in kernel/bpf/verifier.c). Another worker can preempt a uprobe's program, and its program then uses the same stack
(bpf_prog_run_array_uprobe() in include/linux/bpf.h, unlike trace_call_bpf()). So no program of a uprobe may have a
private stack. The same holds for a program that two programs of a tracepoint call: the kernel keeps each of the two
from running twice on a processor, but not the program that both call.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import capstone
import pytest

from e2e.agent_process import AgentProcess
from e2e.kernel_maps import loaded_programs
from e2e.nginx_server import NGINX
from e2e.stage import Stage
from otel_nginx_ebpf.kernel import uprobes
from otel_nginx_ebpf.kernel.release import release_numbers
from otel_nginx_ebpf.kernel.system_call import bpf

# linux/bpf.h
PROG_GET_FD_BY_ID, OBJ_GET_INFO_BY_FD = 13, 15
TYPE_KPROBE = 2
"""Of uprobes too."""
INFO = struct.Struct("=II8sIIQ32x16s")
"""struct bpf_prog_info up to jited_prog_insns, and the name."""
MACHINE_CODE_BYTES_MAX = 1 << 20
RELEASE = release_numbers() or (0, 0)


class Words(ctypes.Structure):
    """union bpf_attr, as the commands here have it."""

    _fields_ = (("first", ctypes.c_uint32), ("second", ctypes.c_uint32), ("third", ctypes.c_uint64))


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Loaded:
    kind: int
    name: str
    has_private_stack: bool
    """Whether its machine code uses what its processor has for it."""


def examine(program: int) -> Loaded:
    """What the kernel says of the program of this descriptor."""
    code = ctypes.create_string_buffer(MACHINE_CODE_BYTES_MAX)
    asked = INFO.pack(0, 0, b"", MACHINE_CODE_BYTES_MAX, 0, ctypes.addressof(code), b"")
    info = ctypes.create_string_buffer(asked, INFO.size)
    bpf(OBJ_GET_INFO_BY_FD, Words(program, INFO.size, ctypes.addressof(info)))
    kind, _, _, code_bytes, *_, name = INFO.unpack(info.raw)
    assert 0 < code_bytes <= MACHINE_CODE_BYTES_MAX
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    operands = [operand for *_, operand in disassembler.disasm_lite(code.raw[:code_bytes], 0)]
    # X86_REG_R9 in arch/x86/net/bpf_jit_comp.c is nothing else
    return Loaded(kind, name.rstrip(b"\0").decode(), any("r9" in each for each in operands))


def load_with_large_stack() -> int:
    """A program that reads 128 bytes at address 0 into its stack, and makes no tail call. Its descriptor."""
    instructions = b"".join(
        struct.pack("=BBhi", code, registers, 0, number)
        for code, registers, number in (
            (0xBF, 0xA1, 0),  # r1 = r10
            (0x07, 0x01, -128),  # r1 += -128
            (0xB7, 0x02, 128),  # r2 = 128
            (0xB7, 0x03, 0),  # r3 = 0
            (0x85, 0x00, 112),  # bpf_probe_read_user(r1, r2, r3)
            (0xB7, 0x00, 0),  # r0 = 0
            (0x95, 0x00, 0),  # exit
        )
    )
    return uprobes.load(instructions)


@pytest.mark.skipif(RELEASE < (6, 13), reason="no program has a private stack before Linux 6.13")
def test_the_test_sees_a_private_stack() -> None:
    """What the kernel here does to a program that does not guard against it."""
    with closing(load_with_large_stack()) as program:
        loaded = examine(program)
        assert (loaded.kind, loaded.has_private_stack) == (TYPE_KPROBE, True)


@pytest.mark.parametrize(
    "options",
    [
        "--pid {pid}",
        "--binary {binary} --adopt-upstream-context --keep-errors --metrics-listen 127.0.0.1:0 "
        "--capture-request-headers x-a --exclude /healthz",
        "--pid {pid} --propagate=socket --propagators tracecontext --propagators b3",
    ],
)
@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_preempted_programs_have_none(stage: Stage, tmp_path: Path, options: str) -> None:
    pid = stage.site.nginx.pid
    before = loaded_programs()
    chosen = options.format(pid=pid, binary=NGINX).split()
    agent = AgentProcess(pid, tmp_path, ["run", "--exporter", "line", "--output", "/dev/null", *chosen])
    found = []
    for number in loaded_programs() - before:
        with closing(bpf(PROG_GET_FD_BY_ID, Words(number))) as program:
            found.append(examine(program))
    agent.stop()
    called = [each for each in found if each.name == "tell_attempt"]
    assert len(called) == ("--propagate=socket" in options)
    of_uprobes = [each for each in found if each.kind == TYPE_KPROBE]
    assert of_uprobes
    assert [each for each in of_uprobes + called if each.has_private_stack] == []

"""What the program knows of processors, against the kernel's headers, the C library's and two compilers' code."""

import re
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pytest

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.machine import MACHINES, Handling, Machine
from otel_nginx_ebpf.nginx.binary import Binary, NoSiteError
from otel_nginx_ebpf.process.seccomp import filter_of
from unit.c_compiler import CROSS, DebugInfo, compile_object

COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": CROSS}
ARM64 = next(machine for machine in MACHINES if machine.name == "aarch64")


@pytest.fixture(params=MACHINES, ids=[machine.name for machine in MACHINES])
def machine(request: pytest.FixtureRequest) -> Machine:
    chosen: Machine = request.param
    return chosen


def constants(machine: Machine, header: str, prefix: str) -> dict[str, int]:
    """The macros of a header that are numbers, without their prefix."""
    include = f"#include <{header}>\n"
    preprocess = [COMPILERS[machine.name], "-E", "-dM", "-x", "c", "-"]
    said = subprocess.run(preprocess, input=include, capture_output=True, text=True, check=True).stdout
    names = re.findall(rf"^#define {prefix}(\w+) ", said, re.MULTILINE)
    text = include + "".join(f'"value {name}" = {prefix}{name};\n' for name in names)
    preprocess = [COMPILERS[machine.name], "-E", "-P", "-x", "c", "-"]
    said = subprocess.run(preprocess, input=text, capture_output=True, text=True, check=True).stdout
    return {name: int(value, 0) for name, value in re.findall(r'^"value (\w+)" = (\d+);', said, re.MULTILINE)}


def header_of(machine: Machine) -> str:
    return (files("otel_nginx_ebpf.probes") / machine.header).read_text(encoding="utf-8")


def test_numbers_of_system_calls(machine: Machine) -> None:
    numbers = constants(machine, "asm/unistd.h", "__NR_")
    refused: Mapping[str, int] = machine.refused
    assert {name: numbers.get(name) for name in (*refused, "bpf")} == {**refused, "bpf": machine.bpf}
    in_c = {name: int(n) for name, n in re.findall(r"^#define SYS_(\w+) (\d+)$", header_of(machine), re.MULTILINE)}
    assert in_c == {name: numbers.get(name) for name in in_c}
    # What one machine has and the other has not.
    every = {name for each in MACHINES for name in re.findall(r"#define SYS_(\w+)", header_of(each))}
    assert every - in_c.keys() == every - numbers.keys()


def test_the_emitter_may_call_as_little_everywhere() -> None:
    first, *others = (machine.refused.keys() for machine in MACHINES)
    assert all(other == first for other in others)


def test_the_architecture_of_the_filter(machine: Machine) -> None:
    elf_machine = {"x86_64": 62, "aarch64": 183}[machine.name]  # linux/elf-em.h
    assert machine.audit_architecture == 0xC0000000 | elf_machine  # little-endian, 64 bits
    assert filter_of(machine)[1][3] == machine.audit_architecture


def structs_of_probes(machine: Machine) -> DebugInfo:
    types = (files("otel_nginx_ebpf.probes") / "stub_headers/include/linux/types.h").read_text(encoding="utf-8")
    reads = "static long bpf_probe_read_kernel(void *to, unsigned int bytes, const void *from);\n"
    uses = "struct pt_regs *a; struct event *b; struct syscall_entry *c;\n"
    # Not its functions, for which only the kernel has what they call.
    text = re.sub(r"^static .*?^}", "", header_of(machine), flags=re.MULTILINE | re.DOTALL)
    return DebugInfo(compile_object(types + reads + text + uses, compiler=(COMPILERS[machine.name], "-w")))


def test_an_event_of_epoll(machine: Machine) -> None:
    library = DebugInfo(
        compile_object("#include <sys/epoll.h>\nstruct epoll_event *a;\n", compiler=(COMPILERS[machine.name],))
    )
    ours = structs_of_probes(machine)
    assert ours.offsets("event") == library.offsets("epoll_event")
    assert ours.size("event") == library.size("epoll_event")


def test_registers_of_arm64() -> None:
    told = compile_object("#include <asm/ptrace.h>\nstruct user_pt_regs *a;\n", compiler=(CROSS,))
    registers = DebugInfo(told).offsets("user_pt_regs")
    ours = structs_of_probes(ARM64).offsets("pt_regs")
    assert {name: ours[name] for name in registers} == registers
    # arch/arm64/include/asm/ptrace.h, which is not for programs: what follows in the kernel's own.
    assert (ours["orig_x0"], ours["syscallno"]) == (272, 280)
    entry = structs_of_probes(ARM64).offsets("syscall_entry")
    assert entry["number"] - entry["argument1"] == ours["syscallno"] - ours["orig_x0"]
    assert [entry[f"argument{number}"] for number in range(2, 7)] == [0, 8, 16, 24, 32]


INSTRUCTIONS: tuple[tuple[str, Handling | None], ...] = (
    ("b .", "simulated"),
    ("bl .", "simulated"),
    ("b.eq .", "simulated"),
    ("cbz x1, .", "simulated"),
    ("cbnz w1, .", "simulated"),
    ("tbz x1, #40, .", "simulated"),
    ("tbnz w1, #3, .", "simulated"),
    ("adr x0, .", "simulated"),
    ("adrp x0, .", "simulated"),
    ("br x3", "simulated"),
    ("blr x3", "simulated"),
    ("ret", "simulated"),
    ("paciasp", "stepped"),
    ("pacibsp", "stepped"),
    ("autiasp", "stepped"),
    ("bti c", "stepped"),
    ("bti jc", "stepped"),
    ("nop", "stepped"),
    ("stp x29, x30, [sp, #-32]!", "stepped"),
    ("str x19, [sp, #16]", "stepped"),
    ("mov x29, sp", "stepped"),
    ("mov x19, x0", "stepped"),
    ("sub sp, sp, #64", "stepped"),
    ("ldr x8, [x0, #8]", "stepped"),
    ("ldrb w0, [x1], #1", "stepped"),
    ("fmov d0, x0", "stepped"),
    ("madd x0, x1, x2, x3", "stepped"),
    ("retaa", None),
    ("blraaz x3", None),
    ("ldr x0, .", None),
    ("ldrsw x0, .", None),
    ("prfm pldl1keep, .", None),
    ("ldxr x0, [x1]", None),
    ("stlr x0, [x1]", None),
    ("casal x0, x1, [x2]", None),
    ("swp x2, x0, [x3]", None),
    ("ldadd x2, x1, [x3]", None),
    ("mrs x0, tpidr_el0", None),
    ("msr tpidr_el0, x0", None),
    ("svc #0", None),
    ("brk #0", None),
    ("wfi", None),
    ("yield", None),
    ("udf #0", None),
)


def test_instructions_of_arm64(tmp_path: Path) -> None:
    source, target = tmp_path / "code.s", tmp_path / "code.bin"
    source.write_text("\n".join(instruction for instruction, _ in INSTRUCTIONS) + "\n")
    assemble = ["aarch64-linux-gnu-as", "-march=armv8.5-a", "-o", tmp_path / "code.o", source]
    subprocess.run(assemble, check=True)
    extract = ["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", tmp_path / "code.o", target]
    subprocess.run(extract, check=True)
    code = target.read_bytes()
    assert len(code) == 4 * len(INSTRUCTIONS)
    found = [(text, ARM64.handling(code[4 * i : 4 * i + 4])) for i, (text, _) in enumerate(INSTRUCTIONS)]
    assert found == list(INSTRUCTIONS)


FUNCTIONS = """\
int ngx_http_core_module = 1;
const char version[] = "\\0nginx version: nginx/1.26.3\\n";
long ngx_outside(long, long);
__attribute__((noinline)) long ngx_calls(long a, long b) { return ngx_outside(b, a) + a; }
__attribute__((noinline)) long ngx_tests(long *a, long b) { return b ? a[b] : 7; }
__attribute__((noinline)) long ngx_reads(long *a, long b) { return *a + b; }
#define FUNCTION(name, ...) \\
    __asm__(".globl " #name "\\n.type " #name ",%function\\n" #name ":" #__VA_ARGS__ "\\n.size " #name ",.-" #name)
FUNCTION(ngx_counts, ldadd x0, x0, [x1]; ret);
FUNCTION(ngx_loops, nop; 1: cbz x1, 2f; sub x1, x1, 1; b 1b; 2: ret);
__attribute__((noinline)) long ngx_names(long a) { ngx_http_core_module = a; return 0; }
"""


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Binary:
    """What an nginx looks like to `Binary`, with functions that begin as those of Debian and Fedora do."""
    path = tmp_path_factory.mktemp("arm64") / "nginx"
    flags = ["-O2", "-march=armv8.2-a", "-mbranch-protection=standard", "-shared", "-nostdlib", "-fPIC", "-x", "c"]
    subprocess.run([CROSS, *flags, "-o", path, "-"], input=FUNCTIONS, text=True, check=True)
    return Binary(path)


@pytest.mark.parametrize(
    ("function", "arguments", "site"),
    [
        # Saves registers, and then calls what may overwrite the arguments.
        ("ngx_calls", 2, "+0 (paciasp) stepped"),
        ("ngx_tests", 2, "+4 (cbz) simulated"),
        ("ngx_reads", 1, "+0 (bti) stepped"),
        ("ngx_reads", 0, "+12 (ret) simulated"),
        ("ngx_names", 1, "+4 (adrp) simulated"),
        # Its first simulated instruction begins a loop.
        ("ngx_loops", 1, "+0 (nop) stepped"),
    ],
)
def test_sites_of_arm64(protected: Binary, function: str, arguments: int, site: str) -> None:
    found = protected.site(function, arguments)
    assert found.address == protected.address(function) + found.displacement
    assert f"+{found.displacement} ({found.instruction.split()[0]}) {found.handling}" == site


def test_no_site_behind_what_cannot_be_stepped(protected: Binary) -> None:
    with pytest.raises(NoSiteError, match="ngx_counts has no instruction to probe cheaply before `ldadd"):
        protected.site("ngx_counts", 0)


def test_a_binary_of_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "nginx"
    content = bytearray(Path("/usr/sbin/nginx").read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # e_machine, EM_RISCV
    path.write_bytes(content)
    with pytest.raises(UserError, match="is built for RISC-V; only x86-64 and arm64 are supported so far"):
        Binary(path)

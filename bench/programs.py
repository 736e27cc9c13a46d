"""Compiles BPF programs, and reads what the kernel counts for ours, with bpftool."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

from otel_nginx_ebpf.kernel.loader import import_bcc
from otel_nginx_ebpf.kernel.runs import Counting


class Program(NamedTuple):
    """Counts of a program. `runs` and `run_ns` grow only within `counting`. `instructions` is after the verifier."""

    name: str
    instructions: int
    machine_code_bytes: int
    runs: int
    run_ns: int


def _bpftool(*arguments: str) -> Any:
    output = subprocess.run(["bpftool", "--json", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def programs_of(pid: int) -> list[Program]:
    """Return the programs that the process has attached."""
    # The process holds a link, whose fdinfo names the program, or a perf event.
    links = (path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir())
    identifiers = {int(number) for text in links for number in re.findall(r"^prog_id:\s+(\d+)$", text, re.MULTILINE)}
    identifiers |= {each["prog_id"] for each in _bpftool("perf", "show") if each["pid"] == pid}
    return [parse_program(_bpftool("prog", "show", "id", str(identifier))) for identifier in sorted(identifiers)]


def parse_program(shown: dict[str, Any]) -> Program:
    """Read the output of `bpftool prog show`. Without BTF the kernel knows only 15 characters of a name."""
    return Program(
        name=shown["name"].removeprefix("enter_ngx_http_"),
        instructions=shown["bytes_xlated"] // 8,
        machine_code_bytes=shown.get("bytes_jited", 0),
        runs=shown.get("run_cnt", 0),
        run_ns=shown.get("run_time_ns", 0),
    )


def compile_program(text: str) -> Any:
    """Compile BPF C as the loader does, and return the `bcc.BPF`."""
    with as_file(files("otel_nginx_ebpf.probes") / "stub_headers") as headers:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers)
        return import_bcc().BPF(text=text, cflags=["-g0"])


@contextmanager
def counting() -> Iterator[None]:
    """Let the kernel count the runs of programs and their time. This costs about 50 ns a run. Ends with the block."""
    with closing(Counting()):
        yield

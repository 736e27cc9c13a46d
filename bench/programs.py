"""The kernel's own accounts of our BPF programs, by bpftool."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")


class Program(NamedTuple):
    """`runs` and `run_ns` count only while `counting`; `instructions` are the verifier's, 8 bytes each."""

    name: str
    instructions: int
    machine_code_bytes: int
    runs: int
    run_ns: int


def _bpftool(*arguments: str) -> Any:
    output = subprocess.run(["bpftool", "--json", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def programs_of(pid: int) -> list[Program]:
    """The programs that the process holds attached."""
    # By a link's descriptor, which says so itself, or by a perf event's.
    links = (path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir())
    identifiers = {int(number) for text in links for number in re.findall(r"^prog_id:\s+(\d+)$", text, re.MULTILINE)}
    identifiers |= {each["prog_id"] for each in _bpftool("perf", "show") if each["pid"] == pid}
    return [parse_program(_bpftool("prog", "show", "id", str(identifier))) for identifier in sorted(identifiers)]


def parse_program(shown: dict[str, Any]) -> Program:
    """Of what `bpftool prog show` tells. Without BTF the kernel knows a name's first 15 characters."""
    return Program(
        name=shown["name"].removeprefix("enter_ngx_http_"),
        instructions=shown["bytes_xlated"] // 8,
        machine_code_bytes=shown.get("bytes_jited", 0),
        runs=shown.get("run_cnt", 0),
        run_ns=shown.get("run_time_ns", 0),
    )


@contextmanager
def counting() -> Iterator[None]:
    """The kernel counts programs' runs and their time, which costs some 50 ns a run; then as it was before."""
    before = _STATISTICS.read_text()
    _STATISTICS.write_text("1")
    try:
        yield
    finally:
        _STATISTICS.write_text(before)

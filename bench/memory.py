"""Measures resident memory of the emitter, and what its libraries add."""

import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collector.process import official
from e2e.agent_process import OPT_IN, AgentProcess
from e2e.nginx_server import free_ports, wait_until

from bench.emitter import COUNTING_COLLECTOR
from bench.load import at_most_speed
from bench.machine import cpu_ns
from bench.site import SCENARIOS, Site

HOUR_RATE = 50
"""Requests a second. The measurement makes as many requests as an hour at this rate has: 180,000."""
_LOAD = 20_000
_BURST = 100_000

_GROUPS = {
    "ring buffer": r"anon_inode:bpf-map",
    "BCC, LLVM": r"libbcc|libLLVM|libclang|/bcc/",
    "gRPC": r"/grpc/",
    "protobuf": r"/google/",
    "OpenSSL": r"libssl|libcrypto",
    "Python and modules": r"python3|libpython",
    "heap": r"^(\[heap\]|\[stack.*\]|\[anon.*\]|)$",
}


def parse_smaps(text: str) -> list[tuple[str, int]]:
    """Return the file name (empty without a file) and the resident kB of each mapping in /proc/PID/smaps."""
    found: list[tuple[str, int]] = []
    for line in text.splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            found.append((line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) > 5 else "", 0))
        elif line.startswith("Rss:"):
            found[-1] = (found[-1][0], int(line.split()[1]))
    return found


def by_group(mappings: list[tuple[str, int]]) -> dict[str, float]:
    """Return resident MB of each group of files in `_GROUPS`, and of all other files."""
    totals = dict.fromkeys([*_GROUPS, "other"], 0.0)
    for name, resident_kb in mappings:
        group = next((group for group, pattern in _GROUPS.items() if re.search(pattern, name)), "other")
        totals[group] += resident_kb / 1024
    return totals


def resident(pid: int) -> dict[str, Any]:
    """Return the resident memory of a process in MB, from /proc/PID/smaps_rollup and /proc/PID/smaps."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    totals = {
        name: int(kb) / 1024 for name, kb in re.findall(r"^(Rss|Pss|Private_Dirty): +(\d+) kB$", rollup, re.MULTILINE)
    }
    mappings = parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
    bcc = [name for name, _ in mappings if re.search(_GROUPS["BCC, LLVM"], name)]
    return {**totals, "by_group": by_group(mappings), "bcc_or_llvm_mapped": bcc}


def over_time(site: Site, directory: Path, advance: Callable[[str], None]) -> dict[str, Any]:
    """Return the emitter's memory while it sends to a collector.

    Looks four times: attached, after load, after a burst, and after as many requests as an hour has. All requests run
    at full speed, so the queue fills. Before each look the collector has received everything.
    """
    (port,) = free_ports(1)
    collector = official(COUNTING_COLLECTOR.format(port=port), [port], directory)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    environment |= dict.fromkeys(OPT_IN, "")  # as by default
    agent = AgentProcess(site.nginx.pid, directory, ["run", "--pid", str(site.nginx.pid)], environment)
    found: dict[str, Any] = {}
    sent = 0
    try:
        for moment, requests in (
            ("attached", 0),
            ("load", _LOAD),
            ("burst", _BURST),
            ("an hour", 3600 * HOUR_RATE - _LOAD - _BURST),
        ):
            advance(f"memory {moment}: {requests} requests")
            if requests:
                at_most_speed([site.url(SCENARIOS["proxied"])], SCENARIOS["proxied"], requests)
            sent += requests
            _wait_for_quiet(agent.emitter_pid)
            found[moment] = {"requests": sent, **resident(agent.emitter_pid)}
    finally:
        agent.stop()
        collector.stop()
    return {"moments": found, "last_line": agent.stderr().strip().splitlines()[-1]}


def _wait_for_quiet(pid: int) -> None:
    """Wait until the process uses hardly any processor time for a second."""
    seen: list[int] = []

    def quiet() -> bool:
        seen.append(cpu_ns(pid))
        return len(seen) > 100 and seen[-1] - seen[-100] < 30_000_000

    wait_until(quiet, "the program to have nothing to do", 120)


_IMPORTS = {
    "Python": "",
    "the program without exporters": "otel_nginx_ebpf.emitter.loop",
    "and the SDK": "opentelemetry.sdk.trace.export",
    "and OTLP's protobuf messages": "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
    "and the exporter over HTTP": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "and the exporter over gRPC": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "and the command line, which does not stay": "otel_nginx_ebpf.cli",
    "and the reader of binaries": "otel_nginx_ebpf.planner.plan",
}


def of_imports() -> dict[str, float]:
    """Return resident MB of a Python process after each import; the imports add up."""
    pages = "int(open('/proc/self/statm').read().split()[1])"
    steps = "".join(
        (f"import {modules}\n" if modules else "")
        + f"print({name!r}, {pages} * {mmap.PAGESIZE} / 1048576, sep='\\t')\n"
        for name, modules in _IMPORTS.items()
    )
    output = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, value in (line.split("\t") for line in output.splitlines())}

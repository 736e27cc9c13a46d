"""Figures that do not depend on the load: instructions of the BPF programs, and of the way from record to OTLP."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.programs import programs_of
from bench.recording import record
from bench.site import Site
from bench.variants import Variant, tracing
from otel_nginx_ebpf.traces.capture import read_capture

RECORDS = 400


def bpf_programs(site: Site) -> list[dict[str, Any]]:
    """Our programs as the kernel has them: instructions after the verifier, and bytes of machine code."""
    with tracing(Variant.parse("on"), site.nginx.pid) as agent:
        assert agent is not None
        return [
            {"program": each.name, "instructions": each.instructions, "machine_code_bytes": each.machine_code_bytes}
            for each in programs_of(agent.pid)
        ]


def instructions_a_request(site: Site) -> float:
    """Processor instructions from a record's bytes to its spans' OTLP bytes, by callgrind.

    Of the second half of the recorded requests, when all caches of names and attributes are as full as they get.
    """
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as directory:
        capture, out = Path(directory, "capture"), Path(directory, "out")
        record(site, capture, RECORDS, lambda _: None)
        # bench.replay calls getppid at the start and the end of that half: the second dump has what was between.
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-before=getppid"]
        subprocess.run(
            [*valgrind, sys.executable, "-m", "bench.replay", capture, str(RECORDS // 2)],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=True,
            capture_output=True,
        )
        replayed = sum(1 for _ in read_capture(capture)) - RECORDS // 2
        return parse_totals(Path(f"{out}.2").read_text()) / replayed


def parse_totals(dump: str) -> int:
    """Instructions, out of a callgrind dump. Raises RuntimeError where it has none."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE)
    if found is None:
        raise RuntimeError("callgrind's dump has no totals")
    return int(found[1])

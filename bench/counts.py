"""Counts instructions from record to OTLP. The figure does not depend on the load."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.recording import record
from bench.site import Site
from otel_nginx_ebpf.traces.capture import read_capture

RECORDS = 400


def instructions_a_request(site: Site, *more: str) -> float:
    """Return how many processor instructions a request takes from its record's bytes to OTLP bytes, by callgrind.

    `more` has more arguments of bench.replay.
    Counts only the second half of the recorded requests. By then the caches of names and attributes are full.
    """
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as directory:
        capture, out = Path(directory, "capture"), Path(directory, "out")
        record(site, capture, RECORDS, lambda _: None)
        # bench.replay calls getppid at the start and at the end of that half, so the second dump has that half.
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-before=getppid"]
        subprocess.run(
            [*valgrind, sys.executable, "-m", "bench.replay", capture, str(RECORDS // 2), *more],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=True,
            capture_output=True,
        )
        replayed = sum(1 for _ in read_capture(capture)) - RECORDS // 2
        return parse_totals(Path(f"{out}.2").read_text()) / replayed


def parse_totals(dump: str) -> int:
    """Return the instructions in a callgrind dump. Raise RuntimeError if the dump has no totals."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE)
    if found is None:
        raise RuntimeError("callgrind's dump has no totals")
    return int(found[1])

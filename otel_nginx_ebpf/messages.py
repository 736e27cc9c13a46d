"""What the program says on stderr: lines that begin with its name."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from otel_nginx_ebpf.printable import printable

PROGRAM = "otel-nginx-ebpf"


def complain(text: str) -> None:
    print(f"{PROGRAM}: {printable(text)}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """For each process of the program once."""
    logging.basicConfig(format=f"{PROGRAM}: %(message)s", level=logging.INFO)


@contextmanager
def stderr_kept() -> Iterator[None]:
    """What this process and those that it starts write to a terminal at stderr comes at the end."""
    if not os.isatty(2):
        yield
        return
    terminal, kept = os.dup(2), os.memfd_create("stderr")
    os.dup2(kept, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.lseek(kept, 0, os.SEEK_SET)
        while piece := os.read(kept, 1 << 16):
            os.write(2, piece)
        os.close(kept)
        os.close(terminal)


def last_kept_line() -> str:
    """What was written last to a stderr that is kept; empty where it is not."""
    try:
        size = os.fstat(2).st_size
        return os.pread(2, 4096, max(size - 4096, 0)).decode(errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""

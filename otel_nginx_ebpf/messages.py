"""What the program says on stderr: lines that begin with its name."""

import logging
import sys

from otel_nginx_ebpf.printable import printable

PROGRAM = "otel-nginx-ebpf"


def complain(text: str) -> None:
    print(f"{PROGRAM}: {printable(text)}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """For each process of the program once."""
    logging.basicConfig(format=f"{PROGRAM}: %(message)s", level=logging.INFO)

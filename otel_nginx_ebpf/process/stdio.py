"""Writes the program's messages to stderr, and closes stdout when its reader is gone."""

import logging
import os
import sys

from otel_nginx_ebpf.printable import printable

PROGRAM = "otel-nginx-ebpf"


def say(text: str) -> None:
    """Writes a line. A closed terminal or pipe (`2>&1 | head -1`) is not an error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # Python flushes at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def complain(text: str) -> None:
    say(f"{PROGRAM}: {printable(text)}")


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_to_stderr() -> None:
    """Sends log messages to stderr. Call it once in each process."""
    logging.basicConfig(format=f"{PROGRAM}: %(message)s", level=logging.INFO, handlers=[_Said()])


def forget_stdout() -> None:
    """Closes stdout after its reader is gone (`| head`), so that Python's flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

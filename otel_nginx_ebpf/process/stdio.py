"""What the program says on stderr, in lines that begin with its name, and stdout when its reader has gone."""

import logging
import os
import sys

from otel_nginx_ebpf.printable import printable

PROGRAM = "otel-nginx-ebpf"


def say(text: str) -> None:
    """Writes a line as it is. Nobody need read it: a closed terminal or pipe (`2>&1 | head -1`) is no error."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        # Python's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def complain(text: str) -> None:
    say(f"{PROGRAM}: {printable(text)}")


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_to_stderr() -> None:
    """For each process of the program once."""
    logging.basicConfig(format=f"{PROGRAM}: %(message)s", level=logging.INFO, handlers=[_Said()])


def forget_stdout() -> None:
    """Whoever read it has seen enough (`| head`). Python's own flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

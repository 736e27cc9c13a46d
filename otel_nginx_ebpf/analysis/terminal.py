"""Protects the user's terminal while another process of the program draws in it."""

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def mode_kept() -> Iterator[None]:
    """Restores the mode of the terminal at stdin at the end, even if the process that used the terminal was killed."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:  # stdin is not a terminal
        yield
        return
    try:
        yield
    finally:
        # The kernel would stop a process that is not in the terminal's foreground.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with suppress(OSError, termios.error):
            os.tcsetpgrp(0, os.getpgrp())
            termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def stderr_kept() -> Iterator[None]:
    """Holds back what this process and its children write to stderr, if it is a terminal, and prints it at the end."""
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
    """Returns the last line that `stderr_kept` holds back; empty if it is not active."""
    try:
        size = os.fstat(2).st_size
        return os.pread(2, 4096, max(size - 4096, 0)).decode(errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""

"""The user's terminal, while another process of the program shows something in it."""

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def mode_kept() -> Iterator[None]:
    """The terminal at stdin is in the end as it was, also where the process that had it was killed."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:  # it is none
        yield
        return
    try:
        yield
    finally:
        # Whoever is not in its foreground would be stopped.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with suppress(OSError, termios.error):
            os.tcsetpgrp(0, os.getpgrp())
            termios.tcsetattr(0, termios.TCSADRAIN, before)


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

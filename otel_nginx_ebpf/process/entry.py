"""Starts the program's processes: each is a new interpreter that calls a function with plain values.

typer, rich and pydantic read the options and settings; they take megabytes and are not needed later. So the command
line of `run` and `record` becomes a new program with the same pid, descriptors and environment (`become`), and that
starts the emitter in the same way (`start`). Each process imports only what it needs.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.process.stdio import PROGRAM, complain, log_to_stderr

INTERRUPTED = 128 + signal.SIGINT

ENDING = (signal.SIGTERM, signal.SIGINT)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def exit_code(work: Callable[[], int]) -> int:
    """Does `work` and returns the exit code: its result, 2 after a `UserError`, 130 after Ctrl-C."""
    log_to_stderr()
    # SIGTERM ends the program as Ctrl-C does, except while the supervisor handles both. SIGINT does so also in the
    # background of a shell, which tells programs to ignore SIGINT.
    for number in ENDING:
        signal.signal(number, _interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return work()
    except UserError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _program(work: Callable[..., int], arguments: tuple[object, ...]) -> tuple[int, list[str]]:
    """Writes the work to a file in memory; returns its descriptor, and the command that does the work."""
    file = os.memfd_create("work", 0)
    os.write(file, pickle.dumps((work, arguments)))
    os.lseek(file, 0, os.SEEK_SET)
    return file, [sys.executable, "-P", "-m", __name__, str(file)]


def become(work: Callable[..., int], *arguments: object) -> NoReturn:
    """Replaces this program, in the same process, by one that calls `work` and exits with its result.

    Args:
        work: A module's function.
        arguments: Plain values.
    """
    _, command = _program(work, arguments)
    # Signals wait until the new program can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    # The arguments are for people who read the list of processes.
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def start(work: Callable[..., int], *arguments: object, keep: Collection[int]) -> "subprocess.Popen[bytes]":
    """Starts a process, in a process group of its own, that calls `work` and exits with its result.

    Args:
        work: A module's function.
        arguments: Plain values.
        keep: Descriptors that the process inherits, with the same numbers.
    """
    file, command = _program(work, arguments)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return subprocess.Popen([*command, work.__name__], pass_fds=(file, *keep), process_group=0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(file)


def main() -> None:
    """Does the work that `become` or `start` left in a file in memory."""
    with suppress(OSError):  # the name that `ps` and `top` show; if /proc is read-only they show Python's
        Path("/proc/self/comm").write_text(PROGRAM, encoding="ascii")
    with open(int(sys.argv[1]), "rb") as file:
        work, arguments = pickle.load(file)
    sys.exit(exit_code(lambda: work(*arguments)))


if __name__ == "__main__":
    main()

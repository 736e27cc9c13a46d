"""How the program's processes begin: plain values and a function to call with them, in a new interpreter.

Options and settings are read by typer, rich and pydantic: megabytes that are of no use later. So the command line of
`run` and `record` becomes (`become`) a new program with the same pid, descriptors and environment, and starts (`start`)
another in the same way. Each imports no more than it needs.
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
    """What the program exits with after `work`: its result, 2 after what the user can mend, 130 after Ctrl-C."""
    log_to_stderr()
    # Until the supervisor handles it, and again after that, SIGTERM ends the program as Ctrl-C does; so does SIGINT,
    # also where a shell that runs the program in its background has told it to ignore that.
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
    """A descriptor that says what to do, and the command that does it."""
    file = os.memfd_create("work", 0)
    os.write(file, pickle.dumps((work, arguments)))
    os.lseek(file, 0, os.SEEK_SET)
    return file, [sys.executable, "-P", "-m", __name__, str(file)]


def become(work: Callable[..., int], *arguments: object) -> NoReturn:
    """Ends this program; the process goes on with `work`, a function of a module, and exits with its result."""
    _, command = _program(work, arguments)
    # Signals that come before the new program can handle them wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    # The arguments are for those who look at the list of processes.
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def start(work: Callable[..., int], *arguments: object, keep: Collection[int]) -> "subprocess.Popen[bytes]":
    """Another process of the program, in a process group of its own, which does `work` and exits with its result.

    Args:
        work: A function of a module.
        arguments: Plain values.
        keep: Descriptors that it has, under the same numbers.
    """
    file, command = _program(work, arguments)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return subprocess.Popen([*command, work.__name__], pass_fds=(file, *keep), process_group=0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(file)


def main() -> None:
    """The program that `become` and `start` start."""
    with suppress(OSError):  # the name that `ps` and `top` show; where /proc may not be written it is Python's
        Path("/proc/self/comm").write_text(PROGRAM, encoding="ascii")
    with open(int(sys.argv[1]), "rb") as file:
        work, arguments = pickle.load(file)
    sys.exit(exit_code(lambda: work(*arguments)))


if __name__ == "__main__":
    main()

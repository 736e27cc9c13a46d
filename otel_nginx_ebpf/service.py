"""What the commands do once their settings are known, and how a process that stays gets rid of all that it took.

Options and settings are read by typer, rich and pydantic: megabytes that are of no use later. So the command line of
`run` and `record` becomes (`become`) a new program with the same pid, descriptors and environment, which gets plain
values. What follows imports no more than it needs.
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from otel_nginx_ebpf.capture import CaptureError, read_capture, read_header
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.messages import PROGRAM, complain, log_to_stderr, stderr_kept
from otel_nginx_ebpf.settings import Settings
from otel_nginx_ebpf.stats import Stats

if TYPE_CHECKING:
    from otel_nginx_ebpf.export import Exporter

INTERRUPTED = 128 + signal.SIGINT

_ENDING = (signal.SIGTERM, signal.SIGINT)


# The agent and the SDK are slow to import, which --help need not wait for.


def run(settings: Settings) -> int:
    """Traces and exports until a signal comes; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import agent

    return _deliver(settings, lambda exporter, stats: agent.run(settings, exporter, stats))


def top(settings: Settings) -> int:
    """Traces, and shows what comes until the user has seen enough; the exit code. Raises `UserError`."""
    with stderr_kept():
        return run(settings)


def record(settings: Settings, path: Path) -> int:
    """Writes the kernel's records to a file until a signal comes; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import agent

    stats = Stats()
    agent.record(settings, path, stats)
    complain(stats.summary())
    return 0


def replay(settings: Settings, path: Path) -> int:
    """Exports what a capture file holds; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import agent
    from otel_nginx_ebpf.progress import with_progress

    frames = read_capture(path)
    if settings.top or not (set(settings.exporter) - {"otlp"} and settings.output is None and sys.stdout.isatty()):
        frames = with_progress(frames, path)
    # A file can wait until the collector has taken what is queued; a running nginx cannot.
    return _deliver(settings, lambda exporter, stats: agent.replay(frames, exporter, stats), wait_for_room=True)


def report(settings: Settings, capture: Path, output: Path) -> int:
    """Writes what a capture file holds as a page; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import agent
    from otel_nginx_ebpf.export.report import Report, open_page
    from otel_nginx_ebpf.progress import with_progress

    stats = Stats()
    notes: list[str] = []
    try:
        read_header(capture)
        with open_page(output, capture) as page:
            contents = Report(stats, query=settings.query)
            try:
                agent.replay(with_progress(read_capture(capture), capture), contents, stats)
            except CaptureError as error:
                notes.append(str(error))
            if stats.lost:
                notes.append(stats.summary())
            page.write(contents.page(capture.name, notes))
    except CaptureError as error:
        notes.append(str(error))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    for note in notes:
        complain(note)
    return 1 if notes else 0


def _deliver(settings: Settings, work: Callable[["Exporter", Stats], None], *, wait_for_room: bool = False) -> int:
    """Runs `work` with an exporter, then delivers what the exporter still holds and prints the counts.

    Returns:
        1 where the input was damaged, 130 where `work` was interrupted, else 0.
    """
    from otel_nginx_ebpf.export import make_exporter
    from otel_nginx_ebpf.export.resource import make_resource

    stats = Stats()
    exporter = make_exporter(settings, stats, make_resource(), wait_for_room=wait_for_room)
    code = 0
    try:
        work(exporter, stats)
    except BrokenPipeError:
        forget_stdout()
    except CaptureError as error:
        complain(str(error))
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        exporter.shutdown(settings.grace_seconds)
        if stats.received or sys.exception() is None:
            complain(stats.summary())
    return code


def forget_stdout() -> None:
    """Whoever read it has seen enough (`| head`). Python's own flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def exit_code(work: Callable[[], int]) -> int:
    """What the program exits with after `work`: its result, 2 after what the user can mend, 130 after Ctrl-C."""
    log_to_stderr()
    # Until the agent handles it, and again after that, SIGTERM ends the program as Ctrl-C does; so does SIGINT, also
    # where a shell that runs the program in its background has told it to ignore that.
    for number in _ENDING:
        signal.signal(number, _interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        return work()
    except UserError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def become(work: Callable[..., int], *arguments: object) -> NoReturn:
    """Ends this program; the process goes on with `work`, a function of a module, and exits with its result."""
    file = os.memfd_create("work", 0)
    os.write(file, pickle.dumps((work, arguments)))
    os.lseek(file, 0, os.SEEK_SET)
    # Signals that come before the new program can handle them wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    # The arguments are for those who look at the list of processes.
    os.execv(sys.executable, [sys.executable, "-P", "-m", __name__, str(file), *sys.argv[1:]])


def main() -> None:
    """The program that `become` starts."""
    with suppress(OSError):  # the name that `ps` and `top` show; where /proc may not be written it is Python's
        Path("/proc/self/comm").write_text(PROGRAM, encoding="ascii")
    with open(int(sys.argv[1]), "rb") as file:
        work, arguments = pickle.load(file)
    sys.exit(exit_code(lambda: work(*arguments)))


if __name__ == "__main__":
    main()

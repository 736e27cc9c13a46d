"""What the commands do once their settings are known."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from otel_nginx_ebpf import handover
from otel_nginx_ebpf.entry import INTERRUPTED
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.handover import Handover
from otel_nginx_ebpf.messages import complain
from otel_nginx_ebpf.settings import Settings
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.terminal import mode_kept, stderr_kept

if TYPE_CHECKING:
    from otel_nginx_ebpf.export import Exporter

# The supervisor and the emitter are two processes: neither imports what is the other's.


def run(settings: Settings) -> int:
    """Traces and exports until a signal comes; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import supervisor

    output = handover.open_output(settings)
    return supervisor.supervise(settings, emit, handover.make_handover(settings, output))


def top(settings: Settings) -> int:
    """Traces, and shows what comes until the user has seen enough; the exit code. Raises `UserError`."""
    with stderr_kept(), mode_kept():
        return run(settings)


def record(settings: Settings, path: Path) -> int:
    """Writes the kernel's records to a file until a signal comes; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import capture, supervisor

    output = capture.create(path)
    # Another emitter could not go on where in the file one was killed.
    return supervisor.supervise(settings, emit_records, handover.make_handover(settings, output), again=False)


def emit(settings: Settings, handed: Handover, channel: int, counts: int) -> int:
    """The emitter's process: exports what the supervisor's probes hand over; the exit code. Raises `UserError`."""
    handover.take_over(handed)
    from otel_nginx_ebpf import emitter
    from otel_nginx_ebpf.channel import EmitterEnd
    from otel_nginx_ebpf.counts import Counts

    stats = Stats()
    kept = Counts(counts, stats)

    def work(exporter: "Exporter") -> float | None:
        kept.settle()
        ring_buffer_bytes = settings.ring_buffer_mib << 20
        reader = emitter.Emitter(EmitterEnd(channel), stats, kept, ring_buffer_bytes)
        return reader.run(emitter.exporting(exporter, stats), exporter.at_once)

    with suppress(emitter.NothingTracedError):
        return _deliver(settings, stats, work, handed.output, live=True)
    return 0


def emit_records(settings: Settings, handed: Handover, channel: int, counts: int) -> int:
    """The emitter's process of `record`: writes what the supervisor's probes hand over; the exit code."""
    handover.take_over(handed)
    from otel_nginx_ebpf import emitter
    from otel_nginx_ebpf.channel import EmitterEnd
    from otel_nginx_ebpf.counts import Counts

    stats = Stats()
    assert handed.output is not None
    reader = emitter.Emitter(EmitterEnd(channel), stats, Counts(counts, stats), settings.ring_buffer_mib << 20)
    with suppress(emitter.NothingTracedError):
        try:
            emitter.record(handed.output, reader, stats)
        except UserError:
            complain(stats.summary())
            raise
        complain(stats.summary())
    return 0


def replay(settings: Settings, path: Path) -> int:
    """Exports what a capture file holds; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import emitter
    from otel_nginx_ebpf.capture import read_capture
    from otel_nginx_ebpf.progress import with_progress

    stats = Stats()

    frames = read_capture(path)
    if settings.top or not (set(settings.exporter) - {"otlp"} and settings.output is None and sys.stdout.isatty()):
        frames = with_progress(frames, path)
    # A file can wait until the collector has taken what is queued; a running nginx cannot.
    output = handover.open_output(settings)
    return _deliver(settings, stats, lambda exporter: emitter.replay(frames, exporter, stats), output, live=False)


def report(settings: Settings, capture: Path, output: Path) -> int:
    """Writes what a capture file holds as a page; the exit code. Raises `UserError`."""
    from otel_nginx_ebpf import emitter
    from otel_nginx_ebpf.capture import CaptureError, read_capture, read_header
    from otel_nginx_ebpf.export.report import Report, open_page
    from otel_nginx_ebpf.progress import with_progress

    stats = Stats()
    notes: list[str] = []
    try:
        read_header(capture)
        with open_page(output, capture) as page:
            contents = Report(stats, query=settings.query)
            try:
                emitter.replay(with_progress(read_capture(capture), capture), contents, stats)
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


def _deliver(
    settings: Settings,
    stats: Stats,
    work: Callable[["Exporter"], float | None],
    output: int | None,
    *,
    live: bool,
) -> int:
    """Runs `work` with an exporter, then delivers what the exporter still holds and prints the counts.

    `work` returns for how many seconds to deliver, or None for as many as `settings` say.

    Returns:
        1 where the input was damaged, 130 where it was interrupted, else 0.
    """
    from otel_nginx_ebpf.capture import CaptureError
    from otel_nginx_ebpf.export import make_exporter
    from otel_nginx_ebpf.export.resource import make_resource

    exporter = make_exporter(settings, stats, make_resource(), output, wait_for_room=not live)
    code = 0
    grace_s = None
    try:
        grace_s = work(exporter)
    except BrokenPipeError:
        forget_stdout()
    except CaptureError as error:
        complain(str(error))
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
        if live:  # The user has asked for the end before.
            grace_s = 0
    finally:
        try:
            exporter.shutdown(settings.grace_seconds if grace_s is None else grace_s)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if stats.received or sys.exception() is None:
            complain(stats.summary())
    return code


def forget_stdout() -> None:
    """Whoever read it has seen enough (`| head`). Python's own flush at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

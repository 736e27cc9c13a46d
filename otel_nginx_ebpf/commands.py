"""Does what a command asks for, once its settings are known."""

import sys
from pathlib import Path

from otel_nginx_ebpf.analysis.terminal import mode_kept, stderr_kept
from otel_nginx_ebpf.emitter.main import emit, emit_records
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.process import handover
from otel_nginx_ebpf.process.stdio import complain
from otel_nginx_ebpf.settings.model import Settings

# The supervisor and the emitter are two processes. Neither imports the other's modules, so imports stand in functions.


def run(settings: Settings) -> int:
    """Traces and exports until a signal comes; returns the exit code. May raise `UserError`."""
    from otel_nginx_ebpf.supervisor import supervise

    output = handover.open_output(settings)
    return supervise.supervise(settings, emit, handover.make_handover(settings, output))


def top(settings: Settings) -> int:
    """Traces and shows the tables until the user quits; returns the exit code. May raise `UserError`."""
    with stderr_kept(), mode_kept():
        return run(settings)


def record(settings: Settings, path: Path) -> int:
    """Writes the kernel's records to a file until a signal comes; returns the exit code. May raise `UserError`."""
    from otel_nginx_ebpf.supervisor import supervise
    from otel_nginx_ebpf.traces import capture

    output = capture.create(path)
    # A new emitter could not continue the file of one that was killed.
    return supervise.supervise(settings, emit_records, handover.make_handover(settings, output), again=False)


def replay(settings: Settings, path: Path) -> int:
    """Exports the requests in a capture file; returns the exit code. May raise `UserError`."""
    from otel_nginx_ebpf.analysis.progress import with_progress
    from otel_nginx_ebpf.emitter import pipeline
    from otel_nginx_ebpf.emitter.deliver import deliver
    from otel_nginx_ebpf.traces.capture import read_capture
    from otel_nginx_ebpf.traces.rules import CapturedRules

    stats = Stats(logs=settings.sends_logs)
    lines = stats.logs if settings.sends_error_log else None
    rules = CapturedRules(settings)
    frames = read_capture(path)
    if settings.top or not (set(settings.exporter) - {"otlp"} and settings.output is None and sys.stdout.isatty()):
        frames = with_progress(frames, path)
    # A file can wait until there is room in the queue; a running nginx cannot.
    output = handover.open_output(settings)
    return deliver(
        settings, stats, lambda exporter: pipeline.replay(frames, exporter, stats, rules, lines), output, live=False
    )


def report(settings: Settings, capture: Path, output: Path) -> int:
    """Writes a page about a capture file; returns the exit code. May raise `UserError`."""
    from otel_nginx_ebpf.analysis.progress import with_progress
    from otel_nginx_ebpf.analysis.report import Report, open_page
    from otel_nginx_ebpf.emitter import pipeline
    from otel_nginx_ebpf.traces.capture import CaptureError, read_capture, read_header
    from otel_nginx_ebpf.traces.choices import choices_of
    from otel_nginx_ebpf.traces.losses import INCOMPLETE, LOST, of_kind
    from otel_nginx_ebpf.traces.rules import CapturedRules

    stats = Stats()
    notes: list[str] = []
    try:
        read_header(capture)
        with open_page(output, capture) as page:
            contents = Report(stats, choices_of(settings))
            try:
                pipeline.replay(
                    with_progress(read_capture(capture), capture),
                    pipeline.Decoding(contents, stats),
                    stats,
                    CapturedRules(settings),
                )
            except CaptureError as error:
                notes.append(str(error))
            if of_kind(stats.lost, LOST + INCOMPLETE):
                notes.append(stats.summary())
            page.write(contents.page(capture.name, notes))
    except CaptureError as error:
        notes.append(str(error))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    for note in notes:
        complain(note)
    return 1 if notes else 0

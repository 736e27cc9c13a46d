"""Runs work with an exporter, delivers what the exporter then still holds, and prints the counts."""

import sys
from collections.abc import Callable

from otel_nginx_ebpf.emitter.exporters import make_exporter
from otel_nginx_ebpf.export.interface import Exporter
from otel_nginx_ebpf.export.resource import make_resource
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.process.entry import INTERRUPTED
from otel_nginx_ebpf.process.stdio import complain, forget_stdout
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.capture import CaptureError


def deliver(
    settings: Settings,
    stats: Stats,
    work: Callable[[Exporter], float | None],
    output: int | None,
    *,
    live: bool,
) -> int:
    """Runs `work` with an exporter, delivers what the exporter still holds, and prints the counts.

    Args:
        settings: Which exporter, and for how long to deliver.
        stats: The counts.
        work: Returns for how many seconds to deliver; `None` means as long as `settings` say.
        output: Descriptor of the text exporter's file; `None` is stdout.
        live: Whether the requests come from a running nginx, which does not wait.

    Returns:
        The exit code: 1 if the input was damaged, 130 if the user interrupted, else 0.
    """
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
        if live:  # This is the second Ctrl-C.
            grace_s = 0
    finally:
        try:
            exporter.shutdown(settings.grace_seconds if grace_s is None else grace_s)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if stats.received or sys.exception() is None:
            complain(stats.summary())
    return code

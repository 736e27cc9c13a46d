"""The emitter's process, from its first call to its exit code.

The supervisor names these functions to a new process, and imports this module for that. So the module imports the rest
of the emitter only when a function is called.
"""

from contextlib import suppress
from typing import TYPE_CHECKING

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.process import handover
from otel_nginx_ebpf.process.handover import Handover
from otel_nginx_ebpf.process.stdio import complain
from otel_nginx_ebpf.settings.model import Settings

if TYPE_CHECKING:
    from otel_nginx_ebpf.export.interface import Exporter

# How many records are written to a capture file before it is flushed, at most.
_WRITTEN_AT_ONCE = 1024


def emit(settings: Settings, handed: Handover, channel: int, counts: int) -> int:
    """Exports the requests that the probes record; returns the exit code.

    Raises:
        UserError: An exporter refuses a setting, or cannot write.
    """
    handover.take_over(handed)
    from otel_nginx_ebpf.emitter.deliver import deliver
    from otel_nginx_ebpf.emitter.loop import Emitter, NothingTracedError
    from otel_nginx_ebpf.metrics.choices import metric_choices_of
    from otel_nginx_ebpf.metrics.kept_stats import KeptStats
    from otel_nginx_ebpf.process.channel import EmitterEnd

    stats = Stats(logs=settings.sends_logs)
    kept = KeptStats(counts, stats)

    def work(exporter: "Exporter") -> float | None:
        kept.settle()
        ring_buffer_bytes = settings.ring_buffer_mib << 20
        lines, choices = stats.logs if settings.sends_error_log else None, metric_choices_of(settings)
        reader = Emitter(EmitterEnd(channel), stats, kept, ring_buffer_bytes, choices, counts_lines=lines)
        return reader.run(exporter.take, exporter.at_once)

    with suppress(NothingTracedError):
        return deliver(settings, stats, work, handed.output, live=True)
    return 0


def emit_records(settings: Settings, handed: Handover, channel: int, counts: int) -> int:
    """Writes what the probes record to a capture file; returns the exit code.

    Raises:
        UserError: The file cannot be written.
    """
    handover.take_over(handed)
    from otel_nginx_ebpf.emitter.loop import Emitter, NothingTracedError
    from otel_nginx_ebpf.emitter.pipeline import writing
    from otel_nginx_ebpf.metrics.kept_stats import KeptStats
    from otel_nginx_ebpf.process.channel import EmitterEnd
    from otel_nginx_ebpf.traces.capture import CaptureWriter

    stats = Stats()
    assert handed.output is not None
    reader = Emitter(EmitterEnd(channel), stats, KeptStats(counts, stats), settings.ring_buffer_mib << 20)
    with suppress(NothingTracedError):
        try:
            with CaptureWriter(handed.output, {}) as writer:
                reader.run(writing(writer, stats), _WRITTEN_AT_ONCE)
        except UserError:
            complain(stats.summary())
            raise
        complain(stats.summary())
    return 0

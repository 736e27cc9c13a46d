"""Makes the exporters that the settings ask for."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otel_nginx_ebpf.emitter.pipeline import Decoding
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.interface import Completed, Exporter, TraceExporter
from otel_nginx_ebpf.export.resource import Resource, Resources
from otel_nginx_ebpf.export.text import TextExporter, open_output
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.settings.model import ExporterName, Settings
from otel_nginx_ebpf.traces.choices import DEFAULT_CHOICES, SpanChoices, choices_of
from otel_nginx_ebpf.traces.phases import phases_of
from otel_nginx_ebpf.traces.rules import service_names_of
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace

if TYPE_CHECKING:
    from otel_nginx_ebpf.export.metrics.own import Metrics
    from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
    from otel_nginx_ebpf.export.otlp.logs import OtlpLogExporter
    from otel_nginx_ebpf.metrics.exemplars import Exemplars


class _Readable:
    """Builds traces and gives each of them to all exporters."""

    at_once = 1
    """One request at a time, so that no request is lost when the reader of stdout exits."""

    def __init__(
        self,
        exporters: Sequence[TraceExporter],
        *,
        choices: SpanChoices = DEFAULT_CHOICES,
        exemplars: "Exemplars | None" = None,
        logs: "OtlpLogExporter | None" = None,
    ) -> None:
        self._exporters = exporters
        self._exemplars = exemplars
        self._logs = logs
        self._ids = RandomIds()
        self._choices = choices
        self._service_names = service_names_of(choices.rules)

    def take(self, completed: Sequence[Completed]) -> None:
        names = self._service_names
        for request, unix_offset_ns, resource in completed:
            trace = build_trace(
                request,
                unix_offset_ns,
                self._ids,
                choices=self._choices,
                resource=names.resource(request.rule, resource) if names else resource,
            )
            for exporter in self._exporters:
                exporter.export(trace)
            if self._logs:
                self._logs.export_trace(trace)
            if self._exemplars:
                phases = zip(phases_of(request), trace.spans, strict=True)
                spans = [(phase, span.span_id, ()) for phase, span in phases]
                if self._exemplars.wants(request, resource, spans):
                    self._exemplars.add(request, unix_offset_ns, resource, spans)

    def shutdown(self, timeout_s: float) -> None:
        for exporter in self._exporters:
            exporter.shutdown(timeout_s)


class _Measured:
    """An exporter with metrics. The metrics are sent until the exporter has delivered everything."""

    def __init__(self, exporter: Exporter, metrics: "Metrics") -> None:
        self._exporter = exporter
        self._metrics = metrics
        self.at_once = exporter.at_once
        self.take = exporter.take

    def shutdown(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self._exporter.shutdown(timeout_s)
        self._metrics.shutdown(deadline_s - time.monotonic())


def make_exporter(
    settings: Settings, stats: Stats, resource: Resource, output: int | None = None, *, wait_for_room: bool = False
) -> Exporter:
    """Makes one exporter of all exporters that `settings` ask for.

    A trace counts as exported once: when the collector has it. Without a collector, it counts when the first exporter
    in the settings has written it.

    Args:
        settings: Names the exporters.
        stats: The counters that the exporters update.
        resource: The resource of the spans, before the attributes of each nginx.
        output: Descriptor of the text exporter's file; `None` is stdout.
        wait_for_room: Whether to wait when the queue is full, instead of dropping.

    Raises:
        UserError: An exporter refuses a setting.
    """
    if settings.top is not None:
        from otel_nginx_ebpf.analysis.top import Top, Totals

        return Decoding(Totals(settings, stats) if settings.top.of_file else Top(settings, stats), stats)
    names = list(dict.fromkeys(settings.exporter))
    if settings.sdk_disabled and "otlp" in names:
        names.remove("otlp")
        if not names:
            raise UserError("OTEL_SDK_DISABLED is true and otlp is the only exporter: there is nothing to do")
    counting = "otlp" if "otlp" in names else names[0]
    uncounted = Stats()
    uncounted.lost = stats.lost
    exporter: Exporter
    metrics = exemplars = None
    if settings.metrics or settings.metrics_listen:
        from otel_nginx_ebpf.export.metrics.own import Metrics

        metrics = Metrics(settings, stats, resource)
        exemplars = metrics.exemplars if settings.measures_requests else None
    logs = _make_logs(settings, stats, resource, wait_for_room)
    if names == ["otlp"]:  # encodes requests without building traces
        exporter = _make_otlp(settings, stats, resource, wait_for_room, exemplars, logs)
    else:
        each = [
            _make(name, settings, stats if name == counting else uncounted, resource, output, wait_for_room)
            for name in names
        ]
        readable = _Readable(each, choices=choices_of(settings), exemplars=exemplars, logs=logs)
        exporter = Decoding(readable, stats, logs)
    return _Measured(exporter, metrics) if metrics else exporter


# Exporters are imported only if chosen, to save time and memory.


def _make_otlp(
    settings: Settings,
    stats: Stats,
    resource: Resource,
    wait_for_room: bool,
    exemplars: "Exemplars | None" = None,
    logs: "OtlpLogExporter | None" = None,
) -> "OtlpExporter":
    from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
    from otel_nginx_ebpf.export.otlp.sender import make_sender

    return OtlpExporter(
        make_sender(settings.otlp_protocol),
        resource,
        stats,
        choices=choices_of(settings),
        exemplars=exemplars,
        logs=logs,
        wait_for_room=wait_for_room,
        **_queue(settings, settings.queue_dir),
    )


def _make_logs(settings: Settings, stats: Stats, resource: Resource, wait_for_room: bool) -> "OtlpLogExporter | None":
    if not stats.logs:
        return None
    from otel_nginx_ebpf.export.otlp.logs import OtlpLogExporter
    from otel_nginx_ebpf.export.otlp.sender import make_sender

    return OtlpLogExporter(
        make_sender(settings.otlp_logs_protocol or settings.otlp_protocol, "logs"),
        resource,
        stats.logs,
        errors=settings.sends_error_log,
        access=settings.sends_access_log,
        query=settings.query,
        wait_for_room=wait_for_room,
        **_queue(settings, settings.queue_dir / "logs" if settings.queue_dir else None),
    )


def _queue(settings: Settings, directory: Path | None) -> dict[str, Any]:
    """Returns how messages of one signal are queued. Traces and log records share the room."""
    from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir

    signals = 2 if settings.sends_logs else 1
    return {
        "queue_spans": settings.queue_size // signals,
        "queue_bytes": (settings.queue_mib << 20) // signals,
        "batch_spans": settings.batch_size,
        "delay_s": settings.batch_delay_ms / 1000,
        "queue_dir": QueueDir(directory, (settings.queue_dir_mib << 20) // signals) if directory else None,
    }


def _make(
    name: ExporterName, settings: Settings, stats: Stats, resource: Resource, output: int | None, wait_for_room: bool
) -> TraceExporter:
    if name == "otlp":
        return _make_otlp(settings, stats, resource, wait_for_room)
    stream = open_output(output, settings.output)
    if name == "console":
        from otel_nginx_ebpf.export.console import make_renderer

        return TextExporter(stream, stats, make_renderer(stream, settings.color))
    if name == "line":
        from otel_nginx_ebpf.export.line import to_line

        return TextExporter(stream, stats, to_line)
    from otel_nginx_ebpf.export.json_lines import to_json

    resources = Resources(resource)
    return TextExporter(stream, stats, lambda trace: to_json(trace, resources.of(trace.resource)))

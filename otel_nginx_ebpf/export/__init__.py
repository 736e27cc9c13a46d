"""Exporters: what can be done with a finished trace."""

from collections.abc import Sequence
from typing import Protocol

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.config import ExporterName, Settings
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.export.text import TextExporter, open_output
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.trace import Trace


class Exporter(Protocol):
    """Takes finished traces. Called from one thread."""

    def export(self, trace: Trace) -> None:
        """Takes one trace; returns at once, but for the time that writing a line to stdout takes.

        Raises:
            BrokenPipeError: The reader of the output is gone.
            UserError: The output cannot be written.
        """

    def shutdown(self, timeout_s: float) -> None:
        """Delivers what it holds, for `timeout_s` seconds at most, and counts the rest as lost."""


class Fanout:
    """Gives every trace to each of several exporters."""

    def __init__(self, exporters: Sequence[Exporter]) -> None:
        self._exporters = exporters

    def export(self, trace: Trace) -> None:
        for exporter in self._exporters:
            exporter.export(trace)

    def shutdown(self, timeout_s: float) -> None:
        for exporter in self._exporters:
            exporter.shutdown(timeout_s)


def make_exporter(settings: Settings, stats: Stats, resource: Resource, *, wait_for_room: bool = False) -> Exporter:
    """The exporter, or exporters, that `settings` ask for; with `wait_for_room` they rather block than drop.

    A trace counts as exported once: when the collector has it or, without a collector, when the first of
    the other exporters has written it.

    Raises:
        UserError: A value that an exporter refuses, or an output file that cannot be opened.
    """
    names = list(dict.fromkeys(settings.exporter))
    texts = [name for name in names if name != "otlp"]
    if settings.output is not None and len(texts) != 1:
        raise UserError(
            "--output (OTEL_NGINX_EBPF_OUTPUT) needs exactly one of the exporters console, line and json; "
            f"--exporter has {', '.join(texts) or 'none of them'}"
        )
    if settings.sdk_disabled and "otlp" in names:
        names.remove("otlp")
        if not names:
            raise UserError("OTEL_SDK_DISABLED is true and otlp is the only exporter: there is nothing to do")
    counting = "otlp" if "otlp" in names else names[0]
    uncounted = Stats()
    uncounted.lost = stats.lost
    made = [_make(name, settings, stats if name == counting else uncounted, resource, wait_for_room) for name in names]
    return made[0] if len(made) == 1 else Fanout(made)


def _make(name: ExporterName, settings: Settings, stats: Stats, resource: Resource, wait_for_room: bool) -> Exporter:
    # Imported where chosen: gRPC and its like cost 0.3 s and 20 MB that a text exporter has no use for.
    if name == "otlp":
        from otel_nginx_ebpf.export.otlp import OtlpExporter, make_sdk_exporter

        return OtlpExporter(
            make_sdk_exporter(settings.otlp_protocol),
            resource,
            stats,
            queue_spans=settings.queue_size,
            batch_spans=settings.batch_size,
            delay_s=settings.batch_delay_ms / 1000,
            wait_for_room=wait_for_room,
        )
    stream = open_output(settings.output)
    if name == "console":
        from otel_nginx_ebpf.export.console import make_renderer

        return TextExporter(stream, stats, make_renderer(stream, settings.color))
    if name == "line":
        from otel_nginx_ebpf.export.line import to_line

        return TextExporter(stream, stats, to_line)
    from otel_nginx_ebpf.export.json_lines import to_json

    resources = Resources(resource)
    return TextExporter(stream, stats, lambda trace: to_json(trace, resources.of(trace)))

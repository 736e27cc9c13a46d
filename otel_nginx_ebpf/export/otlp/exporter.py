"""Sends traces to a collector over OTLP."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.interface import Record
from otel_nginx_ebpf.export.otlp.delivery import Delivery
from otel_nginx_ebpf.export.otlp.encoding import Encoder
from otel_nginx_ebpf.export.otlp.records import RecordEncoder
from otel_nginx_ebpf.export.otlp.sender import Sender
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.choices import DEFAULT_CHOICES, SpanChoices
from otel_nginx_ebpf.traces.model import Trace
from otel_nginx_ebpf.traces.record import RecordError, decode
from otel_nginx_ebpf.traces.rules import service_names_of
from otel_nginx_ebpf.traces.spans import RandomIds

if TYPE_CHECKING:
    from otel_nginx_ebpf.export.otlp.logs import OtlpLogExporter
    from otel_nginx_ebpf.metrics.exemplars import Exemplars


class OtlpExporter(Delivery):
    """Encodes traces, and delivers them."""

    at_once = 64

    def __init__(
        self,
        sender: Sender,
        resource: Resource,
        stats: Stats,
        *,
        choices: SpanChoices = DEFAULT_CHOICES,
        exemplars: "Exemplars | None" = None,
        logs: "OtlpLogExporter | None" = None,
        **delivery: Any,
    ) -> None:
        """`logs` gets the lines of the error log. `delivery`: how to queue, as `Delivery` has it."""
        self._encoder = Encoder(RandomIds().generate_span_id, choices)
        self._service_names = service_names_of(choices.rules)
        self._record_encoder = RecordEncoder(
            self._encoder, keeps_log_records=logs is not None and logs.errors, service_names=self._service_names
        )
        self._logs = logs
        self._stats = stats
        self._exemplars = exemplars
        super().__init__(sender, resource, stats, **delivery)

    def take(self, records: Sequence[Record]) -> None:
        encoded = self._record_encoder.encode(records)
        kept, served = [], []
        names = self._service_names
        with self._lock:
            for record, each in encoded:
                if isinstance(each, RecordError):
                    self._stats.lose_damaged(each)
                    continue
                data, spans, impossible, alike = each
                if impossible:
                    self._stats.lose("partial_impossible_value", impossible)
                resource = names.resource_of_record(record[0], record[2]) if names else record[2]
                if self._logs:
                    served.append(((record[0], record[1], resource), spans))
                if self._add(resource, data, len(spans)):
                    kept.append((record, spans, alike))
        lines = self._record_encoder.log_lines
        self._stats.lose_log_lines(lines.take_lost())
        if self._logs:
            self._logs.export_requests(served)
            self._logs.export(self._record_encoder.log_records)
            self._record_encoder.log_records.clear()
            self._logs.take_untraced(lines)
        if self._exemplars:
            for (raw, unix_offset_ns, resource), spans, alike in kept:
                if self._exemplars.wants(alike, resource, spans):
                    self._exemplars.add(decode(raw), unix_offset_ns, resource, spans)

    def shutdown(self, timeout_s: float) -> None:
        lines = self._record_encoder.log_lines
        with self._logs.closing(lines, timeout_s) if self._logs else nullcontext():
            super().shutdown(timeout_s)

    def export(self, trace: Trace) -> None:
        """Takes a trace in the readable model."""
        try:
            encoded = self._encoder.encode_trace(trace)
        except RecordError as error:
            self._stats.lose_damaged(error)
        else:
            with self._lock:
                self._add(trace.resource, encoded, len(trace.spans))

"""Sends log records to a collector over OTLP."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.interface import Record
from otel_nginx_ebpf.export.otlp.delivery import Delivery
from otel_nginx_ebpf.export.otlp.encoding import encode_access_record, encode_log_record
from otel_nginx_ebpf.export.otlp.records import ids_of
from otel_nginx_ebpf.export.otlp.sender import Sender
from otel_nginx_ebpf.metrics.stats import Deliveries
from otel_nginx_ebpf.traces.error_log import LogLines
from otel_nginx_ebpf.traces.logs import LogRecord, of_access, of_trace, of_untraced
from otel_nginx_ebpf.traces.model import Trace
from otel_nginx_ebpf.traces.record import RecordError
from otel_nginx_ebpf.traces.spans import BuiltSpan


class OtlpLogExporter(Delivery):
    """Encodes log records, and delivers them."""

    whom = "collector of logs"

    def __init__(
        self,
        sender: Sender,
        resource: Resource,
        counts: Deliveries,
        *,
        errors: bool = True,
        access: bool = False,
        query: bool = True,
        **delivery: Any,
    ) -> None:
        """Which records to send, and how.

        Args:
            sender: Sends messages.
            resource: The resource of records whose nginx is not known.
            counts: Counts the records.
            errors: Whether to send the lines of the error log. Whoever reads them counts them as received.
            access: Whether to send a record for each request.
            query: Whether to keep the query strings of URIs in lines without a trace.
            delivery: How to queue, as `Delivery` has it.
        """
        self.errors, self.access = errors, access
        self._query = query
        super().__init__(sender, resource, counts, **delivery)

    def export_trace(self, trace: Trace) -> None:
        """Takes the lines of the error log on a trace, and its request."""
        if self.errors:
            self.export(of_trace(trace))
        if self.access:
            self._counts.received += 1
            self.export([of_access(trace)])

    def export_requests(self, requests: Iterable[tuple[Record, list[BuiltSpan[bytes]]]]) -> None:
        """Takes encoded requests, if a record is to be sent for each."""
        if not self.access:
            return
        with self._lock:
            for (raw, unix_offset_ns, resource), spans in requests:
                self._counts.received += 1
                self._add(resource, encode_access_record(spans[0], ids_of(raw), unix_offset_ns), 1)

    def export(self, records: Iterable[LogRecord]) -> None:
        """Takes log records that are counted as received."""
        for record in records:
            try:
                encoded = encode_log_record(record)
            except RecordError as error:
                self._counts.lose_damaged(error)
                continue
            with self._lock:
                self._add(record.resource, encoded, 1)

    def take_untraced(self, lines: LogLines) -> None:
        """Takes the lines that are known to have no trace."""
        self.export(of_untraced(line, self._query) for line in lines.take_untraced(time.monotonic()))
        damaged = lines.take_damaged()
        if damaged and self.errors:
            self._counts.lose("lost_damaged_record", damaged)

    @contextmanager
    def closing(self, lines: LogLines, timeout_s: float) -> Iterator[None]:
        """Takes the lines that are left, and shuts down while the block shuts another exporter down."""
        deadline_s = time.monotonic() + timeout_s
        self.export(of_untraced(line, self._query) for line in lines.take_rest())
        self.take_untraced(lines)
        self.hurry()
        try:
            yield
        finally:
            self.shutdown(max(deadline_s - time.monotonic(), 0))

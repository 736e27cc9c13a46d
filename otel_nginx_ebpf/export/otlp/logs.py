"""Sends log records to a collector over OTLP."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.otlp.delivery import Delivery
from otel_nginx_ebpf.export.otlp.encoding import encode_log_record
from otel_nginx_ebpf.export.otlp.sender import Sender
from otel_nginx_ebpf.metrics.stats import Deliveries
from otel_nginx_ebpf.traces.error_log import LogLines
from otel_nginx_ebpf.traces.logs import LogRecord, of_untraced
from otel_nginx_ebpf.traces.record import RecordError


class OtlpLogExporter(Delivery):
    """Encodes log records, and delivers them."""

    whom = "collector of logs"

    def __init__(
        self, sender: Sender, resource: Resource, counts: Deliveries, *, query: bool = True, **delivery: Any
    ) -> None:
        """`query`: whether to keep the query strings of URIs. `delivery`: how to queue, as `Delivery` has it."""
        self._query = query
        super().__init__(sender, resource, counts, **delivery)

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
        if damaged := lines.take_damaged():
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

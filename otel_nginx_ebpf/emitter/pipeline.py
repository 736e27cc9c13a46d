"""The way of a record in the emitter: bytes → exporter, or into a capture file."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.interface import Exporter, Record, RequestExporter
from otel_nginx_ebpf.metrics.stats import Deliveries, Stats
from otel_nginx_ebpf.traces.capture import CaptureWriter, Frame
from otel_nginx_ebpf.traces.error_log import LogLines, has_text, is_log_line
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.record import RecordError, decode
from otel_nginx_ebpf.traces.rules import CapturedRules

if TYPE_CHECKING:
    from otel_nginx_ebpf.export.otlp.logs import OtlpLogExporter

Take = Callable[[list[Record]], None]


def in_batches(records: Iterable[Record], size: int, take: Take) -> None:
    """Gives all records to `take`, `size` at a time; if the source raises, first those that it had yielded."""
    batch: list[Record] = []
    try:
        for record in records:
            batch.append(record)
            if len(batch) == size:
                full, batch = batch, []
                take(full)
    finally:
        if batch:
            take(batch)


class Decoding:
    """Decodes records, and gives the requests, with their log lines, to an exporter."""

    def __init__(self, exporter: RequestExporter, stats: Stats, logs: "OtlpLogExporter | None" = None) -> None:
        """`logs` gets the lines of the error log that have no request."""
        self._exporter = exporter
        self._stats = stats
        self.at_once = exporter.at_once
        self._logs = logs
        self._lines = LogLines(keeps_untraced=logs is not None and logs.errors)

    def take(self, records: Sequence[Record]) -> None:
        completed = []
        for raw, unix_offset_ns, resource in records:
            if is_log_line(raw):
                self._lines.add(raw, unix_offset_ns, resource)
                continue
            try:
                request = decode(raw)
            except RecordError as error:
                self._stats.lose_damaged(error)
                continue
            request.log_lines = self._lines.take(request.worker_pid, request.connection, request.connection_requests)
            completed.append((request, unix_offset_ns, resource))
            if request.impossible:
                self._stats.lose("partial_impossible_value", request.impossible)
        self._stats.lose_log_lines(self._lines.take_lost())
        if self._logs:
            self._logs.take_untraced(self._lines)
        self._exporter.take(completed)

    def shutdown(self, timeout_s: float) -> None:
        with self._logs.closing(self._lines, timeout_s) if self._logs else nullcontext():
            self._exporter.shutdown(timeout_s)


def writing(writer: CaptureWriter, stats: Stats) -> Take:
    """Returns a function that writes records to a capture file. It raises `UserError` if it cannot write."""

    def take(records: list[Record]) -> None:
        requests = sum(1 for raw, _, _ in records if not is_log_line(raw))
        try:
            for raw, unix_offset_ns, _ in records:
                writer.append(unix_offset_ns, raw)
            writer.flush()
        except UserError:
            stats.lose("lost_output_failed", requests)
            raise
        stats.exported += requests

    return take


def replay(
    frames: Iterable[Frame],
    exporter: Exporter,
    stats: Stats,
    rules: CapturedRules,
    counts_lines: Deliveries | None = None,
) -> None:
    """Exports the requests in a capture file, as far as the rules do not leave them out.

    `counts_lines` counts the lines of the error log.

    Raises:
        UserError: The file is not a capture file of this version.
        CaptureError: The file is damaged. The requests before the damage were exported.
    """
    resource: Mapping[str, AttributeValue] = {}

    def records() -> Iterator[Record]:
        for frame in frames:
            raw, left_out = frame.raw, None
            if not is_log_line(raw):
                stats.received += 1
                with suppress(RecordError):  # the exporter counts it
                    raw, left_out = rules.apply(raw)
            elif counts_lines and has_text(raw):
                counts_lines.received += 1
            if left_out is None:
                yield raw, frame.unix_offset_ns, resource
            else:
                stats.lose(left_out)

    in_batches(records(), exporter.at_once, exporter.take)

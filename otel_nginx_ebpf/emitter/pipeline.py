"""The way of a record in the emitter: bytes → `Request` → exporter, or into a capture file."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.interface import Exporter
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.capture import CaptureWriter, Frame
from otel_nginx_ebpf.traces.error_log import LogLines, is_log_line
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.record import RecordError, decode

_log = logging.getLogger(__name__)

Record = tuple[bytes, int, Mapping[str, AttributeValue]]
"""A record, Unix time minus monotonic time, and the resource attributes of the nginx it is from."""

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


def exporting(exporter: Exporter, stats: Stats) -> Take:
    """Returns a function that decodes records and gives the requests, with their log lines, to an exporter."""
    lines = LogLines()

    def take(records: list[Record]) -> None:
        completed = []
        for raw, unix_offset_ns, resource in records:
            if is_log_line(raw):
                lines.add(raw)
                continue
            try:
                request = decode(raw)
            except RecordError as error:
                stats.lose("lost_damaged_record")
                _log.warning("a damaged record was left out: %s", error)
                continue
            request.log_lines = lines.take(request.worker_pid, request.connection, request.connection_requests)
            completed.append((request, unix_offset_ns, resource))
            if request.impossible:
                stats.lose("partial_impossible_value", request.impossible)
        if lines.lost:
            stats.lose("partial_log_lines_missing", lines.lost)
            lines.lost = 0
        exporter.take(completed)

    return take


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


def replay(frames: Iterable[Frame], exporter: Exporter, stats: Stats) -> None:
    """Exports the requests in a capture file.

    Raises:
        UserError: The file is not a capture file of this version.
        CaptureError: The file is damaged. The requests before the damage were exported.
    """
    resource: Mapping[str, AttributeValue] = {}

    def records() -> Iterator[Record]:
        for frame in frames:
            stats.received += not is_log_line(frame.raw)
            yield frame.raw, frame.unix_offset_ns, resource

    in_batches(records(), exporter.at_once, exporting(exporter, stats))

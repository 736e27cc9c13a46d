"""The way of a record: found nginx → probes → ring buffer → `Request` → exporter."""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from otel_nginx_ebpf.capture import CaptureWriter, Frame
from otel_nginx_ebpf.record import RecordError, decode
from otel_nginx_ebpf.settings import Settings
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.trace import AttributeValue
from otel_nginx_ebpf.tracing import Tracing

if TYPE_CHECKING:
    from otel_nginx_ebpf.export import Exporter

_log = logging.getLogger(__name__)

# Records wait in the ring buffer for so long at most; the kernel wakes nobody, which keeps the cost out of nginx.
_POLL_S = 0.02

# How often to look for nginx processes that have come or gone.
_SWEEP_S = 1.0

# How often to say what was lost.
_REPORT_S = 60.0

# How many records go to a capture file before it is flushed, at most.
_WRITTEN_AT_ONCE = 1024

Record = tuple[bytes, int, Mapping[str, AttributeValue]]
"""A record, Unix time minus monotonic time, and the resource attributes of the nginx it is from."""

Take = Callable[[list[Record]], None]


@contextmanager
def _signals_received() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as they come, instead of what they do outside.

    Not a threading.Event: set() in a handler that interrupts the main thread's wait() can block for ever."""
    received: list[int] = []

    def receive(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal_number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_batches(records: Iterable[Record], size: int, take: Take) -> None:
    """Gives all records to `take`, also those before an error of the source."""
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


def _tell_losses(stats: Stats, told: Mapping[str, int]) -> dict[str, int]:
    """Logs what was lost since `told`, by cause. Returns what is told of now."""
    lost = stats.losses()
    new = {cause: count - told.get(cause, 0) for cause, count in sorted(lost.items()) if cause.startswith("lost_")}
    if any(new.values()):
        causes = ", ".join(f"{cause} {count}" for cause, count in new.items() if count)
        _log.warning("traces lost in the last minute: %s", causes)
    return lost


def _trace(settings: Settings, stats: Stats, take: Take, at_once: int) -> None:
    """Attaches, gives every record to `take`, so many at once, until a signal comes; then detaches and drains."""
    tracing = Tracing(settings, stats)

    def take_all() -> None:
        _in_batches(tracing.records(), at_once, take)

    with _signals_received() as stop:
        try:
            tracing.begin()
            next_sweep_s = time.monotonic() + _SWEEP_S
            next_report_s, told = time.monotonic() + _REPORT_S, stats.losses()
            while not stop:
                time.sleep(_POLL_S)
                take_all()
                take([])
                now_s = time.monotonic()
                if now_s >= next_sweep_s:
                    tracing.sweep()
                    next_sweep_s = now_s + _SWEEP_S
                if now_s >= next_report_s:
                    told = _tell_losses(stats, told)
                    next_report_s = now_s + _REPORT_S
            tracing.detach()
            take_all()
        finally:
            tracing.end()


def _exporting(exporter: "Exporter", stats: Stats) -> Take:
    def export(records: list[Record]) -> None:
        completed = []
        for raw, unix_offset_ns, resource in records:
            try:
                completed.append((decode(raw), unix_offset_ns, resource))
            except RecordError as error:
                stats.lose("lost_damaged_record")
                _log.warning("a damaged record was left out: %s", error)
        exporter.take(completed)

    return export


def run(settings: Settings, exporter: "Exporter", stats: Stats) -> None:
    """Traces until SIGINT or SIGTERM, then detaches and drains; leaves the exporter open.

    Raises:
        UserError: It cannot begin, or nginx's memory contradicts its layout.
        OSError: The exporter's output failed.
    """
    _trace(settings, stats, _exporting(exporter, stats), exporter.at_once)


def dry_run(settings: Settings) -> None:
    """Attaches to what runs now, which prints the ready lines, and detaches.

    Raises:
        UserError: It cannot begin.
    """
    tracing = Tracing(settings, Stats())
    try:
        tracing.begin()
    finally:
        tracing.end()


def record(settings: Settings, path: Path, stats: Stats) -> None:
    """Writes the kernel's records to a capture file until SIGINT or SIGTERM.

    Raises:
        UserError: It cannot begin, or the file cannot be written.
    """
    with CaptureWriter(path, {}) as writer:

        def take(records: list[Record]) -> None:
            for raw, unix_offset_ns, _ in records:
                writer.append(unix_offset_ns, raw)
            writer.flush()
            stats.exported += len(records)

        _trace(settings, stats, take, _WRITTEN_AT_ONCE)


def replay(frames: Iterable[Frame], exporter: "Exporter", stats: Stats) -> None:
    """Exports the records of a capture file.

    Raises:
        UserError: Not a capture file of this version.
        CaptureError: Damaged; all before the damage was exported.
    """
    resource: Mapping[str, AttributeValue] = {}

    def records() -> Iterator[Record]:
        for frame in frames:
            stats.received += 1
            yield frame.raw, frame.unix_offset_ns, resource

    _in_batches(records(), exporter.at_once, _exporting(exporter, stats))

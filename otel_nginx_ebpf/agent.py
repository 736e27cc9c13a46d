"""The way of a record: found nginx → probes → ring buffer → `Request` → `Trace` → exporter."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from otel_nginx_ebpf.capture import CaptureWriter, read_capture
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

Take = Callable[[bytes, int, Mapping[str, AttributeValue]], None]
"""Takes a record, Unix time minus monotonic time, and the resource attributes of the nginx it is from."""


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


def _trace(settings: Settings, stats: Stats, take: Take, idle: Callable[[], None]) -> None:
    """Attaches, gives every record to `take` until a signal comes, then detaches and drains."""
    tracing = Tracing(settings, stats)

    def take_all() -> None:
        taken = False
        for raw, unix_offset_ns, resource in tracing.records():
            take(raw, unix_offset_ns, resource)
            taken = True
        if taken:
            idle()

    with _signals_received() as stop:
        try:
            tracing.begin()
            next_sweep_s = time.monotonic() + _SWEEP_S
            while not stop:
                time.sleep(_POLL_S)
                take_all()
                if time.monotonic() >= next_sweep_s:
                    tracing.sweep()
                    next_sweep_s = time.monotonic() + _SWEEP_S
            tracing.detach()
            take_all()
        finally:
            tracing.end()


def _exporting(exporter: "Exporter", stats: Stats) -> Take:
    def export(raw: bytes, unix_offset_ns: int, resource: Mapping[str, AttributeValue]) -> None:
        try:
            exporter.take(decode(raw), unix_offset_ns, resource)
        except RecordError as error:
            stats.lose("lost_damaged_record")
            _log.warning("a damaged record was left out: %s", error)

    return export


def run(settings: Settings, exporter: "Exporter", stats: Stats) -> None:
    """Traces until SIGINT or SIGTERM, then detaches and drains; leaves the exporter open.

    Raises:
        UserError: It cannot begin, or nginx's memory contradicts its layout.
        OSError: The exporter's output failed.
    """
    _trace(settings, stats, _exporting(exporter, stats), idle=lambda: None)


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

        def take(raw: bytes, unix_offset_ns: int, resource: Mapping[str, AttributeValue]) -> None:
            writer.append(unix_offset_ns, raw)
            stats.exported += 1

        _trace(settings, stats, take, writer.flush)


def replay(path: Path, exporter: "Exporter", stats: Stats) -> None:
    """Exports what a capture file holds.

    Raises:
        UserError: Not a capture file of this version.
        CaptureError: Damaged; all before the damage was exported.
    """
    take = _exporting(exporter, stats)
    resource: Mapping[str, AttributeValue] = {}  # one object: what shares it shares a message's ResourceSpans
    for frame in read_capture(path):
        stats.received += 1
        take(frame.raw, frame.unix_offset_ns, resource)

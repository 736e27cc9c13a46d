"""The way of a record: found nginx → probes → ring buffer → `Request` → `Trace` → exporter."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from otel_nginx_ebpf import sites
from otel_nginx_ebpf.capture import CaptureWriter, read_capture
from otel_nginx_ebpf.clock import Clock
from otel_nginx_ebpf.config import Settings
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel import preflight
from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.kernel.loader import LoadRequest, ProbeRequest
from otel_nginx_ebpf.kernel.program import program_text
from otel_nginx_ebpf.nginx.binary import Binary, NoSiteError, Site
from otel_nginx_ebpf.nginx.layouts import Layout, layout_for
from otel_nginx_ebpf.nginx.processes import Instance, all_instances, instance_of, instances_of_binary
from otel_nginx_ebpf.record import RecordError, decode
from otel_nginx_ebpf.spans import RandomIds, build_trace
from otel_nginx_ebpf.stats import Stats

if TYPE_CHECKING:
    from otel_nginx_ebpf.export import Exporter

_log = logging.getLogger(__name__)

# Records wait in the ring buffer for so long at most; the kernel wakes nobody, which keeps the cost out of nginx.
_POLL_S = 0.02

# How often to look for workers that are gone.
_SWEEP_S = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be attached to one binary, decided before anything is touched."""

    binary: Binary
    layout: Layout
    chosen: tuple[Site, ...]
    missing: tuple[tuple[sites.Boundary, str], ...]
    """Optional boundaries without a usable site, and why."""
    instances: tuple[Instance, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(pid for instance in self.instances for pid in instance.pids)

    def load_request(self, settings: Settings) -> LoadRequest:
        end = next(site for site in self.chosen if site.function == "ngx_http_free_request")
        text = program_text(
            self.layout.structs,
            {
                f"SITE_{end.function}": end.address,
                f"ADDRESS_{sites.CORE_MODULE}": self.binary.address(sites.CORE_MODULE),
            },
            follow_all=not settings.pid,
            active_requests_max=settings.max_active_requests,
            ring_buffer_bytes=_ring_buffer_bytes(settings),
        )
        probes = tuple(ProbeRequest(f"enter_{site.function}", site.file_offset) for site in self.chosen)
        return LoadRequest(text, str(self.binary.path), probes, sites.TRACEPOINTS, self.pids)

    def ready_line(self) -> str:
        """What says that probes are live: names nginx version, workers, probe sites and layout source, in one line."""
        workers = sum(instance.workers for instance in self.instances)
        masters = ", ".join(str(instance.master_pid) for instance in self.instances)
        return (
            f"ready: nginx {self.binary.version} (pid {masters}), {workers} worker{'s' if workers != 1 else ''}, "
            f"sites {', '.join(map(str, self.chosen))}, layout {self.layout.source}"
        )


def _ring_buffer_bytes(settings: Settings) -> int:
    return settings.ring_buffer_mib << 20


def _instances(settings: Settings) -> tuple[Instance, ...]:
    named = [instance_of(pid) for pid in settings.pid]
    for path in settings.binary:
        named += instances_of_binary(path)
    if not settings.pid and not settings.binary:
        named += all_instances()
    return tuple({instance.master_pid: instance for instance in named}.values())


def _plan(instances: tuple[Instance, ...]) -> Plan:
    """Raises `UserError` when the binary, its layout or a required site cannot be used."""
    binary = Binary(instances[0].executable)
    layout = layout_for(binary)
    chosen: list[Site] = []
    missing: list[tuple[sites.Boundary, str]] = []
    for boundary in sites.BOUNDARIES:
        reasons: list[str] = []
        for function in boundary.functions:
            try:
                chosen.append(binary.site(function, boundary.arguments))
                break
            except NoSiteError as error:
                reasons.append(str(error))
        else:
            if boundary.required:
                raise UserError(
                    f"{binary.name} (nginx {binary.version}) has no usable probe site for “{boundary.name}”: "
                    f"{'; '.join(reasons)}; a build that exports its functions (-Wl,-E) is needed"
                )
            missing.append((boundary, "; ".join(reasons)))
    return Plan(binary, layout, tuple(chosen), tuple(missing), instances)


def plans(settings: Settings) -> tuple[Plan, ...]:
    """One plan for each nginx binary that runs and is wanted.

    Raises:
        UserError: nothing to trace, or something in the way of it.
    """
    preflight.check()
    by_binary: dict[tuple[int, int], list[Instance]] = {}
    for instance in _instances(settings):
        by_binary.setdefault(instance.file_identity, []).append(instance)
    return tuple(_plan(tuple(group)) for group in by_binary.values())


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of what they do outside."""
    stop = threading.Event()

    def request_stop(signal_number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trace(settings: Settings, stats: Stats, take: Callable[[bytes], None], idle: Callable[[], None]) -> None:
    """Attaches, gives every record to `take` until a signal comes, then detaches and drains."""
    with _stop_requested() as stop, ExitStack() as stack:
        attachments: list[Attachment] = []
        planned = plans(settings)
        for plan in planned:
            for boundary, reason in plan.missing:
                _log.warning("no %s: %s", boundary.without, reason)
            attachments.append(
                stack.enter_context(Attachment(plan.load_request(settings), _ring_buffer_bytes(settings)))
            )
        for plan in planned:
            print(plan.ready_line(), file=sys.stderr, flush=True)
        next_sweep_s = 0.0
        while not stop.wait(_POLL_S):
            if _take_all(attachments, stats, take):
                idle()
            _refuse_mismatch(attachments)
            if time.monotonic() >= next_sweep_s:
                next_sweep_s = time.monotonic() + _SWEEP_S
                for attachment in attachments:
                    stats.lose("lost_worker_gone", attachment.forget_dead_workers())
        for attachment in attachments:
            attachment.detach()
        _take_all(attachments, stats, take)
        idle()
        for attachment in attachments:
            for cause, count in attachment.losses().items():
                stats.lose(cause, count)


def _take_all(attachments: Iterable[Attachment], stats: Stats, take: Callable[[bytes], None]) -> bool:
    taken = False
    for attachment in attachments:
        for raw in attachment.records():
            stats.received += 1
            take(raw)
            taken = True
    return taken


def _refuse_mismatch(attachments: Iterable[Attachment]) -> None:
    """Raises `UserError`, which detaches, when nginx's memory does not look as its layout says."""
    for attachment in attachments:
        if attachment.losses()["lost_layout_mismatch"]:
            raise UserError(
                "nginx's memory does not look as expected for its version: detached, no trace was made from it; "
                "is it a patched build? Please report its `nginx -V`"
            )


def _exporting(
    exporter: "Exporter", stats: Stats, settings: Settings, unix_offset_ns: Callable[[], int]
) -> Callable[[bytes], None]:
    ids = RandomIds()

    def export(raw: bytes) -> None:
        try:
            request = decode(raw)
        except RecordError as error:
            stats.lose("lost_damaged_record")
            _log.warning("a damaged record was left out: %s", error)
            return
        exporter.export(build_trace(request, unix_offset_ns(), ids, query=settings.query))

    return export


def run(settings: Settings, exporter: "Exporter", stats: Stats) -> None:
    """Traces until SIGINT or SIGTERM, then detaches and drains; leaves the exporter open.

    Raises:
        UserError: it cannot begin, or nginx's memory contradicts its layout.
        OSError: the exporter's output failed.
    """
    take = _exporting(exporter, stats, settings, Clock().unix_offset_ns)
    _trace(settings, stats, take, exporter.flush)


def record(settings: Settings, path: Path, stats: Stats) -> None:
    """Writes the kernel's records to a capture file until SIGINT or SIGTERM.

    Raises:
        UserError: it cannot begin, or the file cannot be written.
    """
    clock = Clock()
    with CaptureWriter(path, {}) as writer:

        def take(raw: bytes) -> None:
            writer.append(clock.unix_offset_ns(), raw)
            stats.exported += 1

        _trace(settings, stats, take, writer.flush)


def replay(path: Path, exporter: "Exporter", stats: Stats, settings: Settings) -> None:
    """Exports what a capture file holds.

    Raises:
        UserError: not a capture file of this version.
        CaptureError: damaged; all before the damage was exported.
    """
    offset_ns = 0
    take = _exporting(exporter, stats, settings, lambda: offset_ns)
    for frame in read_capture(path):
        offset_ns = frame.unix_offset_ns
        stats.received += 1
        take(frame.raw)

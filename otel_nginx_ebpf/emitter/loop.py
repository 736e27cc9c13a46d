"""The emitter's loop: reads the records of all attachments, and obeys the supervisor.

The emitter may not look at other processes. The supervisor tells it what it has to know (`process.messages`).
"""

import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

from otel_nginx_ebpf.emitter.clock import Clock
from otel_nginx_ebpf.emitter.pipeline import Take, in_batches
from otel_nginx_ebpf.emitter.source import Source
from otel_nginx_ebpf.export.interface import Record
from otel_nginx_ebpf.metrics.choices import DEFAULT_CHOICES, MetricChoices
from otel_nginx_ebpf.metrics.kept_stats import KeptStats
from otel_nginx_ebpf.metrics.stats import Deliveries, Stats
from otel_nginx_ebpf.process.channel import EmitterEnd
from otel_nginx_ebpf.process.messages import (
    Abandoned,
    Alive,
    Attached,
    End,
    Kind,
    Lost,
    Measured,
    Order,
    Retired,
)
from otel_nginx_ebpf.traces.error_log import has_text, is_log_line, line_pid
from otel_nginx_ebpf.traces.losses import LOST, of_kind
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.plausibility import Doubt, doubt
from otel_nginx_ebpf.traces.record import worker_pid

_log = logging.getLogger(__name__)

# How long records wait in the ring buffer at most. The kernel wakes no reader, because a worker would pay for it.
_POLL_S = 0.02

# How often to read the counters that the metrics show.
_NOTE_S = 1.0

# How often to log what was lost.
_REPORT_S = 60.0


class NothingTracedError(Exception):
    """The supervisor ended before it attached to anything."""


Losses = dict[tuple[str, str], int]
"""How many traces, and how many log records, are lost, by cause."""


def losses(stats: Stats) -> Losses:
    """Returns the losses so far."""
    lost = {("traces", cause): count for cause, count in of_kind(stats.losses(), LOST).items()}
    logs = stats.logs.lost.copy() if stats.logs else {}
    return lost | {("log records", cause): count for cause, count in logs.items()}


def tell_losses(stats: Stats, told: Losses) -> Losses:
    """Logs the losses since `told`, and returns the losses so far."""
    lost = losses(stats)
    new = {key: count - told.get(key, 0) for key, count in sorted(lost.items())}
    for what in ("traces", "log records"):
        if causes := ", ".join(f"{cause} {count}" for (of, cause), count in new.items() if of == what and count):
            _log.warning("%s lost in the last minute: %s", what, causes)
    return lost


class Emitter:
    """Reads the records of all attachments until the supervisor says `End`, or is gone."""

    def __init__(
        self,
        channel: EmitterEnd,
        stats: Stats,
        counts: KeptStats,
        ring_buffer_bytes: int,
        choices: MetricChoices = DEFAULT_CHOICES,
        counts_lines: Deliveries | None = None,
    ) -> None:
        """`counts_lines` counts the lines of the error log, if they are sent as log records."""
        self._channel = channel
        self._stats = stats
        self._counts = counts
        self._ring_buffer_bytes = ring_buffer_bytes
        self._choices = choices
        self._counts_lines = counts_lines
        self._clock = Clock()
        self._sources: dict[int, Source] = {}
        self._retired: list[Source] = []
        """Attachments that are detached; their ring buffers are read once more."""
        self._resources: dict[frozenset[tuple[str, AttributeValue]], Mapping[str, AttributeValue]] = {}
        self._fullest = 0.0
        """The highest fill of a ring buffer since the counters were last read, 0 to 1."""
        self._attached = self._ending = False
        self._grace_s: float | None = None

    def run(self, take: Take, at_once: int) -> float | None:
        """Gives all records to `take`, `at_once` at a time, until the supervisor ends it; then reads the rest.

        Returns:
            For how many seconds to deliver; `None` if the supervisor is gone and could not say.

        Raises:
            NothingTracedError: The supervisor ended before it attached to anything.
        """
        # The signal that stops a service reaches all its processes. The supervisor decides when the emitter ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._channel.report(Kind.BEGUN)
        next_note_s = time.monotonic() + _NOTE_S
        next_report_s, told = time.monotonic() + _REPORT_S, losses(self._stats)
        try:
            while not self._ending:
                for order in self._channel.orders(_POLL_S):
                    self._obey(order)
                self._ending |= self._channel.ended
                in_batches(self._records(), at_once, take)
                if self._attached:
                    take([])
                self._counts.write()
                now_s = time.monotonic()
                if now_s >= next_note_s:
                    self._close_retired()
                    self._note_counters()
                    next_note_s = now_s + _NOTE_S
                if now_s >= next_report_s:
                    told = tell_losses(self._stats, told)
                    next_report_s = now_s + _REPORT_S
        finally:
            self._retired += self._sources.values()
            self._sources.clear()
            self._close_retired()
            self._note_counters()
        if not self._attached:
            raise NothingTracedError
        return self._grace_s

    def _obey(self, order: Order) -> None:
        match order:
            case Attached():
                self._attached = True
                source = Source(order, self._ring_buffer_bytes, self._choices)
                self._sources[source.number] = source
                self._add_durations(source)
            case Alive(number, pids, serving):
                known = self._sources.get(number)
                if known and known.durations:
                    self._stats.durations.sweep(known.durations, pids)
                    if serving is not None:
                        self._stats.connections.tell(number, serving, partial(self._resource, known))
            case Retired(number):
                self._stats.connections.remove(number)
                if number in self._sources:
                    self._retired.append(self._sources.pop(number))
            case Abandoned():
                source = Source(Attached(0, "", "", order.descriptors), self._ring_buffer_bytes, self._choices)
                # The last emitter may have sent some of these records. A trace must not come twice, so all are lost.
                left = [raw for raw in source.records.read() if not doubt(raw)]
                unread = sum(1 for raw in left if not is_log_line(raw))
                if self._counts_lines:
                    lines = sum(map(has_text, left))
                    self._counts_lines.received += lines
                    self._counts_lines.lose("lost_emitter_killed", lines)
                self._counts.lose_unread("lost_emitter_killed", unread)
                self._give_back(source)
            case Measured(number, cost_ns, hits, passed):
                if number in self._sources:
                    self._sources[number].hits = hits
                if cost_ns is not None:
                    self._stats.cost_s = cost_ns / 1e9
                self._stats.detachments += passed
            case Lost(cause, count):
                self._counts.lose_unread(cause, count)
            case End(grace_s):
                self._ending = True
                self._grace_s = grace_s

    def _add_durations(self, source: Source) -> None:
        if source.durations is None:
            return
        try:
            next(source.durations.read(), None)
        except PermissionError:
            _log.warning(
                "no metrics of requests: before Linux 5.19 a process without privileges may not read them, unless "
                "sysctl kernel.unprivileged_bpf_disabled is 0"
            )
            source.durations.close()
            source.durations = None
        else:
            self._stats.durations.add(source.durations, partial(self._resource, source))

    def _records(self) -> Iterator[Record]:
        """Yields each new record, with Unix time minus monotonic time and the resource attributes of its nginx."""
        for source in [*self._sources.values(), *self._retired]:
            unix_offset_ns = self._clock.unix_offset_ns()
            self._fullest = max(self._fullest, source.records.fill())
            for raw in source.records.read(self._counts.write):
                if found := doubt(raw):
                    self._doubt(source, found)
                    continue
                if is_log_line(raw):
                    if self._counts_lines and has_text(raw):
                        self._counts_lines.received += 1
                    yield raw, unix_offset_ns, self._resource(source, line_pid(raw))
                    continue
                self._stats.received += 1
                if source.silence.fell_silent(raw):
                    self._channel.report(Kind.SILENT, source.number)
                yield raw, unix_offset_ns, self._resource(source, worker_pid(raw))

    def _doubt(self, source: Source, found: Doubt) -> None:
        """Logs that a request contradicts the layout. Tells the supervisor if the kernel saw several in a row."""
        wrong = f"{source.target} does not look in memory as its layout ({source.layout_source}) says: {found.what}"
        if found.refutes and found.worker_pid not in source.refuted:
            source.refuted.add(found.worker_pid)
            _log.error("%s", wrong)
            self._channel.report(Kind.CONTRADICTED, source.number, found.worker_pid)
        elif not source.doubted:
            _log.warning("a request is left out: %s", wrong)
        source.doubted = True

    def _resource(self, source: Source, pid: int) -> Mapping[str, AttributeValue]:
        found = source.resource_of.get(pid)
        if found is None:
            answer = self._channel.ask_whose(source.number, pid)
            attributes: Mapping[str, AttributeValue] = answer.attributes if answer else {}
            # All requests of an instance share one object: exporters compare resources by identity.
            found = self._resources.setdefault(frozenset(attributes.items()), attributes)
            source.resource_of[pid] = found
        return found

    def _close_retired(self) -> None:
        for source in self._retired:
            self._give_back(source)
        self._retired.clear()

    def _give_back(self, source: Source) -> None:
        if source.durations:
            self._stats.durations.remove(source.durations)
        for cause, count in source.losses().items():
            self._counts.lose_unread(cause, count)
        source.close()

    def _note_counters(self) -> None:
        """Reads the counters of live probes, for the metrics."""
        lost: Counter[str] = Counter()
        for source in [*self._sources.values(), *self._retired]:
            lost.update(source.losses())
        self._stats.lost_in_kernel = lost
        counted = [source.hits for source in self._sources.values()]
        probes = {probe for hits in counted for probe in hits}
        self._stats.probe_hits = {probe: sum(hits.get(probe, 0) for hits in counted) for probe in probes}
        self._stats.ring_buffer_fill, self._fullest = self._fullest, 0.0

"""Measures what live probes cost, and decides whether that is more than the user allows.

The kernel's counting costs time itself, so it runs for one second in ten. One second says little: the time of a program
that is interrupted includes the interruption. So a limit counts as passed after three such seconds in a row.
"""

import logging
import time
from dataclasses import dataclass
from typing import NamedTuple

from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.kernel.runs import Counting, Runs
from otel_nginx_ebpf.nginx.processes import FileIdentity
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.losses import lost_traces

_log = logging.getLogger(__name__)

TRAP_NS = 1_000
"""Time of a uprobe's trap, without its program: 0.6 µs in a loop, 1.1 µs in nginx, which uses the caches itself."""

_EVERY_S = 10.0
_STRIKES = 3
# With fewer requests a second, system calls of other processes distort the cost of a request.
_REQUESTS_MIN = 100
_PAUSE_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The user's limits. `None`: the user set no limit."""

    cost_ns: int | None
    """Processor time for each request."""
    loss: float | None
    """The fraction of traces that may be lost, 0 to 1."""
    pause_s: float
    """How long to stay detached the first time: twice as long each time, up to an hour."""

    @property
    def any(self) -> bool:
        return self.cost_ns is not None or self.loss is not None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the probes of one binary did in about one second."""

    requests: int
    """Requests that ended."""
    cost_ns: int
    """Processor time of all programs and traps."""
    lost: int
    """Traces that the kernel program lost."""

    def passes(self, limits: Limits) -> str:
        """Says which limit was passed, or returns an empty string."""
        cost_ns, loss = self.cost_ns / self.requests, self.lost / self.requests
        if limits.cost_ns is not None and cost_ns > limits.cost_ns:
            return f"tracing took {cost_ns / 1e3:.1f} µs a request, more than the {limits.cost_ns / 1e3:g} µs allowed"
        if limits.loss is not None and loss > limits.loss:
            return f"{loss:.2%} of the traces were lost, more than the {limits.loss:.2%} allowed"
        return ""


class Watchdog:
    """Watches the probes of one binary. Times are seconds of any monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pause_s = limits.pause_s
        self._strikes = 0
        self._attached_at_s = 0.0
        self._measure_at_s = 0.0
        self._attach_at_s = 0.0

    def attached(self, now_s: float) -> None:
        """Notes that the probes are live."""
        self._strikes = 0
        self._attached_at_s = self._measure_at_s = now_s

    def should_measure(self, now_s: float) -> bool:
        """Returns whether to measure the second that begins."""
        return now_s >= self._measure_at_s

    def should_detach(self, measured: Measurement, now_s: float) -> str:
        """Says why to detach, and begins a pause; returns an empty string if the probes stay."""
        self._measure_at_s = now_s + _EVERY_S
        if measured.requests < _REQUESTS_MIN:
            return ""
        passed = measured.passes(self._limits)
        self._strikes = self._strikes + 1 if passed else 0
        if not passed:
            return ""
        self._measure_at_s = now_s
        if self._strikes < _STRIKES:
            return ""
        if now_s - self._attached_at_s > _PAUSE_MAX_S:  # all was well for an hour
            self._pause_s = self._limits.pause_s
        self._attach_at_s = now_s + self._pause_s
        because = f"{passed}; detached for {self._pause_s:g} s"
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        return because

    def may_attach(self, now_s: float) -> bool:
        """Returns whether the pause is over."""
        return now_s >= self._attach_at_s


_UPROBE = "enter_"
_ONCE_A_REQUEST = "enter_ngx_http_free_request"


class Reading(NamedTuple):
    """What was measured of the probes of one binary."""

    cost_ns: int | None
    """Processor time for each request. `None`: no request ended."""
    hits: dict[str, float]
    """Hits a second, by probe."""
    because: str
    """Why to detach. Empty: the probes stay."""


class _Meter:
    """Lets the kernel count until `close`. Making it raises `OSError` as `Counting` does."""

    def __init__(self, attachment: Attachment) -> None:
        self._counting = Counting()
        self._attachment = attachment
        self._began_s = time.monotonic()
        self._runs = attachment.runs()
        self._lost = _lost(attachment)

    def read(self) -> tuple[Measurement, dict[str, float]]:
        """Returns what happened since the meter was made, and the hits a second by probe."""
        seconds = time.monotonic() - self._began_s
        runs = {
            name: Runs(now.time_ns - self._runs[name].time_ns, now.hits - self._runs[name].hits)
            for name, now in self._attachment.runs().items()
        }
        traps = sum(each.hits for name, each in runs.items() if name.startswith(_UPROBE))
        measurement = Measurement(
            requests=runs[_ONCE_A_REQUEST].hits,
            cost_ns=sum(each.time_ns for each in runs.values()) + traps * TRAP_NS,
            lost=_lost(self._attachment) - self._lost,
        )
        return measurement, {name.removeprefix(_UPROBE): each.hits / seconds for name, each in runs.items()}

    def close(self) -> None:
        self._counting.close()


def _lost(attachment: Attachment) -> int:
    return lost_traces(attachment.losses())


class Guard:
    """Watches the probes of all binaries. Call `look` for each about once a second."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits(settings.max_cost_per_request, settings.max_loss, settings.reattach_seconds)
        self._measures = self._limits.any or settings.metrics or settings.metrics_listen is not None
        self._watchdogs: dict[FileIdentity, Watchdog] = {}
        self._meters: dict[FileIdentity, _Meter] = {}

    def attached(self, binary: FileIdentity) -> None:
        """Notes that a binary's probes are live."""
        self._watchdogs.setdefault(binary, Watchdog(self._limits)).attached(time.monotonic())

    def look(self, binary: FileIdentity, attachment: Attachment) -> Reading | None:
        """Returns what was measured since the last look; `None` if nothing was measured."""
        reading = None
        watchdog, now_s = self._watchdogs[binary], time.monotonic()
        if meter := self._meters.pop(binary, None):
            measurement, hits = meter.read()
            meter.close()
            because = watchdog.should_detach(measurement, now_s)
            cost_ns = measurement.cost_ns // measurement.requests if measurement.requests else None
            reading = Reading(cost_ns, hits, because)
        if self._measures and watchdog.should_measure(now_s) and not (reading and reading.because):
            self._measure(binary, attachment)
        return reading

    def _measure(self, binary: FileIdentity, attachment: Attachment) -> None:
        try:
            self._meters[binary] = _Meter(attachment)
        except OSError as error:
            self._measures = False
            if self._limits.any:
                _log.warning(
                    "--max-cost-per-request and --max-loss are not watched: the kernel does not count what programs "
                    "take (%s); that wants CAP_SYS_ADMIN, or sysctl kernel.bpf_stats_enabled=1",
                    error.strerror,
                )

    def detached(self, binary: FileIdentity) -> None:
        """Notes that a binary's probes are gone."""
        if meter := self._meters.pop(binary, None):
            meter.close()

    def may_attach(self, binary: FileIdentity) -> bool:
        """Returns whether a binary's pause is over."""
        return self._watchdogs[binary].may_attach(time.monotonic())

"""What live probes take of the processor, measured now and then, and whether that is more than the user allows.

What is asked of the kernel costs time itself, so it counts for a second now and then. One second says little: a program
that is interrupted seems to have run meanwhile. So a limit counts as passed when three seconds in a row say so.
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
"""What a uprobe's hit takes beside its program: some 0.6 µs in a loop, 1.1 µs where the caches are nginx's."""

_EVERY_S = 10.0
_STRIKES = 3
# Of fewer requests in a second the rest of the machine's system calls have too large a part in what one seems to cost.
_REQUESTS_MIN = 100
_PAUSE_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """None: there is none."""

    cost_ns: int | None
    """Of processor time a request."""
    loss: float | None
    """The part of all requests that may be lost, 0 to 1."""
    pause_s: float
    """How long to stay detached the first time. Doubles each time, up to an hour."""

    @property
    def any(self) -> bool:
        return self.cost_ns is not None or self.loss is not None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one binary's probes did in a second or so."""

    requests: int
    """That ended."""
    cost_ns: int
    """Of processor time, in all: programs and traps."""
    lost: int
    """Traces that did not make it out of the kernel."""

    def passes(self, limits: Limits) -> str:
        """What is more than is allowed, in words; empty: nothing."""
        cost_ns, loss = self.cost_ns / self.requests, self.lost / self.requests
        if limits.cost_ns is not None and cost_ns > limits.cost_ns:
            return f"tracing took {cost_ns / 1e3:.1f} µs a request, more than the {limits.cost_ns / 1e3:g} µs allowed"
        if limits.loss is not None and loss > limits.loss:
            return f"{loss:.2%} of the traces were lost, more than the {limits.loss:.2%} allowed"
        return ""


class Watchdog:
    """Of one binary's probes. Times are seconds of any clock that never goes back."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pause_s = limits.pause_s
        self._strikes = 0
        self._attached_at_s = 0.0
        self._measure_at_s = 0.0
        self._attach_at_s = 0.0

    def attached(self, now_s: float) -> None:
        """Probes went live."""
        self._strikes = 0
        self._attached_at_s = self._measure_at_s = now_s

    def should_measure(self, now_s: float) -> bool:
        """Whether the second that begins is to be measured."""
        return now_s >= self._measure_at_s

    def should_detach(self, measured: Measurement, now_s: float) -> str:
        """Why, in words; then a pause begins. Empty: the probes stay."""
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
        if now_s - self._attached_at_s > _PAUSE_MAX_S:  # all was well for as long as that
            self._pause_s = self._limits.pause_s
        self._attach_at_s = now_s + self._pause_s
        because = f"{passed}; detached for {self._pause_s:g} s"
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        return because

    def may_attach(self, now_s: float) -> bool:
        """Whether the pause is over."""
        return now_s >= self._attach_at_s


_UPROBE = "enter_"
_ONCE_A_REQUEST = "enter_ngx_http_free_request"


class Reading(NamedTuple):
    """Of one binary's probes, over a second or so."""

    cost_ns: int | None
    """Of processor time a request. None: no request ended meanwhile."""
    hits: dict[str, float]
    """Of each probe, a second."""
    because: str
    """Why to detach, in words. Empty: no reason."""


class _Meter:
    """The kernel counts from when this is made until it is closed. Raises `OSError` as `Counting` does."""

    def __init__(self, attachment: Attachment) -> None:
        self._counting = Counting()
        self._attachment = attachment
        self._began_s = time.monotonic()
        self._runs = attachment.runs()
        self._lost = _lost(attachment)

    def read(self) -> tuple[Measurement, dict[str, float]]:
        """What happened since then, and each probe's hits a second."""
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
    """Of all binaries' probes. `look` at each again and again, about once a second."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits(settings.max_cost_per_request, settings.max_loss, settings.reattach_seconds)
        self._measures = self._limits.any or settings.metrics or settings.metrics_listen is not None
        self._watchdogs: dict[FileIdentity, Watchdog] = {}
        self._meters: dict[FileIdentity, _Meter] = {}

    def attached(self, binary: FileIdentity) -> None:
        """Its probes went live."""
        self._watchdogs.setdefault(binary, Watchdog(self._limits)).attached(time.monotonic())

    def look(self, binary: FileIdentity, attachment: Attachment) -> Reading | None:
        """What was measured since the last look; None where nothing was."""
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
        """Its probes are no more."""
        if meter := self._meters.pop(binary, None):
            meter.close()

    def may_attach(self, binary: FileIdentity) -> bool:
        """Whether the time is over for which its probes were to stay away."""
        return self._watchdogs[binary].may_attach(time.monotonic())

"""What live probes take of the processor, measured now and then, and whether that is more than the user allows."""

import logging
import time
from typing import NamedTuple

from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.kernel.runs import Counting, Runs
from otel_nginx_ebpf.nginx.processes import FileIdentity
from otel_nginx_ebpf.settings import Settings
from otel_nginx_ebpf.watchdog import TRAP_NS, Limits, Measurement, Watchdog

_log = logging.getLogger(__name__)

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
    return sum(count for cause, count in attachment.losses().items() if cause.startswith("lost_"))


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

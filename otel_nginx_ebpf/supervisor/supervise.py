"""The process that the user starts. It has the privileges and owns the probes; it reads no request and no network.

The emitter reads requests and talks to the network, without privileges, in another process. When the emitter is killed,
the supervisor detaches at once and starts another emitter. When the supervisor is killed, the kernel removes the probes
with its descriptors; the emitter sees the end of the channel, delivers what it has and exits.
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel.uprobes import links_work
from otel_nginx_ebpf.linux import Capability
from otel_nginx_ebpf.metrics.kept_stats import KeptStats
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.process import entry, privileges
from otel_nginx_ebpf.process.channel import EmitterGoneError, SupervisorEnd, make_channel
from otel_nginx_ebpf.process.handover import Handover
from otel_nginx_ebpf.process.messages import Abandoned, End, Kind
from otel_nginx_ebpf.process.stdio import complain
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.supervisor.tracing import TICK_S, Tracing

_log = logging.getLogger(__name__)

# How often to look for nginx processes that started or ended.
_SWEEP_S = 1.0

# How long the emitter may take to exit after its time for delivery.
_STOPPING_S = 15.0

# Signals that follow each other within this time count as one: `timeout` sends two, and so do wrappers that pass on a
# Ctrl-C which has reached this process as well.
_ONE_WISH_S = 0.5

# How long to wait before another emitter starts: twice as long each time, until an emitter has lived for `_LIVED_S`.
_RESTART_FIRST_S = 1.0
_RESTART_MAX_S = 60.0
_LIVED_S = 300.0

# Exit codes of an emitter that ended by itself: the reader of stdout is gone, the user can correct it, Ctrl-C.
_ENDED = (0, 2, entry.INTERRUPTED)

_LOST = 1
"""Exit code if the emitter was killed while it delivered the rest."""

# To find and read binaries, to load programs, to attach them, and to start an emitter.
_KEPT = {Capability.BPF, Capability.PERFMON, Capability.SYS_PTRACE, Capability.DAC_READ_SEARCH, Capability.SYS_RESOURCE}
_KEPT |= {Capability.SETUID, Capability.SETGID, Capability.SETPCAP, Capability.KILL}

Emit = Callable[..., int]
"""The emitter's work: a module's function of the settings, the `Handover`, and two descriptors: the emitter's end of
the channel, and the file that keeps its counts."""


@contextmanager
def _signals_received() -> Iterator[list[float]]:
    """Collects the times of SIGINT and SIGTERM (time.monotonic()) instead of letting them end the process.

    This is not a threading.Event: set() in a handler that interrupts the main thread's wait() can block for ever."""
    received: list[float] = []

    def receive(signal_number: int, frame: FrameType | None) -> None:
        received.append(time.monotonic())

    before = {number: signal.signal(number, receive) for number in entry.ENDING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(settings: Settings) -> None:
    """Attaches to the nginx processes that run now, prints the ready lines, and detaches.

    Raises:
        UserError: Nothing can be traced.
    """
    ours, theirs = make_channel()
    with theirs, contextlib.closing(ours):
        tracing = Tracing(settings, ours)
        try:
            tracing.begin()
        finally:
            tracing.end()


def supervise(settings: Settings, emit: Emit, handover: Handover, *, again: bool = True) -> int:
    """Traces until SIGINT or SIGTERM, then detaches and lets the emitter deliver what it has.

    Args:
        settings: What to trace.
        emit: What the emitter does.
        handover: What the emitter gets.
        again: Whether a new emitter can continue where another was killed.

    Returns:
        The program's exit code.

    Raises:
        UserError: Nothing can be traced, or nginx's memory contradicts its layout.
    """
    _drop_privileges(settings)
    run = _Run(settings, emit, handover)
    delay_s = _RESTART_FIRST_S
    with _signals_received() as stop:
        while True:
            began_s = time.monotonic()
            code = run.once(stop)
            if code is not None or not again:
                return _LOST if code is None else code
            if time.monotonic() - began_s > _LIVED_S:
                delay_s = _RESTART_FIRST_S
            _log.warning("another emitter starts in %.0f s", delay_s)
            until_s = time.monotonic() + delay_s
            delay_s = min(2 * delay_s, _RESTART_MAX_S)
            while not stop and time.monotonic() < until_s:
                time.sleep(TICK_S)


def _drop_privileges(settings: Settings) -> None:
    kept = set(_KEPT)
    with contextlib.suppress(OSError):  # where no program may be loaded, which preflight explains
        watched = settings.max_cost_per_request is not None or settings.max_loss is not None
        if watched or settings.tells_in_memory or not links_work():
            kept.add(Capability.SYS_ADMIN)
    if settings.tells_on_socket:
        kept.add(Capability.NET_ADMIN)
    privileges.keep(kept)


class _Run:
    """Runs emitters, one after the other."""

    def __init__(self, settings: Settings, emit: Emit, handover: Handover) -> None:
        self._settings = settings
        self._emit = emit
        self._handover = handover
        self._counts = os.memfd_create("counts")
        """A file in memory with the counts of the emitters so far; the next emitter continues them."""
        self._abandoned: list[tuple[int, ...]] = []
        """Descriptors of the maps that a killed emitter did not read to the end."""

    def once(self, stop: list[float]) -> int | None:
        """Traces with a new emitter until a signal comes or the emitter ends.

        Returns:
            The program's exit code; `None` if the emitter was killed.
        """
        process, channel = self._start()
        with contextlib.closing(channel):
            tracing = Tracing(self._settings, channel)
            try:
                self._trace(channel, tracing, stop)
                return self._end(process, channel, tracing, stop)
            except EmitterGoneError as error:
                self._abandoned += tracing.abandon()
                return self._ended(process, str(error), stop)
            except UserError:
                code = self._end(process, channel, tracing, stop)
                if stop:  # The signal that stops a service reaches the planner and the loader too, and they fail.
                    return code
                raise
            finally:
                tracing.end()
                _make_sure(process)

    def _start(self) -> tuple["subprocess.Popen[bytes]", SupervisorEnd]:
        ours, theirs = make_channel()
        with theirs:
            handed = theirs.fileno(), self._counts
            process = entry.start(
                self._emit, self._settings, self._handover, *handed, keep=(*handed, *self._handover.descriptors)
            )
        return process, ours

    def _trace(self, channel: SupervisorEnd, tracing: Tracing, stop: list[float]) -> None:
        begun = False
        while not begun and not stop:
            begun = any(report.kind is Kind.BEGUN for report in channel.reports(TICK_S))
        while self._abandoned and begun:
            channel.tell(Abandoned(self._abandoned[-1]))
            for descriptor in self._abandoned.pop():
                os.close(descriptor)
        if not stop:
            tracing.begin(stop)
        next_sweep_s = time.monotonic() + _SWEEP_S
        while not stop:
            tracing.serve(TICK_S)
            if time.monotonic() >= next_sweep_s:
                tracing.sweep()
                next_sweep_s = time.monotonic() + _SWEEP_S

    def _end(
        self, process: "subprocess.Popen[bytes]", channel: SupervisorEnd, tracing: Tracing, stop: list[float]
    ) -> int:
        """Detaches, then answers the emitter's questions until it has delivered what it has; returns the exit code."""
        tracing.detach()
        serve: Callable[[float], None] = tracing.serve
        try:
            grace_s = self._settings.grace_seconds - (time.monotonic() - stop[0] if stop else 0)
            channel.tell(End(max(grace_s, 0)))
        except EmitterGoneError:
            channel.close()  # the emitter understands this as the end
            serve = time.sleep
        self._wait_for(process, stop, serve)
        return self._code(process, stop)

    def _ended(self, process: "subprocess.Popen[bytes]", why: str, stop: list[float]) -> int | None:
        """Says what became of an emitter whose channel has ended; `why` is the reason if it broke the protocol."""
        if why:
            process.kill()
        self._wait_for(process, stop)  # Without its output, it still delivers to the collector.
        code = process.returncode
        if stop or code in _ENDED:
            return self._code(process, stop, why)
        _log.error("the emitter %s; detached; what it had not delivered is lost", _how(code, why))
        return None

    def _wait_for(
        self, process: "subprocess.Popen[bytes]", stop: list[float], serve: Callable[[float], None] = time.sleep
    ) -> None:
        """Waits until the emitter has delivered what it has and ended, or its time is over.

        Args:
            process: The emitter's process.
            stop: The times of signals; more may come.
            serve: Called repeatedly, with the seconds that it may take. Raises `EmitterGoneError` if it has no use.
        """
        deadline_s = time.monotonic() + self._settings.grace_seconds + _STOPPING_S
        hurried = False
        while process.poll() is None and time.monotonic() < deadline_s:
            try:
                serve(TICK_S)
            except EmitterGoneError:  # it has read all, and delivers
                serve = time.sleep
            if stop and not hurried and stop[-1] - stop[0] > _ONE_WISH_S:  # the user is in a hurry
                process.send_signal(signal.SIGINT)
                hurried = True
        _make_sure(process)

    def _code(self, process: "subprocess.Popen[bytes]", stop: list[float], why: str = "") -> int:
        """Returns the program's exit code, after the last emitter has ended."""
        code: int = process.returncode
        if code >= 0:
            return 0 if stop and code == entry.INTERRUPTED else code
        _log.error("the emitter %s; what it had not delivered is lost", _how(code, why))
        stats = Stats(logs=self._settings.sends_logs)
        KeptStats(self._counts, stats).settle()
        complain(stats.summary())
        return _LOST


def _how(code: int, why: str) -> str:
    """Says how an emitter ended."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return how + (f" ({why})" if why else "")


def _make_sure(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process if it still runs, and waits for it."""
    if process.poll() is None:
        process.kill()
    process.wait()

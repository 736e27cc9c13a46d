"""Whether tracing takes or loses more than the user allows, and when it may be tried again. Pure.

What is asked of the kernel costs time itself, so it counts for a second now and then. One second says little: a program
that is interrupted seems to have run meanwhile. So a limit counts as passed when three seconds in a row say so.
"""

from dataclasses import dataclass

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

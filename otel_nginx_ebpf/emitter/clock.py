"""Turns the kernel's monotonic time into Unix time; nothing else does."""

import time


def measure_unix_offset_ns(samples: int = 5) -> int:
    """Returns Unix time minus CLOCK_MONOTONIC in nanoseconds, from the fastest of several readings."""
    best_width = best_offset = 0
    for index in range(samples):
        before = time.monotonic_ns()
        unix = time.time_ns()
        after = time.monotonic_ns()
        if index == 0 or after - before < best_width:
            best_width = after - before
            best_offset = unix - (before + after) // 2
    return best_offset


class Clock:
    """Keeps the offset from monotonic to Unix time, measured every `interval_s` because Unix time is adjusted."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._offset_ns = measure_unix_offset_ns()
        self._measured_s = time.monotonic()

    def unix_offset_ns(self) -> int:
        """Returns the offset. Use one offset for all times of a request, so that its spans keep their distances."""
        now_s = time.monotonic()
        if now_s - self._measured_s >= self._interval_s:
            self._offset_ns = measure_unix_offset_ns()
            self._measured_s = now_s
        return self._offset_ns

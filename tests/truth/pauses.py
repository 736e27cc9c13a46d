"""Measures how long processes waited for a processor. Such pauses come from the machine, not from nginx."""

import threading
import time
from bisect import bisect_left, bisect_right
from contextlib import suppress
from pathlib import Path
from types import TracebackType

INTERVAL_S = 0.01


class Pauses:
    """Samples, within a `with` block, how long the threads of some processes waited for a processor."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._at_ns: list[int] = []
        self._waited_ns: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Pauses":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        """Take samples. A late sample is a pause, too: of this process, or of the whole machine."""
        late_ns, last_ns = 0, time.monotonic_ns()
        while not self._stop.wait(INTERVAL_S):
            now_ns = time.monotonic_ns()
            late_ns += max(0, now_ns - last_ns - round(INTERVAL_S * 2e9))
            last_ns = now_ns
            waited_ns = sum(_waited_ns(pid) for pid in self._pids)
            self._at_ns.append(time.time_ns())
            self._waited_ns.append(waited_ns + late_ns)

    def between_ms(self, begin_ns: int, end_ns: int) -> float:
        """Return all pauses from the sample before the beginning to the sample after the end (Unix times)."""
        if not self._at_ns:
            return 0.0
        first = max(0, bisect_left(self._at_ns, begin_ns) - 1)
        last = min(len(self._at_ns) - 1, bisect_right(self._at_ns, end_ns))
        return max(0.0, (self._waited_ns[last] - self._waited_ns[first]) / 1e6)


def _waited_ns(pid: int) -> int:
    """Return the second field of /proc/PID/schedstat, of the process's main thread."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    return 0

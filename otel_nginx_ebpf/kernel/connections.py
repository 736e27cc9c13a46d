"""Counts the clients' connections and the running requests of each worker, from what the kernel program remembers."""

import struct
import time
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from otel_nginx_ebpf.kernel.maps import HashMap

_PID = struct.Struct("=I")
_U16 = struct.Struct("=H")
_U64 = struct.Struct("=Q")

_PAUSES = 100
"""Between two looks passes so many times as long as the look took: with 10,000 connections it takes 10 ms."""


class Serving(NamedTuple):
    """What a worker is busy with."""

    pid: int
    open: int
    """Its clients' connections."""
    active: int
    """Its running requests."""
    accepted: int
    """How many connections it has accepted since the probes went live."""


class Connections:
    """Reads the maps of the kernel program. Nothing here is a sum of steps, so a step that was missed has no effect."""

    def __init__(self, sockets: HashMap, client_at: int, active_requests: HashMap, accepted: int) -> None:
        """`client_at`: the offset of `client` in `struct socket`. Takes over the descriptor `accepted`."""
        self._sockets = sockets
        self._client_at = client_at
        self._active_requests = active_requests
        self._next_s = 0.0
        self._accepted = HashMap(accepted, key_bytes=4, value_bytes=8)

    def look(self, living: Collection[int], *, at_once: bool = False) -> list[Serving] | None:
        """Returns a row for each worker that has or had connections, until `forget`. `None`: it is too early.

        `living`: the workers that run; others have no connections any more. Unless `at_once` is set, looks take at most
        a hundredth of the time.
        """
        start_s = time.monotonic()
        if start_s < self._next_s and not at_once:
            return None
        rows = self._count(living)
        now_s = time.monotonic()
        self._next_s = now_s + _PAUSES * (now_s - start_s)
        return rows

    def _count(self, living: Collection[int]) -> list[Serving]:
        opened: Counter[int] = Counter()
        active: Counter[int] = Counter()
        for key, value in self._sockets.items():
            if _U16.unpack_from(value, self._client_at)[0]:
                (pid,) = _PID.unpack_from(key)
                opened[pid] += 1
                active[pid] += _U64.unpack_from(value)[0] != 0
        for key in self._active_requests.all_keys():
            active[_PID.unpack_from(key)[0]] += 1
        accepted = {_PID.unpack(key)[0]: _U64.unpack(value)[0] for key, value in self._accepted.items()}
        for pid in {*opened, *active}.difference(living):
            opened[pid] = active[pid] = 0
        return [
            Serving(pid, opened[pid], active[pid], accepted.get(pid, 0))
            for pid in sorted({*opened, *active, *accepted})
        ]

    def forget(self, living: Collection[int]) -> None:
        """Removes the counts of all other workers."""
        self._accepted.delete_where(lambda key: _PID.unpack(key)[0] not in living)

    def close(self) -> None:
        self._accepted.close()

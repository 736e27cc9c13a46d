"""How long all requests took, by series: what is counted in the kernel for each worker becomes totals for each nginx.

A worker's counts end with it, and are kept here; a series that was counted once stays as long as its nginx does. What a
series is, `series` says; here it is a name.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Attributes = tuple[tuple[str, str | int], ...]
Resource = Mapping[str, Any]
"""Resource attributes of an nginx: one object for each."""


class Series(NamedTuple):
    """A metric's name and the attributes of one of its points."""

    metric: str
    attributes: Attributes


OVERFLOW: Attributes = (("otel.metric.overflow", True),)
"""OpenTelemetry's "Metrics SDK", "Overflow attribute": of the point that stands for all that found no room."""

# The same specification's default limit of a metric's points.
_SERIES_MAX = 2000

# How long what an nginx had counted is told after its end: the collector has got it by then.
_TOLD_S = 300.0

Counts = tuple[int, ...]
"""Sum of nanoseconds, then a count for each bucket."""


class Maps(Protocol):
    """Where the kernel counts (`kernel.duration_maps`)."""

    def read(self) -> Iterator[tuple[int, bytes, Counts]]:
        """Of every series the worker's pid, its key, and what was counted."""

    def series(self, key: bytes) -> Series: ...

    def forget(self, pids: Collection[int]) -> None:
        """Removes the series of workers that are gone."""


ResourceOf = Callable[[int], Resource]
"""Of the nginx that a worker belongs to."""


class Measured(NamedTuple):
    resource: Resource
    series: Series
    counts: Counts


_Instance = frozenset[tuple[str, Any]]
"""An nginx, by its resource attributes: they are the same when it is attached to anew."""


class _Counted:
    """One binary's maps."""

    def __init__(self, maps: Maps, resource_of: ResourceOf) -> None:
        self.maps = maps
        self.resource_of = resource_of
        self.keys: dict[bytes, tuple[_Instance, Series]] = {}
        self.pids: set[int] = set()
        """That were among the counted when last looked at."""
        self.absent: set[int] = set()
        """Of them those that were not among the living then."""


class RequestDurations:
    """The thread that reads records calls `add`, `sweep` and `remove`, any may `collect`."""

    def __init__(self) -> None:
        self.start_unix_ns = time.time_ns()
        self._lock = threading.Lock()
        """Guards all below."""
        self._counted: list[_Counted] = []
        self._resources: dict[_Instance, Resource] = {}
        self._alive_s: dict[_Instance, float] = {}
        """When an nginx was last seen to live."""
        self._ended: dict[tuple[_Instance, Series], Counts] = {}
        self._told: dict[tuple[_Instance, str], set[Attributes]] = {}

    def add(self, maps: Maps, resource_of: ResourceOf) -> None:
        with self._lock:
            self._counted.append(_Counted(maps, resource_of))

    def sweep(self, maps: Maps, living: Collection[int]) -> None:
        """Takes over what was counted of workers that are gone. To be called again and again, each time with the pids
        that live by then, or did a moment before: who is missing twice has ended."""
        with self._lock:
            counted = self._of(maps)
            now_s = time.monotonic()
            for pid in living:
                self._alive_s[self._instance(counted, pid)] = now_s
            absent = counted.pids.difference(living)
            if gone := absent & counted.absent:
                self._take_over(counted, gone)
            counted.absent = absent - gone
            counted.pids = {pid for pid, key, _ in maps.read() if self._known(counted, pid, key)}
            self._forget_ended(now_s)

    def remove(self, maps: Maps) -> None:
        """Takes over all that was counted."""
        with self._lock:
            counted = next((each for each in self._counted if each.maps is maps), None)
            if counted is None:
                return
            self._take_over(counted, {pid for pid, _, _ in maps.read()})
            self._counted.remove(counted)

    def collect(self) -> list[Measured]:
        """What was counted since `start_unix_ns`."""
        with self._lock:
            totals = self._ended.copy()
            for counted in self._counted:
                for _, key, counts in counted.maps.read():
                    if known := counted.keys.get(key):  # else it is younger than the last sweep
                        _add(totals, known, counts)
            return [
                Measured(self._resources[instance], series, counts)
                for (instance, series), counts in totals.items()
                if any(counts)
            ]

    def _of(self, maps: Maps) -> _Counted:
        return next(counted for counted in self._counted if counted.maps is maps)

    def _instance(self, counted: _Counted, pid: int) -> _Instance:
        resource = counted.resource_of(pid)
        instance = frozenset(resource.items())
        self._resources[instance] = resource
        self._alive_s.setdefault(instance, time.monotonic())
        return instance

    def _known(self, counted: _Counted, pid: int, key: bytes) -> tuple[_Instance, Series]:
        known = counted.keys.get(key)
        if known is None:
            instance, series = self._instance(counted, pid), counted.maps.series(key)
            told = self._told.setdefault((instance, series.metric), {OVERFLOW})
            if series.attributes not in told and len(told) >= _SERIES_MAX:
                series = Series(series.metric, OVERFLOW)
            told.add(series.attributes)
            known = counted.keys[key] = instance, series
        return known

    def _take_over(self, counted: _Counted, pids: Collection[int]) -> None:
        for pid, key, counts in counted.maps.read():
            if pid in pids:
                _add(self._ended, self._known(counted, pid, key), counts)
                counted.keys.pop(key, None)
        counted.maps.forget(pids)

    def _forget_ended(self, now_s: float) -> None:
        for instance in [each for each, seen_s in self._alive_s.items() if now_s - seen_s > _TOLD_S]:
            del self._alive_s[instance], self._resources[instance]
            self._ended = {key: counts for key, counts in self._ended.items() if key[0] != instance}
            self._told = {key: told for key, told in self._told.items() if key[0] != instance}


def _add(totals: dict[tuple[_Instance, Series], Counts], key: tuple[_Instance, Series], counts: Counts) -> None:
    before = totals.get(key)
    totals[key] = counts if before is None else tuple(map(sum, zip(before, counts, strict=True)))

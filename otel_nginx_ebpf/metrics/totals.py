"""Adds up the durations of all requests by series: the kernel counts for each worker, this module for each nginx.

The counts of a worker that has ended are kept here. A series stays as long as its nginx. The module `series` says what
the kernel's keys mean.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Attributes = tuple[tuple[str, str | int], ...]
Resource = Mapping[str, Any]
"""The resource attributes of an nginx. Each nginx has one such object."""


class Place(NamedTuple):
    """Where amounts fell: into which exponential bucket, and into which bucket of the metric's bounds."""

    exponential: int
    bucket: int


class Series(NamedTuple):
    """The name of a metric, and the attributes of one of its points."""

    metric: str
    attributes: Attributes
    place: Place | None = None
    """The counts are those of one place. `None`: they are those of all buckets of the conventions."""


OVERFLOW: Attributes = (("otel.metric.overflow", True),)
"""The attributes of the point that counts all series above the limit (OpenTelemetry's "Metrics SDK", "Overflow
attribute")."""

# The default limit of a metric's points in that specification.
_SERIES_MAX = 2000

# How long the counts of an nginx are exported after its end. The collector has received them by then.
TOLD_S = 300.0

Counts = tuple[int, ...]
"""The sum, then a count for each bucket, or the count of the series' place."""


class Maps(Protocol):
    """The maps in which the kernel counts (`metrics.kernel_maps`)."""

    def read(self) -> Iterator[tuple[int, bytes, Counts]]:
        """Yields the worker's pid, the key and the counts of every series."""

    def series(self, key: bytes) -> Series: ...

    def forget(self, pids: Collection[int]) -> None:
        """Removes the series of these workers, which have ended."""


ResourceOf = Callable[[int], Resource]
"""A function from a worker's pid to the resource attributes of its nginx."""


class Measured(NamedTuple):
    resource: Resource
    series: Series
    counts: Counts


_Instance = frozenset[tuple[str, Any]]
"""The identity of an nginx: its resource attributes. They do not change when the probes are attached again."""


class _Counted:
    """The maps of one binary."""

    def __init__(self, maps: Maps, resource_of: ResourceOf) -> None:
        self.maps = maps
        self.resource_of = resource_of
        self.keys: dict[bytes, tuple[_Instance, Series]] = {}
        self.pids: set[int] = set()
        """The workers with counts at the last sweep."""
        self.absent: set[int] = set()
        """The workers with counts that were not alive at the last sweep."""


class RequestDurations:
    """The totals of all requests. Only the thread that reads records may call `add`, `sweep` and `remove`."""

    def __init__(self) -> None:
        self.start_unix_ns = time.time_ns()
        self._lock = threading.Lock()
        """Guards all following attributes."""
        self._counted: list[_Counted] = []
        self._resources: dict[_Instance, Resource] = {}
        self._alive_s: dict[_Instance, float] = {}
        """When each nginx was last seen alive, in seconds of the monotonic clock."""
        self._ended: dict[tuple[_Instance, Series], Counts] = {}
        self._told: dict[tuple[_Instance, str], set[Attributes]] = {}

    def add(self, maps: Maps, resource_of: ResourceOf) -> None:
        with self._lock:
            self._counted.append(_Counted(maps, resource_of))

    def sweep(self, maps: Maps, living: Collection[int]) -> None:
        """Takes over the counts of workers that have ended. Call this regularly.

        Args:
            maps: The maps to sweep.
            living: The pids that are alive, or were a moment ago. A pid that is missing twice has ended.
        """
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
        """Takes over all counts of maps that are about to be closed."""
        with self._lock:
            counted = next((each for each in self._counted if each.maps is maps), None)
            if counted is None:
                return
            self._take_over(counted, {pid for pid, _, _ in maps.read()})
            self._counted.remove(counted)

    def collect(self) -> list[Measured]:
        """Returns all counts since `start_unix_ns`."""
        with self._lock:
            totals = self._ended.copy()
            for counted in self._counted:
                for _, key, counts in counted.maps.read():
                    if known := counted.keys.get(key):  # a series that is newer than the last sweep is not known
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
                series = series._replace(attributes=OVERFLOW)
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
        for instance in [each for each, seen_s in self._alive_s.items() if now_s - seen_s > TOLD_S]:
            del self._alive_s[instance], self._resources[instance]
            self._ended = {key: counts for key, counts in self._ended.items() if key[0] != instance}
            self._told = {key: told for key, told in self._told.items() if key[0] != instance}


def _add(totals: dict[tuple[_Instance, Series], Counts], key: tuple[_Instance, Series], counts: Counts) -> None:
    before = totals.get(key)
    totals[key] = counts if before is None else tuple(map(sum, zip(before, counts, strict=True)))

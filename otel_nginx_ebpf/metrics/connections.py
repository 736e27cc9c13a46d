"""How many connections and running requests each nginx has. The supervisor counts them for each worker."""

import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from otel_nginx_ebpf.metrics.totals import TOLD_S, Resource, ResourceOf


class Total(NamedTuple):
    """The counts of an nginx."""

    open: int
    active: int
    accepted: int


class CountMetric(NamedTuple):
    """A metric that is a single number."""

    description: str
    unit: str
    monotonic: bool = False


CONNECTIONS = {
    "nginx.connections.open": CountMetric("Connections of clients that are open.", "{connection}"),
    "nginx.requests.active": CountMetric("Requests that run.", "{request}"),
    "nginx.connections.accepted": CountMetric(
        "Connections of clients that were accepted.", "{connection}", monotonic=True
    ),
}
"""In the order of `Total`."""


class _Instance:
    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.ended = 0
        """Connections that workers accepted which have ended."""
        self.workers: dict[tuple[int, int], Total] = {}
        self.alive_s = time.monotonic()


class ConnectionCounts:
    """The counts of all nginx. Only the thread that reads records may call `tell` and `remove`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instances: dict[frozenset[tuple[str, object]], _Instance] = {}

    def tell(self, number: int, serving: Iterable[Sequence[int]], resource_of: ResourceOf) -> None:
        """Takes the rows of an attachment: a worker's pid and the members of `Total`. Other workers have ended."""
        rows = {(number, pid): Total(*counts) for pid, *counts in serving}
        resources = {key: resource_of(key[1]) for key in rows}
        with self._lock:
            self._end(number, rows)
            for key, total in rows.items():
                identity = frozenset(resources[key].items())
                instance = self._instances.setdefault(identity, _Instance(resources[key]))
                instance.workers[key] = total
                instance.alive_s = time.monotonic()

    def remove(self, number: int) -> None:
        """Takes over the counts of an attachment that is gone."""
        with self._lock:
            self._end(number, {})

    def _end(self, number: int, rows: dict[tuple[int, int], Total]) -> None:
        for instance in self._instances.values():
            for key in [key for key in instance.workers if key[0] == number and key not in rows]:
                instance.ended += instance.workers.pop(key).accepted

    def collect(self) -> list[tuple[Resource, Total]]:
        """Returns the counts of each nginx. One that has ended stays for five minutes."""
        with self._lock:
            now_s = time.monotonic()
            for identity in [each for each, known in self._instances.items() if now_s - known.alive_s > TOLD_S]:
                if not self._instances[identity].workers:
                    del self._instances[identity]
            return [(each.resource, _sum(each)) for each in self._instances.values()]


def _sum(instance: _Instance) -> Total:
    workers = instance.workers.values()
    return Total(
        sum(each.open for each in workers),
        sum(each.active for each in workers),
        instance.ended + sum(each.accepted for each in workers),
    )

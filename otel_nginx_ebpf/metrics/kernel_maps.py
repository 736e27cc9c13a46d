"""Reads the maps in which probes/metrics.c and histograms.c count, by their descriptors."""

from collections.abc import Collection, Iterator

from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE

from otel_nginx_ebpf.kernel.maps import HashMap
from otel_nginx_ebpf.metrics.choices import MetricChoices
from otel_nginx_ebpf.metrics.series import (
    CLIENT_KEY,
    COUNTS,
    LIMITS,
    LOOP_KEY,
    NAME_KEY,
    NGINX_WORKER_LOOP,
    PLACE,
    PLACE_COUNTS,
    SERVER_KEY,
    of_client_key,
    of_server_key,
)
from otel_nginx_ebpf.metrics.totals import Counts, Place, Series

_CLIENT, _SIZES, _LOOPS = 1, 2, 3
"""The numbers of maps. Number 0 has the durations of requests."""

_NAME_LENGTH_BYTES = 8
_NAME_BYTES = _NAME_LENGTH_BYTES + LIMITS["NAME_BYTES_MAX"]


class DurationMaps:
    """The maps with counts and names. Owns the descriptors."""

    def __init__(self, choices: MetricChoices, server: int, client: int, sizes: int, loops: int, names: int) -> None:
        self._choices = choices
        self._place_bytes = PLACE.size if choices.exponential else 0
        self._counts = PLACE_COUNTS if choices.exponential else COUNTS
        client_bytes = CLIENT_KEY.size + LIMITS["PEER_BYTES_MAX"]
        self._maps = tuple(
            HashMap(descriptor, key_bytes + self._place_bytes, self._counts.size)
            for descriptor, key_bytes in (
                (server, SERVER_KEY.size),
                (client, client_bytes),
                (sizes, SERVER_KEY.size),
                (loops, LOOP_KEY.size),
            )
        )
        self._names = HashMap(names, NAME_KEY.size)

    def read(self) -> Iterator[tuple[int, bytes, Counts]]:
        """Yields the worker's pid, the key and the counts of every series. Keys begin with the map's number."""
        for number, counted in enumerate(self._maps):
            for key, value in counted.items():
                yield int.from_bytes(key[:4], "little"), bytes((number,)) + key, self._counts.unpack(value)

    def series(self, key: bytes) -> Series:
        """Returns the series that a key stands for."""
        number, key = key[0], key[1:]
        place = Place(*PLACE.struct.unpack(key[-PLACE.size :])) if self._place_bytes else None
        key = key[: len(key) - self._place_bytes]
        if number == _LOOPS:
            return Series(NGINX_WORKER_LOOP, (), place)
        if number == _CLIENT:
            return of_client_key(key, self._name, self._choices)._replace(place=place)
        series = of_server_key(key, self._name, self._choices)._replace(place=place)
        return series._replace(metric=HTTP_SERVER_RESPONSE_BODY_SIZE) if number == _SIZES else series

    def _name(self, pid: int, configuration: int) -> str | None:
        value = self._names.value(NAME_KEY.struct.pack(pid, 0, configuration), _NAME_BYTES) if configuration else None
        if value is None:
            return None
        length = int.from_bytes(value[:_NAME_LENGTH_BYTES], "little")
        return value[_NAME_LENGTH_BYTES:][:length].decode("utf-8", "backslashreplace")

    def forget(self, pids: Collection[int]) -> None:
        """Removes the series of these workers, which have ended."""
        for each in (*self._maps, self._names):
            each.delete_where(lambda key: int.from_bytes(key[:4], "little") in pids)

    def close(self) -> None:
        for each in (*self._maps, self._names):
            each.close()

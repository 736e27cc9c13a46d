"""Reads the maps in which probes/metrics.c counts durations, by their descriptors."""

from collections.abc import Collection, Iterator

from otel_nginx_ebpf.kernel.maps import HashMap
from otel_nginx_ebpf.metrics.choices import MetricChoices
from otel_nginx_ebpf.metrics.series import (
    CLIENT_KEY,
    COUNTS,
    LIMITS,
    NAME_KEY,
    PLACE,
    PLACE_COUNTS,
    SERVER_KEY,
    of_client_key,
    of_server_key,
)
from otel_nginx_ebpf.metrics.totals import Counts, Place, Series

_NAME_LENGTH_BYTES = 8
_NAME_BYTES = _NAME_LENGTH_BYTES + LIMITS["NAME_BYTES_MAX"]


class DurationMaps:
    """The maps with counts and names. Owns the descriptors."""

    def __init__(self, choices: MetricChoices, server: int, client: int, names: int) -> None:
        self._place_bytes = PLACE.size if choices.exponential else 0
        self._counts = PLACE_COUNTS if choices.exponential else COUNTS
        peer_bytes = LIMITS["PEER_BYTES_MAX"]
        self._server = HashMap(server, SERVER_KEY.size + self._place_bytes, self._counts.size)
        self._client = HashMap(client, CLIENT_KEY.size + peer_bytes + self._place_bytes, self._counts.size)
        self._names = HashMap(names, NAME_KEY.size)
        self._choices = choices

    def read(self) -> Iterator[tuple[int, bytes, Counts]]:
        """Yields the worker's pid, the key and the counts of every series."""
        for durations in (self._server, self._client):
            for key, value in durations.items():
                yield int.from_bytes(key[:4], "little"), key, self._counts.unpack(value)

    def series(self, key: bytes) -> Series:
        """Returns the series that a key stands for."""
        series_bytes = len(key) - self._place_bytes
        series_of = of_server_key if series_bytes == SERVER_KEY.size else of_client_key
        series = series_of(key[:series_bytes], self._name, self._choices)
        return series._replace(place=Place(*PLACE.struct.unpack(key[series_bytes:]))) if self._place_bytes else series

    def _name(self, pid: int, configuration: int) -> str | None:
        value = self._names.value(NAME_KEY.struct.pack(pid, 0, configuration), _NAME_BYTES) if configuration else None
        if value is None:
            return None
        length = int.from_bytes(value[:_NAME_LENGTH_BYTES], "little")
        return value[_NAME_LENGTH_BYTES:][:length].decode("utf-8", "backslashreplace")

    def forget(self, pids: Collection[int]) -> None:
        """Removes the series of these workers, which have ended."""
        for each in (self._server, self._client, self._names):
            each.delete_where(lambda key: int.from_bytes(key[:4], "little") in pids)

    def close(self) -> None:
        for each in (self._server, self._client, self._names):
            each.close()

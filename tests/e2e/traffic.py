"""Runs clients of every kind at once until it is told to stop. Each request has its own URI.

Runs as a separate process (`python -m e2e.traffic`), so that it shares no interpreter lock with the test; `Traffic`
starts it. Plain requests go to one address, requests over TLS to another.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h2.exceptions import ProtocolError

from e2e.http1_client import Address, ConnectionEnded, Http1Connection, request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request

REQUESTS_A_CONNECTION = 20


@dataclass
class _Clients:
    plain: Address
    tls: Address
    reloads: bool
    """During reloads nginx closes idle connections. An unanswered request on such a connection is no failure."""
    stop: threading.Event = field(default_factory=threading.Event)
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _number: int = 0

    def uri(self, path: str) -> str:
        with self._lock:
            self._number += 1
            return path.replace("@", str(self._number))

    def _count(self, statuses: list[int], wanted: int) -> None:
        with self._lock:
            self.answered += len(statuses)
            if statuses != [200] * wanted:
                self.failures.append(f"statuses {statuses}")

    def run(self, name: str, converse: Callable[[], None]) -> None:
        """Use one connection after the other until `stop`."""
        while not self.stop.is_set():
            try:
                converse()
            except (OSError, ConnectionEnded, ProtocolError) as error:
                if not self.reloads:
                    self.failures.append(f"{name}: {type(error).__name__} {error}")

    def _http1(self, path: str, pause_s: float, tls: bool = False) -> None:
        with Http1Connection(self.tls if tls else self.plain, trusting_tls() if tls else None) as connection:
            for _ in range(REQUESTS_A_CONNECTION):
                self._count([connection.request(self.uri(path)).status], 1)
                if self.stop.wait(pause_s):
                    break

    def keep_alive(self) -> None:
        self._http1("/keep-alive/@", 0.01)

    def over_tls(self) -> None:
        self._http1("/tls/@", 0.02, tls=True)

    def upstream_keep_alive(self) -> None:
        self._http1("/app/kept/@", 0.02)

    def slow(self) -> None:
        self._http1("/app/slow/@?delay_ms=400", 0)

    def pipelined(self) -> None:
        with Http1Connection(self.plain) as connection:
            for _ in range(4):
                connection.send(b"".join(request_bytes("GET", self.uri("/pipelined/@")) for _ in range(5)))
                self._count([connection.read_response().status for _ in range(5)], 5)
                if self.stop.wait(0.1):
                    break

    def http2(self) -> None:
        """Keep streams open on each connection: new streams begin before the slow streams end."""
        connection = Http2Connection(self.tls, tls=True)
        try:
            for _ in range(5):
                delays_ms = (0, 20, 150)
                connection.start([Http2Request(self.uri(f"/app/h2/@?delay_ms={each}")) for each in delays_ms])
                self.stop.wait(0.05)
                connection.start([Http2Request(self.uri("/h2/@")) for _ in delays_ms])
                responses = connection.finish()
                self._count([each.status for each in responses], 6)
                if self.stop.is_set():
                    break
        finally:
            connection.close()


_CLIENTS = {"keep_alive": 6, "over_tls": 1, "upstream_keep_alive": 2, "slow": 2, "pipelined": 1, "http2": 2}


def _main(plain: list[Any], tls: list[Any], reloads: bool) -> None:
    clients = _Clients((plain[0], plain[1]), (tls[0], tls[1]), reloads)
    threads = [
        threading.Thread(target=clients.run, args=(name, getattr(clients, name)))
        for name, count in _CLIENTS.items()
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    clients.stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps([clients.answered, clients.failures]))


class Traffic:
    """Runs from the constructor until `stop`."""

    def __init__(self, plain: Address, tls: Address, reloads: bool = False) -> None:
        self.began_s = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "e2e.traffic", json.dumps([plain, tls, reloads])],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def stop(self) -> int:
        """Stop; return how many requests were answered. Raise AssertionError if one failed."""
        told, _ = self._process.communicate(b"\n", timeout=60)
        answered, failures = json.loads(told)
        assert failures == []
        return int(answered)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))

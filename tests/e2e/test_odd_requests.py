"""Every odd request of the suite, as a worker's first request and as its first hundred: traces continue, and are right.

Each worker verifies its layout again, and a reload starts new workers.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.agent_process import Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.nginx_server import LogLine, wait_until
from e2e.oracle import check_facts
from e2e.stage import Stage, key_of_log, key_of_trace
from e2e.test_client_failures import MALFORMED
from e2e.test_hostile_requests import REQUESTS, raw_request
from e2e.test_rude_clients import HTTP, KINDS, SERVER

HUNDRED = 100

CHUNK = b"400\r\n" + b"c" * 1024 + b"\r\n0\r\n\r\n"
CHUNKED = b"POST /empty HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK
NEGATIVE_LENGTH = CHUNKED + b"GET /empty HTTP/1.1\r\nHost: x\r\nX-Longer: " + b"x" * 60 + b"\r\n\r\n"
"""nginx counts the second one's length from where the first one's body was (nginx#1522)."""

RAW: dict[str, bytes] = {
    "negative-length": NEGATIVE_LENGTH,
    "version-1.7": b"GET /empty HTTP/1.7\r\nHost: x\r\n\r\n",
    "version-0.9": b"GET /empty\r\n",
    "version-2.0": b"GET /empty HTTP/2.0\r\nHost: x\r\n\r\n",
    "absolute": b"GET http://elsewhere.example/empty HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute-no-path": b"GET http://elsewhere.example?a=b HTTP/1.1\r\nHost: x\r\n\r\n",
    "above-the-root": b"GET /../../empty HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown-method": b"-_A- /empty HTTP/1.1\r\nHost: x\r\n\r\n",
    "no-host-1.0": b"GET /empty HTTP/1.0\r\n\r\n",
    "two-hosts": b"GET /empty HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "empty-host": b"GET /empty HTTP/1.1\r\nHost:\r\nUser-Agent:\r\n\r\n",
    "200-headers": request_bytes("GET", "/empty", {f"X-{number}": "x" for number in range(200)}),
    "error-page": b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
    "made-up-status": b"GET /made-up HTTP/1.1\r\nHost: x\r\n\r\n",
    "made-up-status-upstream": b"GET /app?status=999 HTTP/1.1\r\nHost: x\r\n\r\n",
    **{f"malformed-{number}": sent for number, (sent, _) in enumerate(MALFORMED)},
    **{f"hostile-{number}": raw_request(*request) for number, request in enumerate(REQUESTS[:-1])},
}

Odd = Callable[[Http1Connection], object]


def sending(raw: bytes) -> Odd:
    def send(connection: Http1Connection) -> None:
        connection.send(raw)
        connection.socket.settimeout(1)
        connection.socket.recv(1 << 16)

    return send


ODD: dict[str, Odd] = {name: sending(raw) for name, raw in RAW.items()}
ODD |= {kind.__name__: lambda connection, kind=kind: kind(connection, random.Random(4)) for kind in KINDS}

nginx = pytest.mark.nginx(
    http=HTTP,
    server=SERVER
    + """
    large_client_header_buffers 8 128k;
    location /empty { return 204; }
    location /slow { proxy_pass http://@UP@; proxy_read_timeout 60s; }
    location /made-up { error_page 418 =1234 /text; return 418; }
    error_page 400 404 /error.html;
    location = /error.html { return 404 "no such thing"; }
    """,
)


def _wrong(line: LogLine, trace: Trace) -> Iterator[str]:
    """But for the GET that nginx, once it has an error's page, says of a request line that it could not read."""
    return (each for each in check_facts(trace, line) if line["status"] != "400" or "protocol" not in each)


class Watched:
    """The scenario's requests, each held against its log line."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._checked = 0

    def new_worker(self) -> None:
        self._stage.site.nginx.reload()

    def send(self, odd: Odd, times: int) -> None:
        """On connections of their own; what becomes of these is nginx's business."""
        for _ in range(times):
            with self._stage.connect() as connection:
                try:
                    odd(connection)
                except OSError:
                    continue

    def check(self) -> list[tuple[LogLine, Trace]]:
        """What has come since it was last called, once two usual requests have been answered as well."""
        for target in ("/text", "/app"):
            assert self._stage.get(target).status == 200
        by_key: dict[tuple[int, int, str], Trace] = {}
        lines: list[LogLine] = []

        def all_came() -> bool:
            lines[:] = self._stage.log.poll()[self._checked :]
            by_key.update({key_of_trace(trace): trace for trace in self._stage.site.agent.poll()})
            usual = {line["request_uri"] for line in lines[-4:]}
            return {"/text", "/app"} <= usual and all(key_of_log(line) in by_key for line in lines)

        wait_until(all_came, "the traces of all requests")
        self._checked += len(lines)
        pairs = [(line, by_key[key_of_log(line)]) for line in lines]
        wrong = [(found, line) for line, trace in pairs if (found := list(_wrong(line, trace)))]
        assert not wrong, wrong[:3]
        return pairs


@nginx
def test_odd_requests(stage: Stage) -> None:
    watched = Watched(stage)
    found: dict[str, list[tuple[LogLine, Trace]]] = {}
    for name, odd in ODD.items():
        watched.new_worker()
        watched.send(odd, 1)
        found[name] = watched.check()
    negative = [line for line, _ in found["negative-length"] if int(line["request_length"]) < 0]
    assert negative, "nginx counts right"
    assert next(line["status"] for line, _ in found["made-up-status"]) == "1234"
    for name, odd in ODD.items():
        if name in ("negative-length", "made-up-status", "malformed-0"):
            watched.new_worker()
            watched.send(odd, HUNDRED)
            assert len(watched.check()) >= HUNDRED
    watched.new_worker()
    chance = random.Random(1)
    for name in chance.choices(list(ODD), k=HUNDRED):
        watched.send(ODD[name], 1)
    watched.check()


@nginx
def test_a_worker_that_was_stopped(stage: Stage) -> None:
    """Its clock then says of an upstream's answer that it took so long; what its sockets say is as right as ever."""
    watched = Watched(stage)
    watched.new_worker()
    wait_until(lambda: len(stage.site.nginx.worker_pids()) == 1, "the old worker to end")
    (pid,) = stage.site.nginx.worker_pids()
    descriptors = Path(f"/proc/{pid}/fd")
    idle = len(list(descriptors.iterdir()))
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/slow?delay_ms=1000"))
        wait_until(lambda: len(list(descriptors.iterdir())) == idle + 2, "the upstream to be asked")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(10.6)
        os.kill(pid, signal.SIGCONT)
        assert connection.read_response().status == 200
    slow = [line for line, _ in watched.check() if line["request_uri"].startswith("/slow")]
    assert float(slow[0]["upstream_response_time"]) > 10

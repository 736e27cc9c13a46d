"""Workers that crash, are killed or replaced repeatedly under load: no false trace, no leak, and losses are counted."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from e2e.http1_client import ConnectionEnded, Http1Connection
from e2e.kernel_maps import KernelMaps
from e2e.nginx_server import wait_until
from e2e.stage import Stage
from e2e.timing import Slack

WORKERS = 2
CLIENTS = 8
SERVER = "location / { return 200 ok; } location /app { proxy_pass http://@UP@; }"
CRASHES = 20
RELOADS = 200

# Workers that begin and end take the processors from those that serve; and how long one has waited for them is not
# known once it is gone (NginxServer.off_processor_ms).
SLACK = Slack(late_max_ms=1000, median_max_ms=10)


class Crowd:
    """Clients that ask until told to stop, and come back where their connection broke."""

    def __init__(self, stage: Stage, keep_alive: bool) -> None:
        self._stage = stage
        self._keep_alive = keep_alive
        self._stop = threading.Event()
        self.answered = [0] * CLIENTS
        self.broken = [0] * CLIENTS
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self._stop.is_set():
                try:
                    with Http1Connection(self._stage.addresses["ipv4"]) as connection:
                        for _ in range(chance.randrange(1, 30) if self._keep_alive else 1):
                            target = chance.choice(["/", "/app", "/app?delay_ms=20"])
                            assert connection.request(target).status == 200
                            self.answered[number] += 1
                except (ConnectionEnded, OSError):
                    self.broken[number] += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.errors == []

    def wait_for_more(self, count: int = 40) -> None:
        """Requests, from now on."""
        before = sum(self.answered)
        wait_until(lambda: sum(self.answered) > before + count or bool(self.errors), "more requests", 30)


@contextmanager
def no_leak(stage: Stage) -> Iterator[KernelMaps]:
    """Afterwards the kernel's maps hold nothing of requests, nor of sockets and processes that are gone."""
    maps = KernelMaps(stage.site.agent)
    yield maps

    def is_clean() -> bool:
        return (
            maps.in_flight() == {"active_requests": 0, "attempts": 0}
            and not maps.stale_sockets()
            and maps.processes() == {stage.site.nginx.pid, *stage.site.nginx.worker_pids()} == maps.callers()
        )

    try:
        wait_until(is_clean, "clean maps", 20)
    except TimeoutError:
        raise AssertionError((maps.in_flight(), maps.stale_sockets(), maps.processes())) from None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["killed", "crashed"])
@pytest.mark.nginx(server=SERVER)
def test_workers_that_die(stage: Stage, number: signal.Signals) -> None:
    nginx = stage.site.nginx
    dead: list[int] = []
    with no_leak(stage) as maps:
        most_in_flight = 0
        with Crowd(stage, keep_alive=True) as crowd:
            for turn in range(CRASHES):
                crowd.wait_for_more()
                most_in_flight = max(most_in_flight, maps.in_flight()["active_requests"])
                dead.append(random.Random(turn).choice(nginx.worker_pids()))
                os.kill(dead[-1], number)
                wait_until(lambda: len(set(nginx.worker_pids()) - set(dead)) == WORKERS, "the worker's successor")
            crowd.wait_for_more()
    assert most_in_flight > 0
    assert sum(crowd.broken) > 0
    # A worker may be killed between an answer and its log line; and have logged what the client did not get any more.
    wait_until(lambda: len(stage.log.poll()) >= sum(crowd.answered) - CRASHES, "the log lines")
    assert len(stage.log.lines) <= sum(crowd.answered) + sum(crowd.broken)
    stage.match(stage.log.lines, stage.site.agent.poll, SLACK)
    stage.site.losses_max += sum(crowd.broken)
    stage.site.unlogged |= {str(pid) for pid in dead}
    stage.site.expected_problems += [f"worker process {pid} exited on signal {number}" for pid in dead]


@pytest.mark.nginx(server=SERVER)
def test_reload_storm(stage: Stage) -> None:
    """Not one request fails, and each has its trace."""
    nginx = stage.site.nginx
    seen = set(nginx.worker_pids())
    with no_leak(stage):
        with Crowd(stage, keep_alive=False) as crowd:
            for _ in range(RELOADS):
                nginx.reload()
                seen |= set(nginx.worker_pids())
            crowd.wait_for_more()
        wait_until(lambda: len(nginx.worker_pids()) == WORKERS, "the workers of before to go", 20)
    assert len(seen) > RELOADS
    assert sum(crowd.broken) == 0
    stage.exchanges(sum(crowd.answered), SLACK, 30)

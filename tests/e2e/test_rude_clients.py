"""Many clients and upstreams that break off at any moment: descriptors are reused all the time."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.http1_client import Http1Connection, request_bytes
from e2e.kernel_maps import KernelMaps
from e2e.nginx_server import wait_until
from e2e.stage import Stage
from e2e.timing import Slack

BOTH_BEGINNINGS = True
WORKERS = 2
CLIENTS = 12
TURNS = 150

# Where a client is gone or an upstream fails, what came last came before nginx noticed and gave up.
SLACK = Slack(end_early=True, response_early=True, late_max_ms=100)

HTTP = """
    upstream @NAME@_kept { server @UP@ max_fails=0; server @OTHER@ max_fails=0; keepalive 4; keepalive_timeout 1s; }
    upstream @NAME@_dead { server @DEAD1@ max_fails=0; server @DEAD2@ max_fails=0; }
    """
SERVER = """
    # nginx does not notice every reset at once, but by these times it does.
    keepalive_timeout 1s;
    client_header_timeout 2s;
    client_body_timeout 2s;
    lingering_timeout 1s;
    send_timeout 2s;
    proxy_read_timeout 2s;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    location / { root @HTML@; }
    location /text { return 200 text; }
    location /app { proxy_pass http://@UP@; proxy_set_header Connection close; }
    location /kept { proxy_pass http://@NAME@_kept; }
    location /dead { proxy_pass http://@NAME@_dead; }
    location /deaf { proxy_pass http://@DEAF@; proxy_connect_timeout 2s; }
    location /unbuffered { proxy_pass http://@UP@; proxy_request_buffering off; }
    location /impatient { proxy_pass http://@UP@; proxy_read_timeout 20ms; }
    """

Rude = Callable[[Http1Connection, random.Random], None]


def _leave(connection: Http1Connection, chance: random.Random) -> None:
    connection.abort() if chance.random() < 0.5 else connection.close()


def leaves_at_once(connection: Http1Connection, chance: random.Random) -> None:
    connection.send(request_bytes("GET", chance.choice(["/hello.txt", "/app", "/kept?delay_ms=5"])))
    _leave(connection, chance)


def leaves_while_waiting(connection: Http1Connection, chance: random.Random) -> None:
    _leave_unanswered(connection, "/app?delay_ms=40", chance)


def leaves_while_nginx_connects(connection: Http1Connection, chance: random.Random) -> None:
    _leave_unanswered(connection, "/deaf", chance)


def _leave_unanswered(connection: Http1Connection, target: str, chance: random.Random) -> None:
    connection.send(request_bytes("GET", target))
    connection.socket.settimeout(chance.random() * 0.05)
    try:
        connection.socket.recv(1)
    except TimeoutError:
        _leave(connection, chance)


def leaves_during_the_download(connection: Http1Connection, chance: random.Random) -> None:
    connection.send(request_bytes("GET", chance.choice(["/large.bin", "/app?bytes=3000000"])))
    connection.socket.recv(chance.randrange(1, 100_000))
    _leave(connection, chance)


def sends_half_a_header(connection: Http1Connection, chance: random.Random) -> None:
    whole = request_bytes("GET", "/half", {"User-Agent": "rude"})
    connection.send(whole[: chance.randrange(1, len(whole) - 1)])
    _leave(connection, chance)


def sends_half_a_body(connection: Http1Connection, chance: random.Random) -> None:
    connection.send(request_bytes("POST", chance.choice(["/app", "/unbuffered", "/text"]), {"Content-Length": "99"}))
    connection.send(b"b" * chance.randrange(1, 98))
    _leave(connection, chance)


def sends_nonsense(connection: Http1Connection, chance: random.Random) -> None:
    connection.send(chance.randbytes(50) + b"\r\n\r\n")
    connection.read_until_closed()


def pipelines(connection: Http1Connection, chance: random.Random) -> None:
    targets = chance.choices(["/text", "/kept", "/app", "/hello.txt", "/nothing", "/kept?end=close"], k=6)
    connection.send(b"".join(request_bytes("GET", target) for target in targets))
    for _ in range(chance.randrange(6)):
        connection.read_response()
    _leave(connection, chance)


def meets_a_bad_upstream(connection: Http1Connection, chance: random.Random) -> None:
    faults = ["/app?end=reset", "/app?end=close", "/kept?end=reset", "/app?end=truncate&bytes=100", "/dead"]
    connection.send(request_bytes("GET", chance.choice([*faults, "/impatient?delay_ms=60"])))
    connection.socket.recv(1000)


def behaves(connection: Http1Connection, chance: random.Random) -> None:
    for target in chance.choices(["/text", "/kept", "/app", "/hello.txt"], k=5):
        assert connection.request(target).status == 200


KINDS: list[Rude] = [
    leaves_at_once,
    leaves_while_waiting,
    leaves_while_nginx_connects,
    leaves_during_the_download,
    sends_half_a_header,
    sends_half_a_body,
    sends_nonsense,
    pipelines,
    meets_a_bad_upstream,
    behaves,
]


@pytest.mark.nginx(
    listen="listen @LISTEN@ reuseport;",
    http=HTTP,
    server=SERVER,
)
def test_rude_clients(stage: Stage) -> None:
    failures: list[str] = []

    def open_descriptors() -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in stage.site.nginx.worker_pids())

    def client(number: int) -> None:
        chance = random.Random(number)
        for turn in range(TURNS):
            kind = chance.choice(KINDS)
            try:
                with Http1Connection(stage.addresses["ipv4"]) as connection:
                    kind(connection, chance)
            except Exception as error:
                failures.append(f"client {number}, turn {turn}, {kind.__name__}: {error!r}")

    idle = open_descriptors()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    wait_until(lambda: open_descriptors() == idle, "nginx to be idle again", 20)
    maps = KernelMaps(stage.site.agent)
    assert maps.in_flight() == {"active_requests": 0, "attempts": 0}
    assert maps.stale_sockets() == set()
    lines = stage.log.poll()
    exchanges = stage.match(lines, stage.site.agent.poll, SLACK)
    statuses = Counter(each.log["status"] for each in exchanges)
    # All that this test is about did happen.
    assert {"200", "400", "404", "499", "502", "504"} <= statuses.keys()
    assert len(lines) > CLIENTS * TURNS

"""Client connections: kept alive, pipelined, slow; with IPv4, IPv6 and unix sockets on both sides."""

import time

import pytest

from e2e.http1_client import request_bytes
from e2e.stage import Stage
from e2e.timing import Slack

BOTH_BEGINNINGS = True
READ_WRITE = ["downstream read", "downstream write"]
PROXIED = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
RETURN = "location / { return 200 'short text'; }"
PAUSE = 0.15


@pytest.mark.nginx(server=RETURN)
def test_kept_alive_connection(stage: Stage) -> None:
    with stage.connect() as connection:
        for index in range(20):
            assert connection.request(f"/{index}").status == 200
    exchanges = stage.exchanges(20)
    assert [each.trace.outline() for each in exchanges] == [READ_WRITE] * 20
    assert [each.trace.server.attributes["url.path"] for each in exchanges] == [f"/{index}" for index in range(20)]
    assert len({each.trace.server.attributes["nginx.connection.id"] for each in exchanges}) == 1
    assert len({each.trace.trace_id for each in exchanges}) == 20


@pytest.mark.nginx(server=RETURN)
def test_idle_time_between_requests_belongs_to_none(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send_slowly([request_bytes("GET", "/first"), request_bytes("GET", "/second")], PAUSE)
        assert [connection.read_response().status for _ in range(2)] == [200, 200]
    first, second = stage.exchanges(2)
    assert first.trace.server.seconds < PAUSE / 2
    assert second.trace.server.seconds < PAUSE / 2
    assert second.trace.server.start_unix_ns - first.trace.server.end_unix_ns > PAUSE / 2 * 1e9


@pytest.mark.nginx(server=RETURN)
def test_pipelined_requests(stage: Stage) -> None:
    """All arrive in one segment: only the first was read for itself."""
    with stage.connect() as connection:
        connection.send(b"".join(request_bytes("GET", f"/{index}") for index in range(10)))
        assert [connection.read_response().status for _ in range(10)] == [200] * 10
    exchanges = stage.exchanges(10)
    assert exchanges[0].trace.outline()[0] == "downstream read"
    assert all(each.trace.outline()[-1] == "downstream write" for each in exchanges)
    starts = [each.trace.server.start_unix_ns for each in exchanges]
    assert starts == sorted(starts)
    assert [each.trace.server.attributes["nginx.connection.requests"] for each in exchanges] == list(range(1, 11))


@pytest.mark.nginx(server="location /slow { proxy_pass http://@UP@; } location / { return 200 ok; }")
def test_pipelined_behind_a_slow_request(stage: Stage) -> None:
    """A pipelined request begins when nginx takes it up, not when its bytes came in."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/slow?delay_ms=200") + request_bytes("GET", "/fast"))
        assert [connection.read_response().status for _ in range(2)] == [200, 200]
    slow, fast = stage.exchanges(2)
    assert slow.trace.server.seconds > 0.19
    assert slow.trace.outline() == PROXIED
    assert fast.trace.server.seconds < 0.1
    assert fast.trace.server.start_unix_ns >= slow.trace.server.end_unix_ns


@pytest.mark.nginx(server=RETURN)
def test_dripped_header(stage: Stage) -> None:
    whole = request_bytes("GET", "/dripped", {"User-Agent": "drip"})
    with stage.connect() as connection:
        connection.send_slowly([whole[:1], whole[1:10], whole[10:-2], whole[-2:]], PAUSE)
        assert connection.read_response().status == 200
    trace = stage.exchange().trace
    assert trace.outline() == READ_WRITE
    assert 2.9 * PAUSE < trace.named("downstream read")[0].seconds < 3 * PAUSE + 0.1
    assert trace.named("downstream write")[0].seconds < 0.1


@pytest.mark.nginx(server=RETURN)
def test_second_request_begins_in_the_first_ones_segment(stage: Stage) -> None:
    """Half of it came with the first request, half later: its read lasts until then."""
    first, second = request_bytes("GET", "/first"), request_bytes("GET", "/second")
    with stage.connect() as connection:
        connection.send_slowly([first + second[:9], second[9:]], PAUSE)
        assert [connection.read_response().status for _ in range(2)] == [200, 200]
    begun_early = stage.exchanges(2)[1].trace
    assert begun_early.server.seconds > 0.9 * PAUSE
    assert begun_early.named("downstream read")[0].seconds > 0.9 * PAUSE


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_dripped_body(stage: Stage) -> None:
    """Buffered: the upstream is asked when all of it is there."""
    head = request_bytes("POST", "/", {"Content-Length": "3000"})
    with stage.connect() as connection:
        connection.send_slowly([head, b"a" * 1000, b"b" * 1000, b"c" * 1000], PAUSE)
        assert connection.read_response().status == 200
    trace = stage.exchange().trace
    assert trace.outline() == PROXIED
    read, connect = trace.named("downstream read")[0], trace.named("upstream connect")[0]
    assert 2.9 * PAUSE < read.seconds < 3 * PAUSE + 0.1
    assert connect.start_unix_ns >= read.end_unix_ns


@pytest.mark.nginx(server="location / { root @HTML@; sendfile_max_chunk 128k; }")
def test_slow_reader(stage: Stage) -> None:
    """The write ends with the last byte given to the kernel, after the client took what would not fit."""
    with stage.connect(receive_buffer_bytes=4096) as connection:
        connection.send(request_bytes("GET", "/large.bin", {"Range": "bytes=0-8000000"}))
        time.sleep(PAUSE)  # reads nothing meanwhile
        assert connection.read_response().body_bytes == 8_000_001
    trace = stage.exchange().trace
    assert trace.outline() == READ_WRITE
    assert trace.named("downstream write")[0].seconds > 0.9 * PAUSE


@pytest.mark.parametrize("client", ["ipv4", "ipv6", "unix"])
@pytest.mark.parametrize("upstream", ["UP", "UP6", "UP_UNIX"])
@pytest.mark.nginx(
    listen="listen @LISTEN@; listen @LISTEN6@; listen @LISTEN_UNIX@;",
    server="""
    location /UP/ { proxy_pass http://@UP@; }
    location /UP6/ { proxy_pass http://@UP6@; }
    location /UP_UNIX/ { proxy_pass http://@UP_UNIX@:; }
    """,
)
def test_addresses(stage: Stage, client: str, upstream: str) -> None:
    with stage.connect(client) as connection:
        assert connection.request(f"/{upstream}/").status == 200
    trace = stage.exchange().trace
    assert trace.outline() == PROXIED
    attributes = trace.server.attributes
    assert attributes["server.address"] == "localhost"  # the Host header
    port = None if client == "unix" else stage.addresses[client][1]
    assert attributes.get("server.port") == port


@pytest.mark.nginx(server=RETURN)
def test_connections_without_a_request_have_no_trace(stage: Stage) -> None:
    for _ in range(5):
        stage.connect().close()
    stage.get("/")
    stage.exchange()


@pytest.mark.nginx(server=RETURN)
def test_unwanted_body_comes_slowly(stage: Stage) -> None:
    """Answered at once, while the body that nobody wants still comes: the read is longer than the write."""
    head = request_bytes("POST", "/", {"Content-Length": "2000"})
    with stage.connect() as connection:
        connection.send_slowly([head, b"a" * 1000, b"b" * 1000], PAUSE)
        assert connection.read_response().status == 200
        assert connection.request("/next").status == 200
    discarding, following = stage.exchanges(2, Slack(end_early=True))
    assert sorted(discarding.trace.outline()) == READ_WRITE
    assert discarding.trace.named("downstream write")[0].seconds < PAUSE
    assert following.trace.server.seconds < PAUSE

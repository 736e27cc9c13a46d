"""Requests that nginx itself delays or rejects: the wait is nginx's own, and only the SERVER span contains it."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2e.http1_client import request_bytes
from e2e.nginx_server import nginx_version, wait_until
from e2e.stage import Stage

READ_WRITE = ["downstream read", "downstream write"]
PROXIED = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]

ZONE = "limit_req_zone $server_port zone=@NAME@:1m rate=10r/s;"
INTERVAL = 0.1
"""Between two requests that ZONE lets pass."""


@pytest.mark.nginx(http=ZONE, server="limit_req zone=@NAME@ burst=5; location / { proxy_pass http://@UP@; }")
def test_delayed_requests(stage: Stage) -> None:
    """Five at once: the first passes, each further one waits its turn before nginx asks the upstream."""
    with ThreadPoolExecutor(5) as clients:
        assert [response.status for response in clients.map(stage.get, ["/"] * 5)] == [200] * 5
    traces = [each.trace for each in stage.exchanges(5)]
    assert [trace.outline() for trace in traces] == [PROXIED] * 5
    for turn, trace in enumerate(traces):
        read, connect = trace.named("downstream read")[0], trace.named("upstream connect")[0]
        assert read.seconds < INTERVAL / 2
        assert (turn - 0.6) * INTERVAL < (connect.start_unix_ns - read.end_unix_ns) / 1e9
        assert trace.server.seconds > (turn - 0.6) * INTERVAL


@pytest.mark.nginx(
    http=ZONE, server="location / { limit_req zone=@NAME@ burst=1; limit_req_status 429; return 200 'not limited'; }"
)
def test_return_comes_before_the_limit(stage: Stage) -> None:
    """`return` answers in an earlier phase: nobody waits."""
    with stage.connect() as connection:
        assert [connection.request("/").status for _ in range(4)] == [200] * 4
    for each in stage.exchanges(4):
        assert each.trace.server.seconds < INTERVAL / 2


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.nginx(
    http=ZONE,
    server="""
    limit_req zone=@NAME@;
    location /503/ { alias @HTML@/; }
    location /429/ { limit_req zone=@NAME@; limit_req_status 429; alias @HTML@/; }
    """,
)
def test_too_many_requests(stage: Stage, status: int) -> None:
    with stage.connect() as connection:
        statuses = [connection.request(f"/{status}/hello.txt").status for _ in range(3)]
    assert statuses == [200, status, status]
    for each in stage.exchanges(3)[1:]:
        assert each.trace.outline() == READ_WRITE
        assert each.trace.server.status == ("ERROR" if status == 503 else "UNSET")
        assert each.trace.server.seconds < INTERVAL


@pytest.mark.nginx(
    http=ZONE,
    server="""
    limit_req_dry_run on;
    location / { limit_req zone=@NAME@; alias @HTML@/; }
    location /delayed/ { limit_req zone=@NAME@ burst=5; alias @HTML@/; }
    """,
)
@pytest.mark.skipif(len(nginx_version()) > 0 and nginx_version() < (1, 17, 6), reason="no dry run before nginx 1.17.6")
def test_limits_that_are_only_tried_out(stage: Stage) -> None:
    """The oracle compares what the trace says of a limit with the log, here and in the other tests."""
    with stage.connect() as connection:
        for path in ("/hello.txt", "/hello.txt", "/delayed/hello.txt"):
            assert connection.request(path).status == 200
    logged = [each.log["limit_req_status"] for each in stage.exchanges(3)]
    assert logged == ["PASSED", "REJECTED_DRY_RUN", "DELAYED_DRY_RUN"]


@pytest.mark.nginx(http=ZONE, server="location / { limit_req zone=@NAME@ burst=5; proxy_pass http://@UP@; }")
def test_client_leaves_while_it_waits(stage: Stage) -> None:
    with stage.connect() as first, stage.connect() as second, stage.connect() as leaving:
        for connection in (first, second, leaving):
            connection.send(request_bytes("GET", "/"))
        time.sleep(INTERVAL / 4)
        leaving.close()
        assert [connection.read_response().status for connection in (first, second)] == [200, 200]
    left = next(each for each in stage.exchanges(3) if each.log["status"] == "499")
    assert left.trace.outline() == ["downstream read"]
    assert left.trace.server.attributes["nginx.termination"] == "client_closed_request"


@pytest.mark.nginx(
    http="limit_conn_zone $server_port zone=@NAME@:1m;",
    server="limit_conn @NAME@ 1; limit_conn_status 429; location / { proxy_pass http://@UP@; }",
)
def test_too_many_connections(stage: Stage) -> None:
    with stage.connect() as slow, stage.connect() as refused:
        slow.send(request_bytes("GET", "/?delay_ms=300"))
        # nginx counts a connection from the moment when its request's header is complete.
        wait_until(lambda: refused.request("/").status == 429, "the limit")
        assert slow.read_response().status == 200
    wait_until(lambda: any(line["upstream_addr"] for line in stage.log.poll()), "the slow request's log line")
    exchanges = stage.exchanges(len(stage.log.lines))
    assert {each.log["status"] for each in exchanges} == {"200", "429"}
    for each in exchanges:
        assert each.trace.outline() == (PROXIED if each.log["upstream_addr"] else READ_WRITE)


@pytest.mark.nginx(server="location / { root @HTML@; limit_rate 200k; }")
def test_slow_download(stage: Stage) -> None:
    """nginx spreads the answer by itself, while the client would take more."""
    with stage.connect() as connection:
        assert connection.request("/large.bin", headers={"Range": "bytes=0-499999"}).body_bytes == 500_000
    each = stage.exchange()
    assert each.trace.outline() == READ_WRITE
    assert each.trace.named("downstream write")[0].seconds > 0.9
    assert each.trace.named("downstream read")[0].seconds < 0.1


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_slow_download_on_the_upstreams_wish(stage: Stage) -> None:
    """The upstream is done long before the client."""
    assert stage.get("/?bytes=300000&header=X-Accel-Limit-Rate:150000").body_bytes == 300_000
    trace = stage.exchange().trace
    assert trace.outline() == PROXIED
    exchange, write = trace.named("upstream exchange")[0], trace.named("downstream write")[0]
    assert write.seconds > 0.9
    assert exchange.end_unix_ns < write.end_unix_ns


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_limit_rate 150000; }")
def test_slow_read_of_the_upstream(stage: Stage) -> None:
    """nginx takes the upstream's answer slowly: the exchange lasts."""
    assert stage.get("/?bytes=300000").body_bytes == 300_000
    trace = stage.exchange().trace
    assert trace.outline() == PROXIED
    assert trace.named("upstream exchange")[0].seconds > 0.9


@pytest.mark.nginx(
    server="""
    location /guarded { auth_delay 200ms; auth_request /auth; alias @HTML@/hello.txt; }
    location = /auth { internal; proxy_pass http://@UP@/?status=401; }
    """
)
def test_delayed_refusal(stage: Stage) -> None:
    assert stage.get("/guarded").status == 401
    trace = stage.exchange().trace
    assert trace.outline() == PROXIED
    assert trace.server.seconds > 0.19
    assert trace.named("upstream exchange")[0].seconds < 0.1

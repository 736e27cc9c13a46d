"""Requests that an upstream answers."""

import time

import pytest

from e2e.http1_client import request_bytes
from e2e.nginx_server import NGINX, nginx_build
from e2e.stage import FILES, LARGE_BYTES, Stage
from e2e.timing import LONG_TURN_MS, Slack
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.layouts import layout_for
from otel_nginx_ebpf.planner.plan import tells_cache_lock

BOTH_BEGINNINGS = True
NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
REUSED = ["downstream read", "upstream exchange", "downstream write"]
READ_WRITE = ["downstream read", "downstream write"]

KEEPALIVE = "upstream @NAME@ { server @UP@; keepalive 4; }"
TO_KEEPALIVE = 'proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection "";'


@pytest.mark.nginx(server="location /app/ { proxy_pass http://@UP@; }")
def test_new_upstream_connection_each(stage: Stage) -> None:
    for _ in range(3):
        assert stage.get("/app/x?bytes=100").body_bytes == 100
    traces = [each.trace for each in stage.exchanges(3)]
    assert [trace.outline() for trace in traces] == [NEW] * 3
    assert traces[0].server.name == "GET /app/"
    assert traces[0].named("upstream exchange")[0].attributes["nginx.upstream.connection.reused"] is False


@pytest.mark.nginx(http=KEEPALIVE, server=f"location / {{ {TO_KEEPALIVE} }}")
def test_kept_alive_upstream_connection(stage: Stage) -> None:
    for index in range(5):
        assert stage.get(f"/{index}?delay_ms=20").status == 200
    traces = [each.trace for each in stage.exchanges(5)]
    assert [trace.outline() for trace in traces] == [NEW] + [REUSED] * 4
    exchange = traces[1].named("upstream exchange")[0].attributes
    assert exchange["nginx.upstream.connection.reused"] is True
    assert exchange["nginx.upstream.name"] == "test_kept_alive_upstream_connection"
    assert all(trace.named("upstream exchange")[0].seconds > 0.019 for trace in traces)


@pytest.mark.nginx(http=KEEPALIVE, server=f"location / {{ {TO_KEEPALIVE} }}")
def test_kept_alive_on_both_sides(stage: Stage) -> None:
    with stage.connect() as connection:
        for index in range(30):
            assert connection.request(f"/{index}?bytes={index}").body_bytes == index
    assert [each.trace.outline() for each in stage.exchanges(30)] == [NEW] + [REUSED] * 29


@pytest.mark.nginx(http=KEEPALIVE, server=f"location / {{ {TO_KEEPALIVE} }}")
def test_kept_alive_upstream_connection_closed_meanwhile(stage: Stage) -> None:
    """The upstream closed the idle connection: the next request connects anew."""
    with stage.connect() as connection:
        assert connection.request("/?keep_alive=0").status == 200
        assert connection.request("/").status == 200
    assert [each.trace.outline() for each in stage.exchanges(2)] == [NEW, NEW]


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; client_max_body_size 10m; client_body_buffer_size 8k; }"
)
def test_buffered_body(stage: Stage) -> None:
    """Small enough for memory, and large enough for a file."""
    for size in (1, 5000, 3_000_000):
        assert stage.get("/", "POST", body=b"b" * size).status == 200
    for each in stage.exchanges(3):
        assert each.trace.outline() == NEW
        read, connect = each.trace.named("downstream read")[0], each.trace.named("upstream connect")[0]
        assert connect.start_unix_ns >= read.end_unix_ns


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_request_buffering off; proxy_http_version 1.1; }")
def test_unbuffered_body(stage: Stage) -> None:
    """The body passes through as it comes: the exchange overlaps the read."""
    head = request_bytes("POST", "/", {"Content-Length": "3000"})
    with stage.connect() as connection:
        connection.send_slowly([head, b"a" * 1000, b"b" * 1000, b"c" * 1000], 0.1)
        assert connection.read_response().status == 200
    trace = stage.exchange().trace
    read, exchange = trace.named("downstream read")[0], trace.named("upstream exchange")[0]
    assert read.seconds > 0.29
    assert exchange.seconds > 0.29
    assert exchange.start_unix_ns < read.end_unix_ns
    assert sorted(trace.outline()) == sorted(NEW)


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_request_buffering off; proxy_http_version 1.1; }")
def test_upstream_answers_before_the_body_is_there(stage: Stage) -> None:
    """The client has its answer while it still sends; nginx then takes what comes, and closes."""
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/?early=1", {"Content-Length": "2000"}) + b"a" * 1000)
        assert connection.read_response().status == 200
        time.sleep(0.1)
        connection.send(b"b" * 1000)
    each = stage.exchange(Slack(end_early=True))
    assert float(each.log["request_time"]) > 0.09
    assert sorted(each.trace.outline()) == sorted(NEW)
    assert each.trace.named("upstream exchange")[0].seconds < 0.09


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; } location /files/ { internal; alias @HTML@/; }")
def test_upstream_has_nginx_send_a_file(stage: Stage) -> None:
    assert stage.get("/?header=X-Accel-Redirect:/files/hello.txt").body == FILES["hello.txt"]
    trace = stage.exchange().trace
    assert trace.outline() == NEW
    assert trace.server.name == "GET /"  # the client asked for this location
    assert trace.server.attributes["url.path"] == "/"


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_http_version 1.1; }")
def test_chunked_request_body(stage: Stage) -> None:
    body = b"5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"
    assert stage.get("/", "PUT", {"Transfer-Encoding": "chunked"}, body).status == 200
    assert stage.exchange().trace.outline() == NEW


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_expect_continue(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/", {"Expect": "100-continue", "Content-Length": "4"}))
        assert connection.read_response().status == 100
        time.sleep(0.1)
        connection.send(b"body")
        assert connection.read_response().status == 200
    trace = stage.exchange(Slack(write_early=True)).trace
    assert sorted(trace.outline()) == sorted(NEW)
    assert trace.named("downstream read")[0].seconds > 0.09


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_slow_upstream(stage: Stage) -> None:
    assert stage.get("/?delay_ms=300").status == 200
    trace = stage.exchange().trace
    assert trace.outline() == NEW
    exchange = trace.named("upstream exchange")[0]
    assert exchange.seconds > 0.29
    assert exchange.attributes["nginx.upstream.time_to_first_byte_ns"] > 0.29e9
    assert trace.named("downstream write")[0].seconds < 0.1


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_upstream_stalls_inside_its_header(stage: Stage) -> None:
    """The time to the first byte is that, and not nginx's $upstream_header_time."""
    assert stage.get("/?head_ms=300").status == 200
    each = stage.exchange(Slack(header_early=True))
    assert float(each.log["upstream_header_time"]) > 0.29
    exchange = each.trace.named("upstream exchange")[0]
    assert exchange.attributes["nginx.upstream.time_to_first_byte_ns"] < 0.1e9
    assert exchange.seconds > 0.29


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_upstream_stalls_between_header_and_body(stage: Stage) -> None:
    assert stage.get("/?stall_ms=300").status == 200
    trace = stage.exchange().trace
    exchange = trace.named("upstream exchange")[0]
    assert exchange.attributes["nginx.upstream.time_to_first_byte_ns"] < 0.1e9
    assert exchange.seconds > 0.29


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_buffering off; proxy_http_version 1.1; }")
def test_dripped_response(stage: Stage) -> None:
    """Unbuffered: the client gets each part when it comes."""
    assert stage.get("/?bytes=4000&parts=4&part_ms=80&chunked=1").body_bytes == 4000
    trace = stage.exchange().trace
    assert trace.outline() == NEW
    assert trace.named("upstream exchange")[0].seconds > 0.31
    assert trace.named("downstream write")[0].seconds > 0.23


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_http_version 1.1; }")
def test_chunked_response(stage: Stage) -> None:
    assert stage.get("/?bytes=200000&parts=7&chunked=1").body_bytes == 200_000
    assert stage.exchange().trace.outline() == NEW


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_max_temp_file_size 200m; }")
def test_large_response_through_a_temporary_file(stage: Stage) -> None:
    """The client reads nothing until the upstream has sent all: nginx keeps 100 MB on disk."""
    with stage.connect(receive_buffer_bytes=65536) as connection:
        connection.send(request_bytes("GET", f"/?bytes={LARGE_BYTES}"))
        time.sleep(0.3)
        assert connection.read_response().body_bytes == LARGE_BYTES
    trace = stage.exchange(Slack(late_max_ms=LONG_TURN_MS)).trace
    assert trace.outline() == NEW
    assert "temporary file" in stage.site.nginx.error_log.read_text()
    assert trace.named("downstream write")[0].end_unix_ns > trace.named("upstream exchange")[0].end_unix_ns


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_statuses_pass_through(stage: Stage) -> None:
    with stage.connect() as connection:
        for status in (204, 301, 404, 500, 503):
            assert connection.request(f"/?status={status}").status == status
        assert connection.request("/", "HEAD").status == 200
        assert connection.request("/?etag=e", headers={"If-None-Match": '"e"'}).status == 304
    for each in stage.exchanges(7):
        assert each.trace.outline() == NEW


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; proxy_intercept_errors on; error_page 404 = @other; }"
    " location @other { proxy_pass http://@OTHER@; }"
)
def test_error_page_asks_another_upstream(stage: Stage) -> None:
    """Two groups of attempts, ` : ` between them in nginx's log."""
    stage.get("/?status=404")
    each = stage.exchange()
    assert " : " in each.log["upstream_addr"]
    assert each.trace.outline() == [
        "downstream read", "upstream connect", "upstream exchange", "upstream connect", "upstream exchange",
        "downstream write",
    ]  # fmt: skip
    assert each.trace.server.attributes["nginx.upstream.attempts"] == 2


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; proxy_http_version 1.1;"
    " proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; }"
)
def test_websocket(stage: Stage) -> None:
    """The SERVER span ends when the tunnel does."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/tunnel", {"Upgrade": "echo", "Connection": "Upgrade"}))
        assert connection.read_response().status == 101
        for _ in range(3):
            connection.send(b"ping")
            assert connection.socket.recv(100) == b"ping"
            time.sleep(0.1)
    trace = stage.exchange().trace
    assert sorted(trace.outline()) == sorted(NEW)
    assert trace.server.seconds > 0.29
    assert trace.named("upstream exchange")[0].seconds > 0.19


@pytest.mark.nginx(
    http="proxy_cache_path @PREFIX@/temp/@NAME@ keys_zone=@NAME@:1m;",
    server="""
    location / {
        proxy_pass http://@UP@;
        proxy_cache @NAME@;
        proxy_cache_key $uri;
        proxy_cache_valid 1m;
        proxy_cache_lock on;
    }
    """,
)
@pytest.mark.skipif("--without-http-cache" in nginx_build(), reason="no HTTP cache")
def test_a_request_waits_for_another_to_fill_the_cache(stage: Stage) -> None:
    """Of two at once, the second one waits. Neither the one that fills the cache nor a later one does."""
    with stage.connect() as filling, stage.connect() as waiting:
        filling.send(request_bytes("GET", "/kept?delay_ms=300"))
        time.sleep(0.1)
        waiting.send(request_bytes("GET", "/kept"))
        assert [connection.read_response().status for connection in (filling, waiting)] == [200, 200]
        assert waiting.request("/kept").status == 200
    told = {
        (each.log["upstream_cache_status"], each.trace.server.attributes.get("nginx.cache.lock_waited")): each
        for each in stage.exchanges(3)
    }
    waits = True if tells_cache_lock(Binary(NGINX), layout_for(Binary(NGINX))) else None
    assert told.keys() == {("MISS", None), ("HIT", waits), ("HIT", None)}
    assert told["HIT", waits].trace.outline() == READ_WRITE
    if waits:
        assert told["HIT", True].trace.server.seconds > 0.1


@pytest.mark.nginx(
    http="proxy_cache_path @PREFIX@/temp/@NAME@ keys_zone=@NAME@:1m;",
    server="""
    location / {
        proxy_pass http://@UP@;
        proxy_cache @NAME@;
        proxy_cache_key $uri;
        proxy_cache_use_stale error timeout http_500;
    }
    """,
)
def test_cache(stage: Stage) -> None:
    """MISS asks the upstream, HIT does not, STALE asks it in vain, REVALIDATED-less expiry asks again."""
    with stage.connect() as connection:
        for target in (
            "/kept?header=Cache-Control:max-age=60",
            "/kept",
            "/short?header=Cache-Control:max-age=1",
        ):
            assert connection.request(target).status == 200
        time.sleep(2.1)  # nginx keeps expiry times in whole seconds
        assert connection.request("/short?status=500").status == 200
        assert connection.request("/short?bytes=7").body_bytes == 7
    exchanges = stage.exchanges(5)
    assert [each.log["upstream_cache_status"] for each in exchanges] == [
        "MISS",
        "HIT",
        "MISS",
        "STALE",
        "EXPIRED",
    ]
    assert [each.trace.outline() for each in exchanges] == [NEW, READ_WRITE, NEW, NEW, NEW]
    stale = exchanges[3].trace
    assert stale.server.attributes["http.response.status_code"] == 200
    assert stale.named("upstream exchange")[0].attributes["http.response.status_code"] == 500


@pytest.mark.nginx(
    http="proxy_cache_path @PREFIX@/temp/@NAME@ keys_zone=@NAME@:1m;",
    server="""
    location / {
        proxy_pass http://@UP@;
        proxy_cache @NAME@;
        proxy_cache_key $uri;
        proxy_cache_use_stale updating;
        proxy_cache_background_update on;
    }
    """,
)
def test_cache_updated_in_the_background(stage: Stage) -> None:
    """The stale answer goes out at once; the update's exchange is in that request's trace, a subrequest's."""
    with stage.connect() as connection:
        assert connection.request("/short?header=Cache-Control:max-age=1").status == 200
        time.sleep(2.1)
        assert connection.request("/short?delay_ms=200&bytes=7").body_bytes == 5
    _, stale = stage.exchanges(2, Slack(end_early=True))
    assert stale.log["upstream_cache_status"] == "STALE"
    update = stale.trace.named("upstream exchange")
    assert [span.attributes["nginx.subrequest.uri"] for span in update] == ["/short"]
    assert update[0].seconds > 0.19
    assert stale.trace.named("downstream write")[0].end_unix_ns < update[0].end_unix_ns

"""HTTP/2: many requests at once on one connection, over TLS and with prior knowledge."""

import time

import pytest

from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import FILES, Stage
from e2e.timing import LONG_TURN_MS, ONE_TURN, Slack

READ_WRITE = ["downstream read", "downstream write"]
NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]

TLS = "listen @LISTEN@ ssl http2; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
LISTEN = pytest.mark.parametrize("tls", [True, False], ids=["tls", "prior-knowledge"])
SERVER = """
    location / { root @HTML@; }
    location /app { proxy_pass http://@UP@; }
    location /kept { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }
"""
HTTP = "upstream @NAME@ { server @UP@; keepalive 20; }"
BOTH = TLS.replace("@LISTEN@", "@LISTEN6@") + " listen @LISTEN@ http2;"


def connect(stage: Stage, tls: bool) -> Http2Connection:
    """The IPv6 port speaks TLS, the IPv4 port does not."""
    return Http2Connection(stage.addresses["ipv6" if tls else "ipv4"], tls)


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_one_stream_after_another(stage: Stage, tls: bool) -> None:
    connection = connect(stage, tls)
    for index in range(10):
        static = connection.exchange([Http2Request(f"/hello.txt?{index}")])[0]
        assert (static.status, static.body_bytes) == (200, len(FILES["hello.txt"]))
        assert connection.exchange([Http2Request(f"/app/{index}?delay_ms=20")])[0].status == 200
    connection.close()
    exchanges = stage.exchanges(20)
    for each in exchanges:
        assert each.trace.outline()[-1] == "downstream write"
        assert each.trace.server.attributes["network.protocol.version"] == "2"
        assert ("nginx.tls.handshake.duration_ns" in each.trace.server.attributes) == (tls and each is exchanges[0])
    assert all(each.trace.named("upstream exchange")[0].seconds > 0.019 for each in exchanges[1::2])


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_a_hundred_concurrent_streams(stage: Stage, tls: bool) -> None:
    """Static, proxied over new and kept connections, slow, missing, and POST with bodies small and large."""
    kinds = [
        lambda i: Http2Request(f"/hello.txt?{i}"),
        lambda i: Http2Request(f"/app/{i}?bytes={i * 100}&delay_ms={i}"),
        lambda i: Http2Request(f"/kept/{i}?bytes={i * 1000}"),
        lambda i: Http2Request(f"/nothing/{i}", headers=(("user-agent", f"agent {i}"),)),
        lambda i: Http2Request(f"/app/post/{i}", "POST", body=b"b" * (i * 300)),
    ]
    connection = connect(stage, tls)
    for _ in range(3):
        responses = connection.exchange([kinds[index % 5](index) for index in range(100)])
        assert [each.status for each in responses] == [200, 200, 200, 404, 200] * 20
    connection.close()
    # One turn of the event loop takes up a hundred requests and connects for forty: it is long every time.
    exchanges = stage.exchanges(300, ONE_TURN)
    for each in exchanges:
        path = each.trace.server.attributes["url.path"]
        outline = [name for name in each.trace.outline() if name != "downstream read"]
        if path.startswith("/app"):
            assert outline == ["upstream connect", "upstream exchange", "downstream write"]
        elif path.startswith("/kept"):
            assert [name for name in outline if name != "upstream connect"] == [
                "upstream exchange",
                "downstream write",
            ]
        else:
            assert outline == ["downstream write"]


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_large_bodies_both_ways(stage: Stage, tls: bool) -> None:
    connection = connect(stage, tls)
    requests = [Http2Request(f"/app/{i}?bytes=3000000", "POST", body=b"b" * 700_000) for i in range(4)]
    assert [each.body_bytes for each in connection.exchange(requests)] == [3_000_000] * 4
    connection.close()
    for each in stage.exchanges(4, Slack(late_max_ms=LONG_TURN_MS)):
        assert sorted(each.trace.outline()) == sorted(NEW)


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_a_stream_with_a_slow_body(stage: Stage, tls: bool) -> None:
    """Its read lasts as long as its own body takes, whatever other streams do meanwhile."""
    connection = connect(stage, tls)
    connection.start([Http2Request("/app/slow", "POST", body=b"b" * 40_000)], hold_bodies=True)
    time.sleep(0.2)
    connection.release_bodies()
    assert [each.status for each in connection.finish()] == [200]
    assert connection.exchange([Http2Request("/hello.txt")])[0].status == 200
    connection.close()
    slow, fast = stage.exchanges(2)
    assert slow.trace.named("downstream read")[0].seconds > 0.19
    assert fast.trace.server.seconds < 0.1


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_cancelled_stream(stage: Stage, tls: bool) -> None:
    """499 for the one that the client cancelled while it waited; its neighbour is answered."""
    connection = connect(stage, tls)
    cancelled, _ = connection.start([Http2Request("/app/a?delay_ms=1000"), Http2Request("/app/b?delay_ms=300")])
    time.sleep(0.1)
    connection.reset(cancelled)
    assert connection.finish()[1].status == 200
    connection.close()
    left, answered = stage.exchanges(2, lambda log: Slack(response_early=log["status"] == "499"))
    assert left.log["status"] == "499"
    assert "downstream write" not in left.trace.outline()
    assert left.trace.server.seconds < 0.25
    assert answered.trace.outline()[-1] == "downstream write"


@pytest.mark.nginx(listen=TLS, server=SERVER, http=HTTP)
def test_connection_closed_with_streams_open(stage: Stage) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=True)
    connection.start([Http2Request(f"/app/{index}?delay_ms=1000") for index in range(20)])
    time.sleep(0.2)
    connection.close()
    exchanges = stage.exchanges(20, Slack(response_early=True))
    assert {each.log["status"] for each in exchanges} == {"499"}
    assert all("downstream write" not in each.trace.outline() for each in exchanges)


@LISTEN
@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
def test_streams_do_not_share_their_times(stage: Stage, tls: bool) -> None:
    """One waits for its upstream while another's body and a third's whole exchange go over the same socket."""
    connection = connect(stage, tls)
    connection.start(
        [Http2Request("/app/slow?delay_ms=400"), Http2Request("/app/body", "POST", body=b"b" * 2000)],
        hold_bodies=True,
    )
    time.sleep(0.15)
    connection.release_bodies()
    connection.start([Http2Request("/hello.txt")])
    assert [each.status for each in connection.finish()] == [200, 200, 200]
    connection.close()
    by_path = {each.trace.server.attributes["url.path"]: each.trace for each in stage.exchanges(3)}
    slow, body, static = (by_path[path] for path in ("/app/slow", "/app/body", "/hello.txt"))
    assert all(read.seconds < 0.1 for read in slow.named("downstream read"))
    assert slow.named("downstream write")[0].seconds < 0.1
    assert slow.server.seconds > 0.39
    assert body.named("downstream read")[0].seconds > 0.14
    assert body.server.seconds < 0.3
    assert static.server.seconds < 0.1


@pytest.mark.nginx(listen=BOTH, server=SERVER, http=HTTP)
@pytest.mark.parametrize("target", ["/large.bin", "/app?bytes=50000000"])
def test_an_http2_stream_is_reset(stage: Stage, target: str) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.start([Http2Request(target)])
    assert connection.transport.socket.recv(20_000)
    time.sleep(0.1)
    connection.reset(1)
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert each.trace.server.attributes["nginx.termination"] == "client_closed_request"
    assert [span.error for span in each.trace.spans] == [None] * len(each.trace.spans)
    assert each.trace.server.seconds > 0.099
    connection.close()

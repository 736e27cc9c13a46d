"""Clients that send nonsense, stop in the middle of a request, or leave."""

import time

import pytest

from e2e.http1_client import request_bytes
from e2e.nginx_server import wait_until
from e2e.stage import Stage
from e2e.timing import Slack

BOTH_BEGINNINGS = True
READ_WRITE = ["downstream read", "downstream write"]
RETURN = "location / { return 200 ok; }"
MALFORMED = [
    (b"GARBAGE\r\n\r\n", ""),
    (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", ""),  # a TLS hello to a plain port
    (b"GET /no-host HTTP/1.1\r\n\r\n", "GET"),
    (b"GET /no-version HTTP/9.9\r\nHost: x\r\n\r\n", ""),
    (b"GET /header HTTP/1.1\r\nHost: x\r\nContent-Length: twelve\r\n\r\n", "GET"),
    (b"GET /framing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: cast\r\n\r\n", "GET"),
]


@pytest.mark.parametrize(
    ("sent", "method"),
    MALFORMED,
    ids=["garbage", "tls-hello", "no-host", "no-version", "content-length", "transfer-encoding"],
)
@pytest.mark.nginx(server=RETURN)
def test_malformed_request(stage: Stage, sent: bytes, method: str) -> None:
    with stage.connect() as connection:
        connection.send(sent)
        connection.read_until_closed()
    each = stage.exchange(Slack(end_early=True))
    assert int(each.log["status"]) in (400, 501, 505)
    assert each.trace.outline() == READ_WRITE
    if not method:
        assert each.trace.server.name == "HTTP"
        assert "url.path" not in each.trace.server.attributes


@pytest.mark.nginx(server=f"client_header_timeout 200ms; {RETURN}")
def test_header_timeout(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(b"GET /never HTTP/1.1\r\nHost: ")
        assert connection.read_until_closed() == b""
    each = stage.exchange()
    assert each.log["status"] == "408"
    assert "downstream write" not in each.trace.outline()
    assert each.trace.server.seconds > 0.19


@pytest.mark.nginx(server="client_body_timeout 200ms; location / { proxy_pass http://@UP@; }")
def test_body_timeout(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/half", {"Content-Length": "100"}) + b"half")
        connection.read_until_closed()
    each = stage.exchange()
    assert each.log["status"] == "408"
    assert set(each.trace.outline()) <= {"downstream read"}
    assert each.trace.server.seconds > 0.19


@pytest.mark.nginx(server="client_max_body_size 1k; location / { proxy_pass http://@UP@; }")
def test_body_too_large(stage: Stage) -> None:
    with stage.connect() as connection:
        assert connection.request("/", "POST", body=b"x" * 5000).status == 413
    assert stage.exchange(Slack(end_early=True)).trace.outline() == READ_WRITE


@pytest.mark.nginx(server=f"large_client_header_buffers 4 1k; client_header_buffer_size 1k; {RETURN}")
def test_uri_and_header_too_large(stage: Stage) -> None:
    for target, headers in (("/" + "a" * 2000, {}), ("/", {"X": "x" * 5000})):
        with stage.connect() as connection:
            connection.send(request_bytes("GET", target, headers))
            assert connection.read_response().status in (400, 414)
    exchanges = stage.exchanges(2, Slack(end_early=True))
    assert [each.log["status"] for each in exchanges] == ["414", "400"]
    assert [each.trace.outline() for each in exchanges] == [READ_WRITE, READ_WRITE]


@pytest.mark.parametrize("rude", [False, True], ids=["close", "reset"])
@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_client_leaves_while_waiting(stage: Stage, rude: bool) -> None:
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/?delay_ms=1000"))
        time.sleep(0.2)
        if rude:
            connection.abort()
    each = stage.exchange(Slack(response_early=True))
    assert each.log["status"] == "499"
    assert each.trace.outline() == ["downstream read", "upstream connect", "upstream exchange"]
    assert 0.19 < each.trace.server.seconds < 0.5
    assert each.trace.server.status == "UNSET"
    assert each.trace.named("upstream exchange")[0].status == "UNSET"


@pytest.mark.nginx(server="location / { proxy_pass http://@DEAF@; proxy_connect_timeout 2s; }")
def test_client_leaves_while_nginx_connects(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/"))
        time.sleep(0.2)
    each = stage.exchange()
    assert each.log["status"] == "499"
    assert each.trace.outline() == ["downstream read", "upstream connect"]
    assert each.trace.named("upstream connect")[0].status == "UNSET"


@pytest.mark.nginx(server="location / { root @HTML@; } location /proxied { proxy_pass http://@UP@; }")
@pytest.mark.parametrize("target", ["/large.bin", "/proxied?bytes=50000000"])
def test_client_leaves_during_the_download(stage: Stage, target: str) -> None:
    connection = stage.connect(receive_buffer_bytes=65536)
    connection.send(request_bytes("GET", target))
    received = len(connection.socket.recv(20_000))
    connection.abort()
    assert received
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert each.trace.outline()[-1] == "downstream write"
    assert each.trace.server.attributes["http.response.size"] < 50_000_000
    assert each.trace.server.attributes["nginx.termination"] == "client_closed_request"
    assert [span.error for span in each.trace.spans] == [None] * len(each.trace.spans)


@pytest.mark.nginx(server=RETURN)
def test_client_leaves_inside_its_header(stage: Stage) -> None:
    connection = stage.connect()
    connection.send(b"GET /unfinished HTTP/1.1\r\nHost:")
    time.sleep(0.1)
    connection.close()
    each = stage.exchange()
    assert each.log["status"] == "400"
    assert "downstream write" not in each.trace.outline()


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_client_leaves_inside_its_body(stage: Stage) -> None:
    connection = stage.connect()
    connection.send(request_bytes("POST", "/", {"Content-Length": "100"}) + b"half")
    time.sleep(0.1)
    connection.close()
    each = stage.exchange()
    assert each.log["status"] == "400"
    assert not each.trace.named("upstream connect")


@pytest.mark.nginx(server="send_timeout 200ms; location / { root @HTML@; }")
def test_client_stops_reading(stage: Stage) -> None:
    connection = stage.connect(receive_buffer_bytes=4096)
    connection.send(request_bytes("GET", "/large.bin"))
    log = stage.log
    wait_until(lambda: len(log.poll()) == 1, "nginx to give the client up")
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert each.trace.outline() == READ_WRITE
    assert (each.trace.server.attributes["nginx.termination"], each.trace.server.status) == ("timeout", "UNSET")


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_request_buffering off; proxy_http_version 1.1; }")
def test_client_leaves_inside_an_unbuffered_body(stage: Stage) -> None:
    """The upstream has half of the request, and gives no answer."""
    connection = stage.connect()
    connection.send(request_bytes("POST", "/", {"Content-Length": "100"}) + b"half")
    time.sleep(0.1)
    connection.close()
    each = stage.exchange(Slack(response_early=True))
    assert each.log["status"] in ("400", "499")
    assert sorted(each.trace.outline()) == ["downstream read", "upstream connect", "upstream exchange"]
    assert each.trace.named("upstream exchange")[0].status == "UNSET"
    assert each.trace.server.seconds > 0.09

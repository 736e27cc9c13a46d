"""Clients behind a balancer: the trace names the client that nginx names, and times exclude the preamble."""

import socket
import struct

import pytest

from e2e.http1_client import Http1Connection, request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import Exchange, Stage

READ_WRITE = ["downstream read", "downstream write"]
PROXIED = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]

BEHIND = {"listen": "listen @LISTEN@ proxy_protocol;"}
ANSWER = "location / { return 200 $remote_addr; }"
TRUSTING = "set_real_ip_from 127.0.0.1; set_real_ip_from unix:; real_ip_header proxy_protocol; real_ip_recursive on;"

V1 = b"PROXY TCP4 203.0.113.9 198.51.100.1 4321 80\r\n"
V1_IPV6 = b"PROXY TCP6 2001:db8::9 2001:db8::1 4321 80\r\n"
V1_UNKNOWN = b"PROXY UNKNOWN\r\n"
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
V2 = _V2 + struct.pack("!BBH4s4sHH", 0x21, 0x11, 12, bytes((203, 0, 113, 9)), bytes((198, 51, 100, 1)), 4321, 80)
V2_IPV6 = _V2 + struct.pack(
    "!BBH16s16sHH",
    0x21,
    0x21,
    36,
    socket.inet_pton(socket.AF_INET6, "2001:db8::9"),
    socket.inet_pton(socket.AF_INET6, "2001:db8::1"),
    4321,
    80,
)
V2_LOCAL = _V2 + struct.pack("!BBH", 0x20, 0, 0)

HEADERS = {
    "v1": (V1, "203.0.113.9"),
    "v1_ipv6": (V1_IPV6, "2001:db8::9"),
    "v1_unknown": (V1_UNKNOWN, None),
    "v2": (V2, "203.0.113.9"),
    "v2_ipv6": (V2_IPV6, "2001:db8::9"),
    "v2_local": (V2_LOCAL, None),
}
"""What a balancer sends first, and the client that it names."""


def client(each: Exchange) -> tuple[str | None, int | None]:
    attributes = each.trace.server.attributes
    return attributes.get("client.address"), attributes.get("client.port")


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.nginx(**BEHIND, server=ANSWER)
def test_proxy_protocol(stage: Stage, header: str) -> None:
    """Without realip the client is the balancer, whatever it says."""
    with stage.connect() as connection:
        connection.send(HEADERS[header][0] + request_bytes("GET", "/") + request_bytes("GET", "/again"))
        assert [connection.read_response().body for _ in range(2)] == [b"127.0.0.1"] * 2
        port = connection.socket.getsockname()[1]
    exchanges = stage.exchanges(2)
    assert [client(each) for each in exchanges] == [("127.0.0.1", port)] * 2
    assert exchanges[0].trace.outline() == READ_WRITE


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.nginx(**BEHIND, server=TRUSTING + "location / { proxy_pass http://@UP@; }")
def test_trusted_proxy_protocol(stage: Stage, header: str) -> None:
    preamble, named = HEADERS[header]
    with stage.connect() as connection:
        connection.send(preamble)
        assert [connection.request("/").status for _ in range(2)] == [200, 200]
        port = connection.socket.getsockname()[1]
    for each in stage.exchanges(2):
        assert client(each) == ((named, 4321) if named else ("127.0.0.1", port))
        assert each.trace.outline() == PROXIED


@pytest.mark.nginx(**BEHIND, server=ANSWER)
def test_idle_time_behind_the_proxy_header_is_no_requests(stage: Stage) -> None:
    """Balancers open connections ahead: the request begins with its own first byte."""
    with stage.connect() as connection:
        connection.send_slowly([V1, request_bytes("GET", "/")], 0.2)
        assert connection.read_response().status == 200
    trace = stage.exchange().trace
    assert trace.outline() == READ_WRITE
    assert trace.server.seconds < 0.1


@pytest.mark.nginx(
    listen="listen @LISTEN@ ssl proxy_protocol; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;",
    server=TRUSTING + ANSWER,
)
def test_proxy_protocol_then_tls(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(V2)
        connection.socket = trusting_tls().wrap_socket(connection.socket, server_hostname="localhost")
        assert [connection.request("/").body for _ in range(2)] == [b"203.0.113.9"] * 2
    for each in stage.exchanges(2):
        assert client(each) == ("203.0.113.9", 4321)
        assert each.trace.outline() == READ_WRITE


@pytest.mark.nginx(listen="listen @LISTEN@ http2 proxy_protocol;", server=TRUSTING + ANSWER)
def test_proxy_protocol_then_http2(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def send_first(self: Http1Connection, data: bytes) -> None:
        self.socket.sendall((V1 if data.startswith(b"PRI *") else b"") + data)

    monkeypatch.setattr(Http1Connection, "send", send_first)
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.start([Http2Request(f"/{index}") for index in range(5)])
    assert [response.status for response in connection.finish()] == [200] * 5
    connection.close()
    assert [client(each) for each in stage.exchanges(5)] == [("203.0.113.9", 4321)] * 5


@pytest.mark.nginx(**BEHIND, server=ANSWER)
def test_no_proxy_header(stage: Stage) -> None:
    """nginx hangs up: there was no request, so there is no trace."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/"))
        assert connection.read_until_closed() == b""
    with stage.connect() as connection:
        connection.send(V1)
        assert connection.request("/").status == 200
    stage.exchange()


FORWARDED = "set_real_ip_from 127.0.0.1; set_real_ip_from unix:; real_ip_header X-Forwarded-For; "


@pytest.mark.parametrize("listener", ["ipv4", "unix"])
@pytest.mark.nginx(listen="listen @LISTEN@; listen @LISTEN_UNIX@;", server=FORWARDED + ANSWER)
def test_forwarded_for(stage: Stage, listener: str) -> None:
    """Each request of a connection names its own client; a name without a port gives none."""
    names = ["203.0.113.7", "2001:db8::7", "203.0.113.8:4322", "[2001:db8::8]:4322"]
    with stage.connect(listener) as connection:
        for name in names:
            assert connection.request("/", headers={"X-Forwarded-For": f"192.0.2.1, {name}"}).status == 200
        assert connection.request("/").status == 200
        own = ("unix:", None) if listener == "unix" else connection.socket.getsockname()
    assert [client(each) for each in stage.exchanges(5)] == [
        ("203.0.113.7", None),
        ("2001:db8::7", None),
        ("203.0.113.8", 4322),
        ("2001:db8::8", 4322),
        own,
    ]


@pytest.mark.nginx(
    server=FORWARDED + "location / { auth_request /auth; proxy_pass http://@UP@; }"
    "location /auth { internal; proxy_pass http://@UP@/?status=204; }"
)
def test_forwarded_for_with_subrequests(stage: Stage) -> None:
    assert stage.get("/", headers={"X-Forwarded-For": "203.0.113.7"}).status == 200
    each = stage.exchange()
    assert client(each) == ("203.0.113.7", None)
    assert each.trace.server.attributes["nginx.upstream.attempts"] == 2

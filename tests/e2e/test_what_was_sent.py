"""What the client sent and what each peer was sent, compared with the client's bytes and with the peer's."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hpack import Decoder

from e2e.http1_client import Http1Connection, request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import BUILD, wait_until
from e2e.recorded_requests import KeepingPeer, RecordedNginx, head_of, told
from otel_nginx_ebpf.traces import sockaddr
from otel_nginx_ebpf.traces.record import METHODS, Request

MODULES = Path("/usr/lib/nginx/modules")
NAMES = ("ndk_http", "ngx_http_lua", "ngx_http_headers_more_filter")
MAIN = "\n".join(f"load_module {MODULES}/{name}_module.so;" for name in NAMES)

pytestmark = pytest.mark.skipif(
    BUILD is not None, reason="Debian's module packages fit Debian's nginx: run `make test`"
)

HTTP = """
proxy_cache_path @PREFIX@/temp/cache keys_zone=cache:1m;
upstream retried { server @DEAD1@ max_fails=0; server @UP@ max_fails=0; }
upstream kept { server @UP@; keepalive 4; }
large_client_header_buffers 4 128k;
server {
    listen @0@;
    error_page 502 504 /50x.html;
    location = /50x.html { return 200 sorry; }
    location /plain { proxy_pass http://@UP@; }
    location /rewritten/ { proxy_pass http://@UP@/other/; }
    location /dead { proxy_pass http://@DEAD1@; }
    location /missing { return 404; error_page 404 /404.html; }
    location = /404.html { return 200 missing; }
    location /fallback { proxy_pass http://@DEAD1@; error_page 502 = @fallback; }
    location @fallback { proxy_pass http://@UP@; }
    location /accel { proxy_pass http://@UP@; }
    location /inner/ { internal; proxy_pass http://@UP@; }
    location /cached { proxy_pass http://@UP@; proxy_cache cache; }
    location /method { proxy_method PATCH; proxy_pass http://@UP@; }
    location /host { proxy_set_header host lower.example; proxy_set_header X-Long @LONG@; proxy_pass http://@UP@; }
    location /hostless {
        proxy_set_header Host ""; proxy_set_body "a: b\\r\\nHost: body\\r\\n";
        proxy_pass http://@UP@;
    }
    location /late {
        proxy_set_header X-Long @LONG@; proxy_set_header X-Longer @LONG@; proxy_set_header Host late.example;
        proxy_pass http://@UP@;
    }
    location /lua {
        rewrite_by_lua_block {
            ngx.req.set_method(ngx["HTTP_" .. ngx.var.arg_method])
            ngx.req.set_header("Host", "lua.example")
            ngx.req.set_header("User-Agent", "lua")
        }
        proxy_set_header Host $http_host;
        proxy_pass http://@UP@;
    }
    location /more {
        more_set_input_headers "Host: more.example" "User-Agent: more";
        proxy_set_header Host $http_host;
        proxy_pass http://@UP@;
    }
    location /retried { proxy_pass http://retried; }
    location /mirrored { mirror /mirror; proxy_pass http://@UP@; }
    location = /mirror { internal; proxy_set_header Host mirror.example; proxy_pass http://@UP@; }
    location /guarded { auth_request /auth; proxy_pass http://@UP@; }
    location = /auth { internal; proxy_method HEAD; proxy_pass http://@UP@/auth; }
    location /unbuffered { proxy_request_buffering off; proxy_http_version 1.1; proxy_pass http://@UP@; }
    location /fastcgi { fastcgi_pass @UP@; fastcgi_param REQUEST_METHOD $request_method; }
    location /uwsgi { uwsgi_pass @UP@; uwsgi_param REQUEST_METHOD $request_method; }
    location /scgi { scgi_pass @UP@; scgi_param REQUEST_METHOD $request_method; }
    location /memcached { set $memcached_key k; memcached_pass @UP@; }
    location /grpc { grpc_pass @UP@; }
    location /page { ssi on; ssi_types *; alias @PREFIX@/ssi.html; mirror /slow-mirror; }
    location /one { proxy_pass http://@SLOW@; }
    location /two { proxy_pass http://@SLOW@; }
    location = /slow-mirror { internal; proxy_pass http://@SLOW@; }
}
server { listen @1@ http2; location / { proxy_pass http://@UP@; } }
server { listen @2@ proxy_protocol; set_real_ip_from 127.0.0.1; real_ip_header proxy_protocol; return 200 ok; }
server { listen @3@; set_real_ip_from 127.0.0.1; real_ip_header X-Forwarded-For; return 200 ok; }
server { listen @4@; return 200 ok; }
""".replace("@LONG@", "l" * 900)


@pytest.fixture(scope="module")
def peer() -> Iterator[KeepingPeer]:
    peer = KeepingPeer()
    yield peer
    peer.stop()


@pytest.fixture(scope="module")
def nginx(public_directory: Path, upstream_addresses: dict[str, str], peer: KeepingPeer) -> Iterator[RecordedNginx]:
    slow = socket.create_server(("127.0.0.1", 0))
    words = {"UP": peer.address, "DEAD1": upstream_addresses["dead1"], "SLOW": "{}:{}".format(*slow.getsockname())}
    directory = public_directory / "sent"
    nginx = RecordedNginx(directory, HTTP, words, MAIN)
    (directory / "ssi.html").write_text('<!--# include virtual="/one" --><!--# include virtual="/two" -->')
    yield nginx
    nginx.stop()
    slow.close()
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _only_this_test(peer: KeepingPeer) -> None:
    peer.sent.clear()


def client_method(request: Request) -> tuple[str | None, str | None]:
    return request.method, METHODS.get(request.method_bit)


def check_peer(request: Request, peer: KeepingPeer) -> None:
    """Compare what the record says about the attempts with what the peer received."""
    reached = [each for each in request.attempts if each.connect_failed_mono_ns is None]
    assert [told(each) for each in reached] == [head_of(sent) for sent in peer.sent]
    assert {each.protocol for each in request.attempts} == {"http_1"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PROPFIND", "QUERY"])
def test_plain(nginx: RecordedNginx, peer: KeepingPeer, method: str) -> None:
    path = f"/plain/{method}"
    nginx.get(f"{path}?a=b", method, {"User-Agent": "client"}, b"secret body" if method == "POST" else b"")
    request = nginx.request(path)
    check_peer(request, peer)
    assert request.method == method
    assert (request.host, request.user_agent, request.location) == ("localhost", "client", "/plain")
    assert (request.request_target, request.forwarded) == (None, None)
    assert request.peer_sockaddr == request.client_sockaddr
    assert request.attempts[0].sent_line == f"{method} {path}?a=b HTTP/1.0"


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("/rewritten/a%20b?c=d", "GET /other/a%20b?c=d HTTP/1.0"),
        ("/method/a", "PATCH /method/a HTTP/1.0"),
        ("/host/a", "GET /host/a HTTP/1.0"),
        ("/hostless/a", "GET /hostless/a HTTP/1.0"),
        ("/late/a", "GET /late/a HTTP/1.0"),
    ],
)
def test_sent_line(nginx: RecordedNginx, peer: KeepingPeer, target: str, line: str) -> None:
    nginx.get(target)
    request = nginx.request(target.partition("?")[0])
    check_peer(request, peer)
    assert request.attempts[0].sent_line == line
    assert client_method(request) == ("GET", "GET")


def test_error_page_of_a_dead_peer(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    assert nginx.get("/dead/a", "POST", body=b"secret body").body == b"sorry"
    request = nginx.request("/dead/a")
    assert client_method(request) == ("POST", "POST")
    assert request.location == "/dead"
    assert [told(each)[:2] for each in request.attempts] == [("POST", "POST /dead/a HTTP/1.0")]


def test_error_page_without_attempt(nginx: RecordedNginx) -> None:
    assert nginx.get("/missing/a", "DELETE").body == b"missing"
    request = nginx.request("/missing/a")
    assert client_method(request) == ("DELETE", "DELETE")
    assert request.location is None


def test_named_location(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    assert nginx.get("/fallback/a", "POST").status == 200
    request = nginx.request("/fallback/a")
    assert (client_method(request), request.location) == (("POST", "POST"), "/fallback")
    assert len(request.attempts) == 2
    assert len({each.upstream_request for each in request.attempts}) == 2
    check_peer(request, peer)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_internal_redirect_by_the_peer(nginx: RecordedNginx, peer: KeepingPeer, method: str) -> None:
    assert nginx.get(f"/accel/{method}?accel=/inner/{method}", method).status == 200
    request = nginx.request(f"/accel/{method}")
    assert (request.method, request.location) == (method, "/accel")
    assert [told(each)[0] for each in request.attempts] == [method, "HEAD" if method == "HEAD" else "GET"]
    assert len({each.upstream_request for each in request.attempts}) == 2
    check_peer(request, peer)


def test_head_through_a_cache(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    assert nginx.get("/cached/a", "HEAD").status == 200
    request = nginx.request("/cached/a")
    assert client_method(request) == ("HEAD", "HEAD")
    assert told(request.attempts[0])[0] == "GET"
    check_peer(request, peer)


@pytest.mark.parametrize(
    ("method", "set_method"), [("GET", "PUT"), ("POST", "HEAD"), ("DELETE", "GET"), ("PURGE", "POST")]
)
@pytest.mark.parametrize("cookie_bytes", [0, 3000])
def test_lua_overwrites(
    nginx: RecordedNginx, peer: KeepingPeer, method: str, set_method: str, cookie_bytes: int
) -> None:
    path = f"/lua/{method}/{cookie_bytes}"
    headers = {"User-Agent": "client", "X-Long": "l" * cookie_bytes}
    nginx.send(request_bytes(method, f"{path}?method={set_method}", headers), method="HEAD")
    request = nginx.request(path)
    assert request.method == method
    assert (request.host, request.user_agent, request.location) == ("localhost", "client", "/lua")
    check_peer(request, peer)
    assert told(request.attempts[0])[0::2] == (set_method, "lua.example")


@pytest.mark.parametrize("agent", ["client", None])
def test_headers_more_overwrites(nginx: RecordedNginx, peer: KeepingPeer, agent: str | None) -> None:
    path = f"/more/{agent}"
    nginx.send(request_bytes("GET", path, {"User-Agent": agent} if agent else {}))
    request = nginx.request(path)
    assert (request.host, request.user_agent) == ("localhost", agent)
    check_peer(request, peer)
    assert request.attempts[0].sent_host == "more.example"


@pytest.mark.parametrize(
    ("target", "path"),
    [("http://named.example:81/absolute?x", "/absolute"), ("HTTP://named.example", "/")],
)
def test_absolute_form(nginx: RecordedNginx, target: str, path: str) -> None:
    nginx.send(f"GET {target} HTTP/1.1\r\nHost: other\r\n\r\n".encode(), server=4)
    request = nginx.request(path)
    assert request.request_target == f"{target} HTTP/1.1"
    assert request.host == "other"


def test_spaces_after_the_method(nginx: RecordedNginx) -> None:
    nginx.send(b"GET   /spaces HTTP/1.1\r\nHost:localhost\r\nUser-Agent:     client\r\n\r\n", server=4)
    request = nginx.request("/spaces")
    assert (request.request_target, request.host, request.user_agent) == (None, "localhost", "client")


def test_retried(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    for index in range(2):
        nginx.get(f"/retried/{index}")
    requests = [nginx.request(f"/retried/{index}") for index in range(2)]
    request = max(requests, key=lambda each: len(each.attempts))
    assert len(request.attempts) == 2
    assert len({each.upstream_request for each in request.attempts}) == 1
    assert {each.sent_line for each in request.attempts} == {f"GET {request.uri} HTTP/1.0"}
    assert {each.sent_host for each in request.attempts} == {"retried"}


def test_mirror(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    nginx.get("/mirrored", "POST")
    request = nginx.request("/mirrored")
    assert sorted(map(told, request.attempts)) == sorted(map(head_of, peer.sent))
    assert {each.subrequest_uri for each in request.attempts} == {None, "/mirror"}
    assert len({each.upstream_request for each in request.attempts}) == 2
    assert request.location == "/mirrored"


def test_auth_request(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    nginx.get("/guarded", "POST")
    request = nginx.request("/guarded")
    assert [told(each)[0] for each in request.attempts] == ["HEAD", "POST"]
    check_peer(request, peer)


def test_unbuffered_body(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    body = b"secret body" * 5000
    nginx.get("/unbuffered", "PUT", body=body)
    request = nginx.request("/unbuffered")
    assert client_method(request) == ("PUT", "PUT")
    check_peer(request, peer)


@pytest.mark.parametrize("uri_bytes", [900, 1000, 1010, 1020, 1030, 2000, 4000, 4085, 5000, 65000])
def test_long_uri(nginx: RecordedNginx, peer: KeepingPeer, uri_bytes: int) -> None:
    path = f"/plain/long{uri_bytes}-".ljust(uri_bytes, "x")
    nginx.get(path)
    wait_until(lambda: bool(nginx.requests(path[:4096])), "the record")
    (request,) = nginx.requests(path[:4096])
    (attempt,) = request.attempts
    _, line, host = head_of(peer.sent[0])
    assert attempt.sent_line == line[:4096]
    assert ("STRING_SENT_LINE" in request.cut) == (len(line) > 4096)
    assert (attempt.protocol, attempt.method_bit) == ("http_1", 2)
    assert attempt.sent_host == (host if uri_bytes < 5000 else attempt.sent_host)


@pytest.mark.parametrize(
    ("protocol", "first", "methods"),
    [
        ("fastcgi", b"\1\1\0\1", ("POST", "POST")),
        ("uwsgi", b"\0", ("POST", "POST")),
        ("scgi", b"", ("POST", "POST")),
        ("memcached", b"get k\r\n", ("GET", None)),
        ("grpc", b"PRI * HTTP/2.0", ("POST", "POST")),
        ("grpc", b"PRI * HTTP/2.0", ("GET", "GET")),
        ("grpc", b"PRI * HTTP/2.0", ("PUT", "PUT")),
    ],
)
def test_other_protocols(
    nginx: RecordedNginx, peer: KeepingPeer, protocol: str, first: bytes, methods: tuple[str, str | None]
) -> None:
    path = f"/{protocol}/{methods[0]}"
    nginx.get(path, methods[0])
    request = nginx.request(path)
    (attempt,) = request.attempts
    wait_until(lambda: bool(peer.sent), "what the peer was sent")
    assert peer.sent[0].startswith(first)
    assert attempt.protocol == ("http_2" if protocol == "grpc" else protocol)
    assert METHODS.get(attempt.method_bit) == methods[1]
    assert protocol == "grpc" or (attempt.sent_line, attempt.sent_host) == (None, None)
    assert client_method(request) == (methods[0], methods[0])


def http2_fields(sent: bytes) -> dict[str, str]:
    """Return the fields of the first HEADERS frame (RFC 9113, 4.1), by a library of their own."""
    at = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    while sent[at + 3] != 1:
        at += 9 + int.from_bytes(sent[at : at + 3])
    block = sent[at + 9 : at + 9 + int.from_bytes(sent[at : at + 3])]
    return dict(Decoder().decode(block))


@pytest.mark.parametrize("method", ["GET", "POST", "PURGE"])
@pytest.mark.parametrize("rest", ["", "a%20~{}|?q=^`&r", *("Z" * length for length in (112, 113, 114, 900))])
def test_http2_peer(nginx: RecordedNginx, peer: KeepingPeer, method: str, rest: str) -> None:
    path = f"/grpc/{method}{len(rest)}/{rest}"
    nginx.get(path, method)
    (attempt,) = nginx.request(path.partition("?")[0]).attempts
    wait_until(lambda: bool(peer.sent) and b"HTTP/2" in peer.sent[0], "what the peer was sent")
    fields = http2_fields(peer.sent[0])
    assert fields[":method"] == method
    told = method if method in METHODS.values() else ""
    assert attempt.sent_line == f"{told} {fields[':path']} HTTP/2"
    assert attempt.sent_host == fields[":authority"]


def test_http2_client(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    connection = Http2Connection(nginx.addresses[1], tls=False)
    connection.exchange([Http2Request("/h2/post", "POST"), Http2Request("/h2/purge", "PURGE"), Http2Request("/h2/get")])
    port = connection.transport.socket.getsockname()[1]
    connection.close()
    for name in ("post", "purge", "get"):
        request = nginx.request(f"/h2/{name}")
        assert (request.method, request.location, request.host) == (name.upper(), "/", "localhost")
        assert request.request_target is None
        assert request.peer_sockaddr is not None
        assert sockaddr.parse(request.peer_sockaddr) == sockaddr.Address("127.0.0.1", port)
        assert request.attempts[0].sent_line == f"{name.upper()} /h2/{name} HTTP/1.0"


@pytest.mark.parametrize("server", [2, 3])
def test_peer_of_the_socket(nginx: RecordedNginx, server: int) -> None:
    """Realip replaces the client's address, but not the socket's peer."""
    preamble = b"PROXY TCP4 203.0.113.9 198.51.100.1 4321 80\r\n" if server == 2 else b""
    with nginx.connect(server) as connection:
        for index in range(2):
            headers = {"X-Forwarded-For": "203.0.113.9"}
            connection.send((b"" if index else preamble) + request_bytes("GET", f"/peer{server}{index}", headers))
            assert connection.read_response().status == 200
        peer = sockaddr.Address(*connection.socket.getsockname())
    for index in range(2):
        request = nginx.request(f"/peer{server}{index}")
        assert request.client_sockaddr is not None
        assert request.peer_sockaddr is not None
        client = sockaddr.parse(request.client_sockaddr)
        assert client == sockaddr.Address("203.0.113.9", 4321 if server == 2 else 0)
        assert sockaddr.parse(request.peer_sockaddr) == peer


def test_connection_older_than_the_probes(nginx: RecordedNginx, peer: KeepingPeer) -> None:
    """The socket's peer is known, unless realip has replaced the client's address."""
    headers = {"X-Forwarded-For": "203.0.113.9"}
    with Http1Connection(nginx.addresses[0]) as connection, nginx.connect(3) as behind_realip:
        assert connection.request("/plain/older").status == 200
        assert behind_realip.request("/older", headers=headers).status == 200
        nginx.agent.stop()
        nginx.attach()
        assert connection.request("/plain/newer", "PUT").status == 200
        assert behind_realip.request("/newer", headers=headers).status == 200
        peer = sockaddr.Address(*connection.socket.getsockname())
    request = nginx.request("/newer")
    assert request.client_sockaddr is not None
    assert sockaddr.parse(request.client_sockaddr) == sockaddr.Address("203.0.113.9", 0)
    assert request.peer_sockaddr is None
    request = nginx.request("/plain/newer")
    assert request.peer_sockaddr is not None
    assert sockaddr.parse(request.peer_sockaddr) == peer
    assert client_method(request) == ("PUT", "PUT")
    assert request.attempts[0].sent_line == "PUT /plain/newer HTTP/1.0"


def test_client_leaves_during_subrequests(nginx: RecordedNginx) -> None:
    with nginx.connect() as connection:
        connection.send(request_bytes("GET", "/page"))
        time.sleep(0.3)
        connection.abort()
    request = nginx.request("/page")
    assert sorted(each.subrequest_uri or "" for each in request.attempts) == ["/one", "/slow-mirror", "/two"]
    assert all(each.subrequest for each in request.attempts)


@pytest.fixture(scope="module")
def trusting(public_directory: Path, peer: KeepingPeer) -> Iterator[RecordedNginx]:
    """Yield an nginx behind proxies that are trusted."""
    http = "server { listen @0@; location / { proxy_pass http://@UP@; } }"
    environment = {"OTEL_NGINX_EBPF_TRUSTED_PROXY": "127.0.0.1"}
    nginx = RecordedNginx(public_directory / "trusting", http, {"UP": peer.address}, environment=environment)
    yield nginx
    nginx.stop()


def test_headers_of_proxies(trusting: RecordedNginx, nginx: RecordedNginx) -> None:
    """The last of several counts: the proxy next to nginx has added it."""
    fields = [
        "X-Forwarded-Proto: http",
        "x-forwarded-proto: https",
        "Forwarded: for=1.2.3.4;host=first",
        *(f"X-Other-{index}: x" for index in range(30)),
        "FORWARDED: for=1.2.3.4;proto=https;host=second",
        "X-Forwarded-Host: named.example",
        "X-Forwarded-Hosts: other.example",
        "X-Forwarded-Protc: other",
    ]
    head = "\r\n".join(["GET /forwarded HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()
    trusting.send(head)
    nginx.send(head, server=4)
    request, other = trusting.request("/forwarded"), nginx.request("/forwarded")
    assert request.forwarded == "for=1.2.3.4;proto=https;host=second"
    assert (request.x_forwarded_proto, request.x_forwarded_host) == ("https", "named.example")
    assert (other.forwarded, other.x_forwarded_proto, other.x_forwarded_host) == (None, None, None)
    trusting.send(request_bytes("GET", "/direct"))
    request = trusting.request("/direct")
    assert (request.forwarded, request.x_forwarded_proto, request.x_forwarded_host) == (None, None, None)

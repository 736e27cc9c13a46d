"""TLS on either side: times come from the socket, sizes are nginx's own, of the clear text."""

import ssl
import time

import pytest

from e2e.http1_client import Http1Connection, request_bytes, trusting_tls
from e2e.stage import LARGE_BYTES, Stage
from e2e.timing import LONG_TURN_MS, Slack

HANDSHAKE = "nginx.tls.handshake.duration_ns"
READ_WRITE = ["downstream read", "downstream write"]
NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
REUSED = ["downstream read", "upstream exchange", "downstream write"]

LISTEN = "listen @LISTEN@ ssl; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
LISTEN += " ssl_protocols TLSv1.2 TLSv1.3;"
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@VERSIONS
@pytest.mark.nginx(listen=LISTEN, server="location / { root @HTML@; } location /app { proxy_pass http://@UP@; }")
def test_tls_client(stage: Stage, version: ssl.TLSVersion) -> None:
    with stage.connect(tls=trusting_tls(version)) as connection:
        for target in ("/hello.txt", "/app", "/nothing", "/app?delay_ms=100"):
            connection.request(target)
    exchanges = stage.exchanges(4)
    assert [each.trace.outline() for each in exchanges] == [READ_WRITE, NEW, READ_WRITE, NEW]
    assert {each.log["ssl_protocol"] for each in exchanges} == {f"TLSv{version.name[-3]}.{version.name[-1]}"}


@VERSIONS
@pytest.mark.nginx(listen=LISTEN, server="location / { root @HTML@; }")
def test_tls_handshake_belongs_to_no_request(stage: Stage, version: ssl.TLSVersion) -> None:
    """The request begins with its own first byte, a pause after the handshake, and so does its read."""
    whole = request_bytes("GET", "/hello.txt")
    with stage.connect(tls=trusting_tls(version)) as connection:
        connection.send_slowly([b"", whole], 0.2)
        assert connection.read_response().status == 200
    assert stage.exchange().trace.server.seconds < 0.1


@VERSIONS
@pytest.mark.nginx(listen=LISTEN, server="location / { return 200 ok; }")
def test_how_long_the_handshake_took(stage: Stage, version: ssl.TLSVersion) -> None:
    """From the accept to the handshake's end: a late ClientHello counts, a late request does not."""
    pause_s = 0.2
    context = trusting_tls(version)
    session = None
    for resumed in (False, True):
        began_s = time.monotonic()
        with Http1Connection(stage.addresses["ipv4"], context, before_hello_s=pause_s, session=session) as connection:
            most_s = time.monotonic() - began_s + pause_s / 2
            time.sleep(pause_s)
            assert isinstance(connection.socket, ssl.SSLSocket)
            assert connection.socket.session_reused == resumed
            for target in ("/first", "/second"):
                assert connection.request(target).status == 200
            session = connection.socket.session
        first, second = stage.exchanges(4 if resumed else 2)[-2:]
        assert pause_s < first.trace.server.attributes[HANDSHAKE] / 1e9 + 0.01
        assert first.trace.server.attributes[HANDSHAKE] / 1e9 < most_s
        assert HANDSHAKE not in second.trace.server.attributes


@pytest.mark.nginx(listen=LISTEN, server="location / { return 200 ok; }")
def test_tls_resumed_session_and_many_connections(stage: Stage) -> None:
    context = trusting_tls()
    for index in range(10):
        with stage.connect(tls=context) as connection:
            assert connection.request(f"/{index}").status == 200
    assert [each.trace.outline() for each in stage.exchanges(10)] == [READ_WRITE] * 10


@pytest.mark.nginx(listen=LISTEN, server="location / { root @HTML@; }")
def test_tls_large_file(stage: Stage) -> None:
    with stage.connect(tls=trusting_tls()) as connection:
        assert connection.request("/large.bin").body_bytes == LARGE_BYTES
    trace = stage.exchange(Slack(late_max_ms=LONG_TURN_MS)).trace
    assert trace.outline() == READ_WRITE
    assert trace.named("downstream write")[0].seconds > 0.5 * trace.server.seconds


@pytest.mark.nginx(listen=LISTEN, server="location / { proxy_pass http://@UP@; client_max_body_size 10m; }")
def test_tls_body(stage: Stage) -> None:
    with stage.connect(tls=trusting_tls()) as connection:
        head = request_bytes("POST", "/", {"Content-Length": "200000"})
        connection.send_slowly([head, b"a" * 100_000, b"b" * 100_000], 0.1)
        assert connection.read_response().status == 200
    trace = stage.exchange().trace
    assert trace.outline() == NEW
    assert trace.named("downstream read")[0].seconds > 0.19


@pytest.mark.nginx(listen=LISTEN, server="location / { return 200 ok; }")
def test_plain_request_to_a_tls_port(stage: Stage) -> None:
    with stage.connect() as connection:
        assert connection.request("/plain").status == 400
    each = stage.exchange(Slack(end_early=True))
    assert each.trace.server.attributes["http.response.status_code"] == 400


@pytest.mark.nginx(listen=LISTEN, server="location / { return 200 ok; }")
def test_failed_handshake_has_no_trace(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(b"\x16\x03\x01\x00\x05hello")
        connection.read_until_closed()
    with stage.connect(tls=trusting_tls()) as connection:
        assert connection.request("/").status == 200
    stage.exchange()


UPSTREAM_VERSIONS = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
# With TLS 1.3 the upstream sends session tickets when it likes, and nginx may read them before the answer.
TICKETS = Slack(first_byte_unseen=True)
TLS_1_2_AND_1_3 = """
    location /TLSv1.2 { proxy_pass https://@NAME@; proxy_ssl_protocols TLSv1.2; }
    location /TLSv1.3 { proxy_pass https://@NAME@; proxy_ssl_protocols TLSv1.3; }
"""


# Since 1.29.7 nginx keeps an upstream block's connections alive unless told otherwise.
@UPSTREAM_VERSIONS
@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP_TLS@; }", server=f"proxy_set_header Connection close; {TLS_1_2_AND_1_3}"
)
def test_tls_upstream(stage: Stage, version: str) -> None:
    """The connect span covers the handshake, as $upstream_connect_time does."""
    for _ in range(3):
        assert stage.get(f"/{version}?delay_ms=50").status == 200
    for each in stage.exchanges(3, TICKETS):
        assert each.trace.outline() == NEW
        assert each.trace.named("upstream exchange")[0].seconds > 0.049


@UPSTREAM_VERSIONS
@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP_TLS@; keepalive 2; }",
    server=f"proxy_http_version 1.1; proxy_set_header Connection ''; {TLS_1_2_AND_1_3}",
)
def test_kept_alive_tls_upstream(stage: Stage, version: str) -> None:
    with stage.connect() as connection:
        for index in range(6):
            assert connection.request(f"/{version}?bytes={index * 20_000}").status == 200
    exchanges = stage.exchanges(6, TICKETS)
    assert [each.trace.outline() for each in exchanges] == [NEW] + [REUSED] * 5


@pytest.mark.nginx(listen=LISTEN, server="location / { proxy_pass https://@UP_TLS@; }")
def test_tls_on_both_sides(stage: Stage) -> None:
    with stage.connect(tls=trusting_tls()) as connection:
        assert connection.request("/", "POST", body=b"b" * 5000).status == 200
        assert connection.request("/?bytes=300000").body_bytes == 300_000
    assert [each.trace.outline() for each in stage.exchanges(2, TICKETS)] == [NEW, NEW]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@; server @OTHER@; }",
    server="location / { proxy_pass https://@NAME@; proxy_connect_timeout 200ms; }",
)
def test_tls_handshake_with_the_upstream_times_out(stage: Stage) -> None:
    """The peers speak plain HTTP and wait for the end of a request: connected, but never through."""
    assert stage.get("/").status == 504
    each = stage.exchange()
    assert each.log["upstream_status"] == "504, 504"
    assert each.trace.outline() == [
        "downstream read",
        "upstream connect",
        "upstream connect",
        "downstream write",
    ]
    assert [span.status for span in each.trace.named("upstream connect")] == ["ERROR", "ERROR"]
    assert all(0.19 < span.seconds < 0.3 for span in each.trace.named("upstream connect"))


@pytest.mark.nginx(
    server="location / { proxy_pass https://@UP_TLS@; proxy_ssl_verify on; proxy_ssl_name elsewhere.test;"
    " proxy_ssl_trusted_certificate @CERTIFICATE@; }",
)
def test_tls_upstream_with_the_wrong_name(stage: Stage) -> None:
    assert stage.get("/").status == 502
    each = stage.exchange()
    assert each.trace.outline() == ["downstream read", "upstream connect", "downstream write"]
    assert each.trace.named("upstream connect")[0].status == "ERROR"


@VERSIONS
@pytest.mark.nginx(
    listen="listen @LISTEN@ ssl; ssl_certificate @CERTIFICATE@$is_args; ssl_certificate_key @KEY@$is_args;"
    " ssl_protocols TLSv1.2 TLSv1.3;",
    server="location / { return 200 ok; }",
)
def test_a_request_that_nginx_makes_in_the_handshake_is_none(stage: Stage, version: ssl.TLSVersion) -> None:
    """ngx_http_ssl_certificate makes one for each variable in the names, here an empty one, and frees it unlogged."""
    for _ in range(3):
        with stage.connect(tls=trusting_tls(version)) as connection:
            assert [connection.request("/").status for _ in range(2)] == [200, 200]
    assert [each.trace.outline() for each in stage.exchanges(6)] == [READ_WRITE] * 6

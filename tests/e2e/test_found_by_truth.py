"""Small versions of what `make truth` found: requests whose traces told what did not happen."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import Trace
from e2e.gateways import Memcached
from e2e.http1_client import ConnectionEnded, request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import Stage
from e2e.timing import Slack

TLS = "listen @LISTEN@ ssl; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"


pytestmark = pytest.mark.skipif(not shutil.which("memcached"), reason="needs memcached; `make setup-test` installs it")

WAITING = "location = /waiting { internal; proxy_pass http://@OTHER@/?delay_ms=600; }"


def _leave(stage: Stage, target: str) -> Trace:
    """The trace of a request whose client leaves while all its upstreams are asked."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", target))
        time.sleep(0.2)
        connection.abort()
    each = stage.exchange(Slack(response_early=True))
    assert each.log["status"] == "499"
    return each.trace


def _owners(trace: Trace) -> list[str | None]:
    """The subrequests that made the exchanges, None for the request itself."""
    return [span.attributes.get("nginx.subrequest.uri") for span in trace.named("upstream exchange")]


@pytest.mark.nginx(server="location / { mirror /waiting; proxy_pass http://@UP@; }" + WAITING)
def test_client_leaves_a_mirrored_request(stage: Stage) -> None:
    """nginx ends both at once: each exchange stays whose it is."""
    assert sorted(map(str, _owners(_leave(stage, "/?delay_ms=600")))) == ["/waiting", "None"]


@pytest.mark.nginx(server="location / { ssi on; root @HTML@; }" + WAITING)
def test_client_leaves_a_page_of_several_parts(stage: Stage) -> None:
    html: Path = stage.site.prefix / "html"
    (html / "parts.html").write_text('<!--#include virtual="/waiting?1" --><!--#include virtual="/waiting?2" -->')
    assert _owners(_leave(stage, "/parts.html")) == ["/waiting", "/waiting"]


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str], public_directory: Path) -> Iterator[dict[str, str]]:
    memcached = Memcached(public_directory)
    memcached.store("key", b"x" * 100)
    yield {**upstream_addresses, "memcached": memcached.address}
    memcached.stop()


def _is_well(trace: Trace) -> None:
    assert trace.server.attributes.get("nginx.termination") is None
    assert [span.error for span in trace.spans] == [None] * len(trace.spans)


@pytest.mark.nginx(server="location / { set $memcached_key key; memcached_pass @MEMCACHED@; }")
def test_head_of_what_memcached_has(stage: Stage) -> None:
    """nginx does not read the value, and nobody has to wait for it."""
    with stage.connect() as connection:
        assert [connection.request("/", method).status for method in ("GET", "HEAD")] == [200, 200]
    for each in stage.exchanges(2):
        _is_well(each.trace)


@pytest.mark.nginx(server="lingering_timeout 100ms; location / { root @HTML@; }")
def test_body_that_never_comes_after_the_answer(stage: Stage) -> None:
    """The response was whole: what nginx waits for in vain is what it would throw away."""
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/nothing", {"Content-Length": "100"}) + b"half")
        assert connection.read_response().status == 404
        connection.read_until_closed()
    _is_well(stage.exchange(Slack(end_early=True)).trace)


BOTH = "listen @LISTEN@; listen @LISTEN_ANYTHING@ http2;"
both = pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])


def _ask(stage: Stage, target: str, http2: bool) -> None:
    """Waits for some answer, whatever it is, then leaves."""
    if http2:
        connection = Http2Connection(stage.addresses["anything"], tls=False)
        connection.start([Http2Request(target)])
        connection.transport.socket.recv(1000)
        stage.lines(1)
        connection.close()
    else:
        with stage.connect() as plain:
            plain.send(request_bytes("GET", target))
            plain.socket.recv(1000)


@both
@pytest.mark.nginx(listen=BOTH, server="location / { proxy_pass http://@UP@; proxy_http_version 1.1; }")
def test_upstream_garbles_its_chunks(stage: Stage, http2: bool) -> None:
    """nginx breaks off at once, over HTTP/1 before the client has a byte; nobody waited for anything."""
    _ask(stage, "/?bytes=250000&chunked=1&end=garble", http2)
    each = stage.exchange()
    assert (each.log["status"], each.log["request_completion"]) == ("200", "")
    assert each.trace.server.status == "ERROR"
    assert each.trace.named("upstream exchange")[0].error not in (None, "timeout")


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.nginx(listen="listen @LISTEN@ http2;", server="location / { ssi on; root @HTML@; }" + WAITING)
def test_client_leaves_a_page_of_parts_at_once(stage: Stage, how: str) -> None:
    """nginx reads that it leaves in the turn in which it has begun to answer."""
    html: Path = stage.site.prefix / "html"
    (html / "part.html").write_text('begins <!--#include virtual="/waiting" -->')
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    send, connection._flush = connection._flush, lambda: None  # type: ignore[method-assign]
    (stream,) = connection.start([Http2Request("/part.html")])
    if how == "reset":
        connection.reset(stream)
    send()
    connection.transport.abort() if how == "close" else stage.lines(1)
    connection.close()
    server = stage.exchange(Slack(response_early=True)).trace.server
    assert (server.status, server.attributes.get("nginx.termination")) == ("UNSET", "client_closed_request")


def _reset(stage: Stage, target: str) -> Trace:
    """The trace of a request whose client resets its stream while nginx waits for the upstream."""
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    (stream,) = connection.start([Http2Request(target)])
    time.sleep(0.1)
    connection.reset(stream)
    stage.lines(1)
    connection.close()
    return stage.exchange(Slack(response_early=True)).trace


@pytest.mark.nginx(
    listen="listen @LISTEN@ http2;",
    http="proxy_cache_path @PREFIX@/temp/@NAME@ keys_zone=@NAME@:1m;",
    server="""
    location /cached { proxy_cache @NAME@; proxy_cache_valid 1m; proxy_pass http://@UP@; }
    location /unbuffered { proxy_buffering off; proxy_pass http://@UP@; }
    """,
)
@pytest.mark.parametrize("target", ["/cached?delay_ms=300", "/unbuffered?bytes=70000&parts=2&part_ms=200"])
def test_client_resets_a_stream(stage: Stage, target: str) -> None:
    """nginx goes on until it has something to write."""
    server = _reset(stage, target).server
    assert (server.status, server.attributes.get("nginx.termination")) == ("UNSET", "client_closed_request")


@pytest.mark.nginx(
    listen=TLS,
    server="""
    keepalive_timeout 0; lingering_close always;
    location / { mirror /mirror; root @HTML@; }
    location = /mirror { internal; proxy_pass http://@UP@/?delay_ms=300; }
    """,
)
def test_tls_goodbye_is_no_part_of_the_response(stage: Stage) -> None:
    """nginx says it when the mirror is done, long after the response, and then lingers."""
    with stage.connect(tls=trusting_tls()) as connection:
        assert connection.request("/hello.txt").status == 200
        connection.read_until_closed()
    trace = stage.exchange(Slack(end_early=True)).trace
    assert trace.server.seconds > 0.29
    assert trace.named("downstream write")[0].seconds < 0.1


@pytest.mark.nginx(listen="listen @LISTEN@ http2;", server="location / { mirror /waiting; root @HTML@; }" + WAITING)
def test_client_leaves_when_it_has_all(stage: Stage) -> None:
    """Only the mirror is still asked."""
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    assert connection.exchange([Http2Request("/hello.txt")])[0].status == 200
    connection.close()
    server = stage.exchange(Slack(end_early=True)).trace.server
    assert (server.status, server.attributes.get("nginx.termination")) == ("UNSET", None)


@both
@pytest.mark.nginx(
    listen=BOTH,
    server="location / { root @HTML@; post_action /after; } location = /after { internal; proxy_pass http://@UP@; }",
)
def test_post_action(stage: Stage, http2: bool) -> None:
    """nginx takes the request's protocol version away before it acts."""
    _ask(stage, "/hello.txt", http2)
    trace = stage.exchange(Slack(write_early=True)).trace
    assert sorted(trace.outline()) == ["downstream read", "downstream write", "upstream connect", "upstream exchange"]


@both
@pytest.mark.nginx(listen=BOTH, server="location / { proxy_pass http://@UP@; }")
def test_upstream_without_a_status_line(stage: Stage, http2: bool) -> None:
    """nginx takes it for HTTP/0.9, and the request's own version away."""
    _ask(stage, "/?end=nonsense", http2)
    each = stage.exchange()
    assert each.log["status"] == "009"
    assert sorted(each.trace.outline()) == [
        "downstream read",
        "downstream write",
        "upstream connect",
        "upstream exchange",
    ]
    assert each.trace.server.attributes.get("http.route") in (None, "/")
    assert "http.response.status_code" not in each.trace.server.attributes


@pytest.mark.nginx(
    server="""
    error_page 404 =200 /sorry;
    location = /sorry { return 200 sorry; }
    location = /none { return 404; }
    location /asks { proxy_pass http://@UP@; }
    """
)
@pytest.mark.parametrize("target", ["/none", "/asks?header=X-Accel-Redirect:/sorry"])
def test_method_after_an_internal_redirect(stage: Stage, target: str) -> None:
    """nginx answers as to a GET, and says so in $request_method: the client sent a DELETE."""
    assert stage.get(target, "DELETE").body == b"sorry"
    server = stage.exchange().trace.server
    assert (server.name.split()[0], server.attributes["http.request.method"]) == ("DELETE", "DELETE")


@pytest.mark.parametrize("query", ["", "&chunked=1"], ids=["length", "chunked"])
@pytest.mark.nginx(server="location / { proxy_pass https://@UP_TLS@; proxy_http_version 1.1; }")
def test_tls_upstream_closes_in_the_middle(stage: Stage, query: str) -> None:
    """At once: nobody waited for it."""
    with pytest.raises(ConnectionEnded):
        stage.get(f"/?bytes=70000&end=truncate{query}")
    trace = stage.exchange(Slack(end_early=True, response_early=True, first_byte_unseen=True)).trace
    assert trace.server.attributes.get("nginx.termination") == "upstream_incomplete"
    assert trace.named("upstream exchange")[0].error == "incomplete_response"

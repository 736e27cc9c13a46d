"""Responses that nginx makes itself, without a proxied request."""

import pytest

from e2e.nginx_server import nginx_version
from e2e.stage import FILES, LARGE_BYTES, Stage
from e2e.timing import LONG_TURN_MS, Slack

BOTH_BEGINNINGS = True
READ_WRITE = ["downstream read", "downstream write"]


@pytest.mark.nginx(server="location /files/ { alias @HTML@/; }")
def test_static_file(stage: Stage) -> None:
    assert stage.get("/files/hello.txt").body == FILES["hello.txt"]
    trace = stage.exchange().trace
    assert trace.server.name == "GET /files/"
    assert trace.outline() == READ_WRITE


@pytest.mark.nginx(server="location /files/ { alias @HTML@/; sendfile on; }")
def test_large_file_by_sendfile(stage: Stage) -> None:
    assert stage.get("/files/large.bin").body_bytes == LARGE_BYTES
    trace = stage.exchange(Slack(late_max_ms=LONG_TURN_MS)).trace
    assert trace.outline() == READ_WRITE
    write = trace.named("downstream write")[0]
    assert write.end_unix_ns == trace.server.end_unix_ns
    assert write.seconds > 0.5 * trace.server.seconds


@pytest.mark.nginx(server="location / { return 200 'short text'; }")
def test_return(stage: Stage) -> None:
    assert stage.get("/any?query=1").body == b"short text"
    trace = stage.exchange().trace
    assert trace.server.name == "GET /"
    assert trace.server.attributes["url.query"] == "query=1"
    assert trace.outline() == READ_WRITE


@pytest.mark.parametrize("status", [204, 301, 403, 404, 418, 500, 503])
@pytest.mark.nginx(
    server="""
    location /204 { return 204; }
    location /301 { return 301 /elsewhere; }
    location /403 { return 403; }
    location /418 { return 418 teapot; }
    location /500 { return 500; }
    location /503 { return 503 busy; }
    """
)
def test_status(stage: Stage, status: int) -> None:
    assert stage.get(f"/{status}").status == status
    assert stage.exchange().trace.outline() == READ_WRITE


@pytest.mark.nginx(server="root @HTML@; location / { try_files $uri /missing/$uri =404; }")
def test_try_files(stage: Stage) -> None:
    with stage.connect() as connection:
        assert connection.request("/hello.txt").status == 200
        assert connection.request("/nothing").status == 404
    found, missing = stage.exchanges(2)
    assert found.trace.outline() == missing.trace.outline() == READ_WRITE


@pytest.mark.nginx(
    server="""
    root @HTML@;
    error_page 404 /hello.txt;
    location /moved/ { rewrite ^/moved/(.*)$ /$1 last; }
    """
)
def test_internal_redirects_keep_the_original_uri(stage: Stage) -> None:
    with stage.connect() as connection:
        assert connection.request("/moved/hello.txt").body == FILES["hello.txt"]
        assert connection.request("/nothing").body == FILES["hello.txt"]
        assert connection.request("/").body == FILES["index.html"]
    moved, error_page, _ = stage.exchanges(3)
    assert moved.trace.server.attributes["url.path"] == "/moved/hello.txt"
    assert error_page.trace.server.attributes["url.path"] == "/nothing"
    assert error_page.trace.server.attributes["http.response.status_code"] == 404


@pytest.mark.nginx(server="root @HTML@; gzip on; gzip_types *; gzip_min_length 1;")
def test_gzip(stage: Stage) -> None:
    response = stage.get("/page.html", headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    trace = stage.exchange().trace
    assert trace.outline() == READ_WRITE
    assert trace.server.attributes["http.response.size"] < len(FILES["page.html"])


@pytest.mark.nginx(server="root @HTML@;")
def test_head_range_and_not_modified(stage: Stage) -> None:
    with stage.connect() as connection:
        head = connection.request("/hello.txt", "HEAD")
        part = connection.request("/hello.txt", headers={"Range": "bytes=2-5"})
        parts = connection.request("/hello.txt", headers={"Range": "bytes=0-1,4-5"})
        unmodified = connection.request("/hello.txt", headers={"If-None-Match": head.headers["etag"]})
    assert [each.status for each in (head, part, parts, unmodified)] == [200, 206, 206, 304]
    assert part.body == FILES["hello.txt"][2:6]
    exchanges = stage.exchanges(4)
    assert [each.trace.outline() for each in exchanges] == [READ_WRITE] * 4
    assert exchanges[0].trace.server.name == "HEAD"


@pytest.mark.nginx(server="location / { return 444; }")
def test_close_without_answer(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.read_until_closed() == b""
    trace = stage.exchange().trace
    assert trace.server.attributes["http.response.status_code"] == 444
    assert trace.outline() == ["downstream read"]


@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_long_uris(stage: Stage) -> None:
    targets = ["/" + "a" * (length - 1) for length in (3 * 1024, 4096, 4097, 6 * 1024)]
    with stage.connect() as connection:
        for target in [*targets, "/path?" + "q" * 5000]:
            assert connection.request(target).status == 200
    *without_query, with_query = (each.trace.server.attributes for each in stage.exchanges(5))
    assert [each["url.path"] for each in without_query] == [target[:4096] for target in targets]
    truncated = [each.get("nginx.truncated_attributes") for each in without_query]
    assert truncated == [None, None, ["url.path"], ["url.path"]]
    assert with_query["nginx.truncated_attributes"] == ["url.query"]


@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_strange_bytes_in_the_uri(stage: Stage) -> None:
    """What HTTP forbids and nginx lets pass: bytes that are no UTF-8, encoded controls, quotes."""
    targets = ["/\xff\xfe/\xc3\xa9", "/\"quoted'\\", "/caf\xe9?\xa0=\xff", "/%01%ff", "/%00", "/\x01"]
    # A zero byte after decoding is what nginx refuses, and since 1.21.1 a bare control byte.
    bare_control = 400 if nginx_version() >= (1, 21, 1) else 200
    assert [stage.get(target).status for target in targets] == [200, 200, 200, 200, 400, bare_control]
    servers = [each.trace.server for each in stage.exchanges(len(targets))]
    assert servers[0].attributes["url.path"] == "/\\xff\\xfe/\u00e9"
    assert servers[2].attributes["url.query"] == "\\xa0=\\xff"


@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_unusual_requests(stage: Stage) -> None:
    """An absolute URI, an unknown method, no user agent, an empty query, HTTP/1.0."""
    with stage.connect() as connection:
        connection.request("http://localhost/absolute")
        connection.request("/method", "PROPFIND")
        connection.request("/empty?")
        connection.request("/encoded%20path?a=1&b=%26")
        connection.send(b"GET /old HTTP/1.0\r\n\r\n")
        connection.read_response()
    servers = [each.trace.server for each in stage.exchanges(5)]
    assert servers[1].name == "HTTP /"
    assert servers[1].attributes["http.request.method_original"] == "PROPFIND"
    assert servers[4].attributes["network.protocol.version"] == "1.0"


@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_user_agents(stage: Stage) -> None:
    with stage.connect() as connection:
        for length in (1, 100, 1024, 1025, 6000):
            assert connection.request("/", headers={"User-Agent": "u" * length}).status == 200
    stage.exchanges(5)


@pytest.mark.nginx(server="location / { return 200 ok; }")
def test_http_0_9(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(b"GET /oldest\r\n")
        assert connection.read_until_closed() == b"ok"
    assert stage.exchange().trace.server.attributes["network.protocol.version"] == "0.9"


@pytest.mark.nginx(server="location / { root @HTML@; limit_rate 20k; }")
def test_rate_limited_response(stage: Stage) -> None:
    """The write takes the time that nginx took over it: 28 KB at 20 KB a second."""
    assert stage.get("/page.html").body_bytes == len(FILES["page.html"])
    trace = stage.exchange().trace
    assert trace.named("downstream write")[0].seconds > 0.3


@pytest.mark.nginx(server="location / { root @HTML@; } error_page 405 =200 /hello.txt;")
def test_post_to_a_static_file(stage: Stage) -> None:
    """405 turned into 200; the body is read and thrown away."""
    with stage.connect() as connection:
        assert connection.request("/page.html", "POST", body=b"x" * 20_000).status == 200
    assert stage.exchange(Slack(end_early=True)).trace.server.attributes["url.path"] == "/page.html"


@pytest.mark.parametrize("sendfile", ["on", "off"])
@pytest.mark.nginx(
    server="""
    aio threads;
    root @HTML@;
    location /on/ { alias @HTML@/; sendfile on; }
    location /off/ { alias @HTML@/; sendfile off; }
    """
)
def test_thread_pool(stage: Stage, sendfile: str) -> None:
    """Other threads of the worker read the file, or even send it."""
    with stage.connect() as connection:
        assert connection.request(f"/{sendfile}/large.bin").body_bytes == LARGE_BYTES
        assert connection.request(f"/{sendfile}/hello.txt").body == FILES["hello.txt"]
    large, small = stage.exchanges(2, Slack(late_max_ms=LONG_TURN_MS))
    assert large.trace.outline() == small.trace.outline() == READ_WRITE
    assert large.trace.named("downstream write")[0].seconds > 0.5 * large.trace.server.seconds


@pytest.mark.nginx(
    server=r"""
    server_name example.test;
    root @HTML@;
    location = /exact { return 200; }
    location ~ \.txt$ { }
    location /outer/ { location /outer/inner/ { return 200; } }
    location /named { error_page 418 = @elsewhere; return 418; }
    location @elsewhere { return 200; }
    """
)
def test_route_is_the_locations_name(stage: Stage) -> None:
    routes = {"/exact": "/exact", "/hello.txt": "\\.txt$", "/outer/inner/x": "/outer/inner/", "/named": "@elsewhere"}
    with stage.connect() as connection:
        for target in [*routes, "/none"]:
            connection.request(target)
    servers = [each.trace.server.attributes for each in stage.exchanges(5)]
    assert [each.get("http.route") for each in servers] == [*routes.values(), None]
    assert {each["nginx.server_name"] for each in servers} == {"example.test"}

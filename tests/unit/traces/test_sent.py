"""What the request line and the Host header of nginx's own request say."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.traces.sent import full_url, parse_line

PEER = "127.0.0.1:9000"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("GET / HTTP/1.1", ("GET", "/", "1.1")),
        ("GET /a b HTTP/1.0", ("GET", "/a b", "1.0")),
        ("GET /a HTTP/1.0 HTTP/1.1", ("GET", "/a HTTP/1.0", "1.1")),
        ("GET /cut", ("GET", "/cut", None)),
        ("GET /cut HTTP/1", ("GET", "/cut HTTP/1", None)),
        ("GET", ("GET", "", None)),
        (" / HTTP/1.1", (None, "/", "1.1")),
        ("PUT /a HTTP/2", ("PUT", "/a", "2")),
        ("", (None, "", None)),
    ],
)
def test_request_lines(line: str, parts: tuple[str | None, str, str | None]) -> None:
    assert parse_line(line) == parts


@pytest.mark.parametrize(
    ("target", "host", "peer", "tls", "url"),
    [
        ("/a?b=c", "up.example", PEER, False, "http://up.example/a?b=c"),
        ("/", "up.example:8443", PEER, True, "https://up.example:8443/"),
        ("/a?sig=secret&b=1", "up.example", PEER, False, "http://up.example/a?sig=REDACTED&b=1"),
        ("/a@b:c", "up.example", PEER, False, "http://up.example/a@b:c"),
        ("/", "user:secret@up.example", PEER, False, "http://REDACTED:REDACTED@up.example/"),
        ("http://user:secret@far.example/a", "up.example", PEER, True, "http://REDACTED:REDACTED@far.example/a"),
        ("https://far.example", "up.example", PEER, False, "https://far.example"),
        ("*", "up.example", PEER, False, "http://up.example"),
        ("?a=1", "up.example", PEER, False, "http://up.example?a=1"),
        ("", "up.example", PEER, False, "http://up.example"),
        ("/", None, PEER, False, "http://127.0.0.1:9000/"),
        ("/", None, "[::1]:9000", True, "https://[::1]:9000/"),
        ("/", None, "unix:/run/app.sock", False, None),
        ("/", None, "backend", False, None),
        ("/", None, None, False, None),
        ("up.example:443", "up.example", PEER, False, None),
    ],
)
def test_urls(target: str, host: str | None, peer: str | None, tls: bool, url: str | None) -> None:
    assert full_url(target, host, peer, tls, True) == url
    without = full_url(target, host, peer, tls, False)
    assert without == (None if url is None else url.partition("?")[0])


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"]), max_size=20)


@given(texts, texts, texts, st.booleans(), st.booleans())
def test_no_credentials_and_no_query_that_is_not_wanted(
    user: str, path: str, query: str, tls: bool, absolute: bool
) -> None:
    secret = f"{user}:hunter2"
    authority = f"{secret}@up.example"
    start = f"http://{authority}" if absolute and not set("/?#") & set(user) else ""
    target = f"{start}/{path.replace('?', '')}?sig={query.replace('&', '')}"
    url = full_url(target, "up.example" if start else authority, PEER, tls, True)
    assert url is not None
    assert "hunter2" not in url
    assert url.endswith("?sig=REDACTED")
    assert full_url(target, authority, PEER, tls, False) == url.removesuffix("?sig=REDACTED")
    if "[" not in path and "]" not in path:
        assert urlsplit(url).hostname == "up.example"

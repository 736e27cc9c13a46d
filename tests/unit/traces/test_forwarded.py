"""What `Forwarded` and `X-Forwarded-*` say about the client's request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.traces.forwarded import Origin, origin

NOTHING = Origin(None, None)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("proto=https;host=example.com", Origin("https", "example.com")),
        ('For="[2001:db8::1]:4711"; PROTO=HTTPS ;Host="example.com:8443"', Origin("https", "example.com:8443")),
        ("proto=https;host=forged.example, for=192.0.2.1;host=example.com", Origin(None, "example.com")),
        ("proto=http,proto=https", Origin("https", None)),
        ("proto=https , ,", Origin("https", None)),
        (";;proto=https;", Origin("https", None)),
        (r'host="ex\ample.com";by="a,b;proto=http"', Origin(None, "example.com")),
        ('for="a, proto=http";proto=https', Origin("https", None)),
        ("proto=wss;host=example.com", Origin(None, "example.com")),
        ('host="[::1]:80"', Origin(None, "[::1]:80")),
        ('host="user@example.com"', NOTHING),
        ('host="example.com/path"', NOTHING),
        ('host=""', NOTHING),
        ("proto=https;proto=http", NOTHING),
        ("proto = https", NOTHING),
        ("proto=https host=example.com", NOTHING),
        ('host="example.com', NOTHING),
        ('host="example.com"x', NOTHING),
        ("https", NOTHING),
        ("", NOTHING),
    ],
)
def test_forwarded(header: str, expected: Origin) -> None:
    assert origin(header, None, None) == expected


@pytest.mark.parametrize(
    ("proto", "host", "expected"),
    [
        ("https", "example.com", Origin("https", "example.com")),
        ("http, HTTPS ", "forged.example,example.com:81", Origin("https", "example.com:81")),
        ("https,", "example.com, ", NOTHING),
        ("javascript", "<script>", NOTHING),
        (None, None, NOTHING),
    ],
)
def test_x_forwarded(proto: str | None, host: str | None, expected: Origin) -> None:
    assert origin(None, proto, host) == expected


def test_forwarded_wins_and_the_others_fill_in() -> None:
    assert origin("proto=https", "http", "example.com") == Origin("https", "example.com")
    assert origin("proto=https;host=a.example", "http", "b.example") == Origin("https", "a.example")
    assert origin('broken="', "http", "b.example") == Origin("http", "b.example")


tokens = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=8)
quoted = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


def quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


others = st.tuples(tokens.map(lambda name: "x-" + name), tokens | quoted.map(quote)).map("=".join)


@given(
    st.lists(st.lists(others | st.just("proto=http;host=forged"), min_size=1, max_size=1), max_size=3),
    st.lists(others, max_size=2, unique_by=lambda pair: pair.partition("=")[0].lower()),
    st.sampled_from(["http", "https", "HTTPS"]),
    st.sampled_from(["example.com", "[::1]:443", "a.example:80"]),
    st.booleans(),
    st.sampled_from([",", " , ", ", ,"]),
)
def test_the_nearest_proxys_element_counts_whatever_came_before(
    before: list[list[str]], own: list[str], proto: str, host: str, first: bool, comma: str
) -> None:
    said = [f"proto={quote(proto)}", f"host={quote(host)}"]
    element = ";".join([*said, *own] if first else [*own, *said])
    header = comma.join([*(";".join(pairs) for pairs in before), element])
    assert origin(header, None, None) == Origin(proto.lower(), host)


@given(st.text() | st.text('for=proto;host,"\\ hts', max_size=40))
def test_any_text_is_read(header: str) -> None:
    scheme, authority = origin(header, header, header)
    assert scheme in (None, "http", "https")
    assert authority is None or (authority.isprintable() and not set('/@ "\\') & set(authority))

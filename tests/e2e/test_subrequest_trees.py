"""Requests that become many: slices, nested includes, text before and after. Each upstream call has its spans."""

from collections import Counter
from pathlib import Path

import pytest

from e2e.agent_process import Span, Trace
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import FILES, Stage
from e2e.timing import Slack

PUT_TOGETHER = Slack(write_early=True)
"""The client gets the first part of the page while later ones are still fetched."""


def subrequests(trace: Trace) -> list[Span]:
    """The exchanges that subrequests made."""
    return [span for span in trace.named("upstream exchange") if "nginx.subrequest.uri" in span.attributes]


def uris(trace: Trace) -> list[str]:
    return [span.attributes["nginx.subrequest.uri"] for span in subrequests(trace)]


def write_pages(stage: Stage, pages: dict[str, str]) -> None:
    html: Path = stage.site.prefix / "html"
    for name, page in pages.items():
        (html / name).write_text(page)


# --- slices, which nginx fetches from itself

SLICED = """
    location /sliced/ {
        slice 4k;
        proxy_set_header Range $slice_range;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_cache @NAME@;
        proxy_cache_key $uri$slice_range;
        proxy_cache_valid 200 206 1h;
        proxy_pass http://@NAME@/files/;
    }
    location /files/ { alias @HTML@/; }
"""
CACHED = "proxy_cache_path @PREFIX@/temp/@NAME@ keys_zone=@NAME@:1m; upstream @NAME@ { server @LISTEN@; keepalive 4; }"
SLICES = -(-len(FILES["page.html"]) // 4096)


@pytest.mark.nginx(http=CACHED, server=SLICED)
def test_slices(stage: Stage) -> None:
    """The first slice is the request's own call, each further one a subrequest's; then all come from the cache."""
    assert stage.get("/sliced/page.html").body == FILES["page.html"]
    stage.lines(1 + SLICES)
    assert stage.get("/sliced/page.html").body == FILES["page.html"]
    exchanges = stage.exchanges(2 + SLICES, PUT_TOGETHER)
    outer = [each.trace for each in exchanges if each.log["request_uri"] == "/sliced/page.html"]
    inner = [each.trace for each in exchanges if each.log["request_uri"] == "/files/page.html"]
    fetched, cached = outer
    assert uris(fetched) == ["/sliced/page.html"] * (SLICES - 1)
    assert {trace.server.attributes["http.response.status_code"] for trace in inner} == {206}
    assert cached.outline() == ["downstream read", "downstream write"]
    for call, served in zip(fetched.named("upstream exchange"), inner, strict=True):
        assert call.attributes["http.response.status_code"] == 206
        assert call.start_unix_ns <= served.server.start_unix_ns
        assert served.server.end_unix_ns <= call.end_unix_ns
    assert [span.attributes["nginx.upstream.connection.reused"] for span in fetched.named("upstream exchange")] == [
        False,
        *[True] * (SLICES - 1),
    ]


@pytest.mark.nginx(http=CACHED, server=SLICED)
def test_range_of_a_sliced_file(stage: Stage) -> None:
    """Bytes 5000 to 9999 lie in two slices."""
    response = stage.get("/sliced/page.html", headers={"Range": "bytes=5000-9999"})
    assert (response.status, response.body) == (206, FILES["page.html"][5000:10000])
    exchanges = stage.exchanges(3, PUT_TOGETHER)
    sliced = next(each.trace for each in exchanges if each.log["upstream_addr"])
    assert len(sliced.named("upstream exchange")) == 2
    assert len(subrequests(sliced)) == 1


# --- server-side includes

INCLUDES = """
    ssi on;
    ssi_types *;
    location /leaf { proxy_pass http://@UP@; }
    location /dead { proxy_pass http://@DEAD1@; }
    location / { root @HTML@; }
"""


@pytest.mark.nginx(server=INCLUDES)
def test_includes_in_includes(stage: Stage) -> None:
    write_pages(
        stage,
        {
            "top.html": '[<!--# include virtual="/middle.html?a" -->|<!--# include virtual="/middle.html?b" -->]',
            "middle.html": '(<!--# include virtual="/leaf/one?delay_ms=60" --><!--# include virtual="/low.html" -->)',
            "low.html": '{<!--# include virtual="/leaf/two?delay_ms=30&bytes=3" -->}',
        },
    )
    assert stage.get("/top.html").body == b"[(xxxxx{xxx})|(xxxxx{xxx})]"
    trace = stage.exchange(PUT_TOGETHER).trace
    assert Counter(uris(trace)) == {"/leaf/one": 2, "/leaf/two": 2}
    assert trace.server.attributes["nginx.upstream.attempts"] == 4
    for span in subrequests(trace):
        assert span.seconds > (0.059 if span.attributes["nginx.subrequest.uri"] == "/leaf/one" else 0.029)


@pytest.mark.nginx(server=INCLUDES)
def test_includes_that_wait(stage: Stage) -> None:
    """One after the other, in the page's order; the second on the word of the first."""
    write_pages(
        stage,
        {
            "wait.html": '<!--# include virtual="/leaf/one?delay_ms=60" wait="yes" -->'
            '<!--# include virtual="/leaf/two?delay_ms=60" set="two" -->'
            '<!--# if expr="$two = xxxxx" --><!--# include virtual="/leaf/three?delay_ms=60" --><!--# endif -->'
        },
    )
    assert stage.get("/wait.html").body == b"x" * 10
    trace = stage.exchange(PUT_TOGETHER).trace
    assert uris(trace) == ["/leaf/one", "/leaf/two", "/leaf/three"]
    one, two, three = subrequests(trace)
    assert one.end_unix_ns <= two.start_unix_ns
    assert two.end_unix_ns <= three.start_unix_ns


@pytest.mark.nginx(server=INCLUDES)
def test_include_that_fails(stage: Stage) -> None:
    """A stub stands in for it, and the page is good."""
    write_pages(
        stage,
        {
            "stub.html": '<!--# block name="sorry" -->sorry<!--# endblock -->'
            '<!--# include virtual="/dead" stub="sorry" -->,<!--# include virtual="/leaf/one" -->'
        },
    )
    assert stage.get("/stub.html").status == 200
    trace = stage.exchange(PUT_TOGETHER).trace
    (failed,) = [span for span in trace.named("upstream connect") if span.status == "ERROR"]
    assert failed.attributes["nginx.subrequest.uri"] == "/dead"
    assert failed.error == "ECONNREFUSED"
    assert uris(trace) == ["/leaf/one"]
    assert trace.server.status == "UNSET"


@pytest.mark.nginx(
    listen="listen @LISTEN@ http2;",
    server=INCLUDES + "location ~ ^/page/ { add_before_body /before/; addition_types *; alias @HTML@/each.html; }"
    "location /before/ { proxy_pass http://@OTHER@; }",
)
def test_many_pages_at_once(stage: Stage) -> None:
    """Sixteen streams on one connection, four calls each: every trace has its own, and no other's."""
    leaf = '<!--# include virtual="/leaf$uri/{}?delay_ms={}" -->'
    write_pages(stage, {"each.html": leaf.format("a", 40) + leaf.format("b", 10) + leaf.format("c", 25)})
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.start([Http2Request(f"/page/{index}") for index in range(16)])
    assert [response.body_bytes for response in connection.finish()] == [20] * 16
    connection.close()
    for each in stage.exchanges(16, PUT_TOGETHER):
        page = each.log["request_uri"]
        assert sorted(uris(each.trace)) == ["/before/", *(f"/leaf{page}/{leaf}" for leaf in "abc")]
        assert each.trace.server.attributes["nginx.upstream.attempts"] == 4


@pytest.mark.nginx(
    server="""
    location /before { proxy_pass http://@OTHER@/?delay_ms=40&bytes=1; }
    location /after { proxy_pass http://@OTHER@/?delay_ms=40&bytes=2; }
    location / { add_before_body /before; add_after_body /after; addition_types *; proxy_pass http://@UP@; }
    """
)
def test_text_before_and_after(stage: Stage) -> None:
    """The page's own call, and two that nginx adds when its answer is there."""
    assert stage.get("/?bytes=4&delay_ms=40").body == b"x" * 7
    trace = stage.exchange(PUT_TOGETHER).trace
    assert sorted(uris(trace)) == ["/after", "/before"]
    own, *added = trace.named("upstream exchange")
    assert "nginx.subrequest.uri" not in own.attributes
    for span in added:
        assert span.start_unix_ns >= own.start_unix_ns + own.attributes["nginx.upstream.time_to_first_byte_ns"]
    assert trace.server.seconds > 0.079

"""Requests that make subrequests: their attempts belong to the request's trace, marked with the subrequest's URI."""

import pytest

from e2e.agent_process import Trace
from e2e.stage import Stage
from e2e.timing import Slack

NEW = ["upstream connect", "upstream exchange"]


def subrequest_uris(trace: Trace) -> list[str]:
    return [
        span.attributes["nginx.subrequest.uri"]
        for span in trace.named("upstream exchange")
        if "nginx.subrequest.uri" in span.attributes
    ]


@pytest.mark.nginx(
    server="""
    location / { set $wanted $arg_auth; auth_request /auth; proxy_pass http://@UP@; }
    location = /auth {
        internal;
        proxy_pass http://@OTHER@/?status=$wanted;
        proxy_pass_request_body off;
        proxy_set_header Content-Length "";
    }
    """
)
def test_auth_request(stage: Stage) -> None:
    """Allowed, then denied with 403 and 401, then an error of the authority."""
    with stage.connect() as connection:
        statuses = [connection.request(f"/?auth={status}").status for status in (204, 403, 401, 500)]
    assert statuses == [200, 403, 401, 500]
    allowed, *denied = (each.trace for each in stage.exchanges(4))
    assert allowed.outline() == ["downstream read", *NEW, *NEW, "downstream write"]
    assert subrequest_uris(allowed) == ["/auth"]
    assert allowed.server.attributes["nginx.upstream.attempts"] == 2
    for trace in denied:
        assert trace.outline() == ["downstream read", *NEW, "downstream write"]
        assert subrequest_uris(trace) == ["/auth"]


@pytest.mark.nginx(
    server="""
    location / { mirror /mirror; proxy_pass http://@UP@; }
    location = /mirror { internal; proxy_pass http://@OTHER@$request_uri; }
    """
)
def test_mirror(stage: Stage) -> None:
    """The mirror is of this request, and so is a body that was read for both."""
    with stage.connect() as connection:
        assert connection.request("/a").status == 200
        assert connection.request("/b", "POST", body=b"b" * 5000).status == 200
    for each in stage.exchanges(2, Slack(end_early=True)):
        assert sorted(each.trace.outline()) == sorted(["downstream read", *NEW, *NEW, "downstream write"])
        assert subrequest_uris(each.trace) == ["/mirror"]


@pytest.mark.nginx(
    server="""
    location / { mirror /mirror; proxy_pass http://@UP@; }
    location = /mirror { internal; proxy_pass http://@OTHER@/?delay_ms=300; }
    """
)
def test_slow_mirror(stage: Stage) -> None:
    """The mirror's answer comes after the client's: its exchange is in the trace all the same, whole."""
    assert stage.get("/").status == 200
    trace = stage.exchange(Slack(end_early=True)).trace
    assert subrequest_uris(trace) == ["/mirror"]
    mirrored = [span for span in trace.named("upstream exchange") if "nginx.subrequest.uri" in span.attributes]
    assert mirrored[0].seconds > 0.29
    assert trace.named("downstream write")[0].end_unix_ns < mirrored[0].end_unix_ns


@pytest.mark.nginx(
    server="""
    location /one { proxy_pass http://@UP@/?delay_ms=60; }
    location /two { proxy_pass http://@OTHER@/?delay_ms=120; }
    location /page { ssi on; ssi_types *; alias @HTML@/ssi.html; }
    """
)
def test_server_side_includes(stage: Stage) -> None:
    """Both includes are fetched at once, and put into the page in its order."""
    page = b'a<!--# include virtual="/one" -->b<!--# include virtual="/two" -->c'
    (stage.site.prefix / "html" / "ssi.html").write_bytes(page)
    assert stage.get("/page").body == b"axxxxxbxxxxxc"
    trace = stage.exchange(Slack(write_early=True)).trace
    assert sorted(subrequest_uris(trace)) == ["/one", "/two"]
    assert trace.server.attributes["nginx.upstream.attempts"] == 2
    one, two = trace.named("upstream exchange")
    assert two.start_unix_ns < one.end_unix_ns


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@; server @UP@; }",
    server="""
    location /guarded { auth_request /auth; alias @HTML@/hello.txt; }
    location = /auth { internal; proxy_pass http://@NAME@/?status=204; }
    """,
)
def test_failed_attempt_of_a_subrequest(stage: Stage) -> None:
    assert stage.get("/guarded").status == 200
    trace = stage.exchange().trace
    assert trace.outline() == ["downstream read", "upstream connect", *NEW, "downstream write"]
    connects = trace.named("upstream connect")
    assert [span.status for span in connects] == ["ERROR", "UNSET"]
    assert [span.attributes["nginx.subrequest.uri"] for span in connects] == ["/auth", "/auth"]

"""A post_action: its response replaces nginx's facts about the client's response. What the client got is the truth."""

import time
from dataclasses import replace

import pytest

from e2e.http1_client import ConnectionEnded, request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import Exchange, Stage
from e2e.timing import Slack

BOTH_BEGINNINGS = True

ACTIONS = pytest.mark.parametrize("action", ["proxied", "static"])
BUFFERING = pytest.mark.parametrize("buffering", ["on", "off"])
CHUNKED = pytest.mark.parametrize("chunked", ["", "&chunked=1"], ids=["length", "chunked"])

SERVER = """
    proxy_read_timeout 400ms; proxy_http_version 1.1;
    location /on/proxied { proxy_pass http://@UP@; post_action /act; }
    location /on/static { proxy_pass http://@UP@; post_action /note; }
    location /off/proxied { proxy_pass http://@UP@; proxy_buffering off; post_action /act; }
    location /off/static { proxy_pass http://@UP@; proxy_buffering off; post_action /note; }
    location /redirected { proxy_pass http://@UP@/redirected?header=X-Accel-Redirect:/on/proxied; }
    location = /act { internal; proxy_pass http://@OTHER@/?delay_ms=100; }
    location = /note { internal; return 204; }
"""
EARLY = Slack(end_early=True, response_early=True, write_early=True, client_status=200)
UNTOLD = replace(EARLY, client_status=0)
"""An action without an upstream: nobody has noted the status that the client got, so the span has none."""


def ending(each: Exchange) -> tuple[str | None, str | None]:
    server = each.trace.server
    return server.attributes.get("nginx.termination"), server.error


def cut_short(stage: Stage, target: str) -> None:
    with stage.connect() as connection, pytest.raises(ConnectionEnded):
        connection.request(target)


@pytest.mark.nginx(server=SERVER)
@ACTIONS
@BUFFERING
@CHUNKED
def test_the_upstream_closes(stage: Stage, action: str, buffering: str, chunked: str) -> None:
    cut_short(stage, f"/{buffering}/{action}?bytes=70000&end=truncate{chunked}")
    each = stage.exchange(EARLY if action == "proxied" else UNTOLD)
    assert ending(each) == ("upstream_incomplete", "upstream_incomplete")
    assert each.trace.named("upstream exchange")[0].error == "incomplete_response"


@pytest.mark.nginx(server=SERVER)
@ACTIONS
@BUFFERING
@CHUNKED
def test_the_upstream_stalls(stage: Stage, action: str, buffering: str, chunked: str) -> None:
    cut_short(stage, f"/{buffering}/{action}?bytes=1000&parts=2&part_ms=900{chunked}")
    each = stage.exchange(EARLY if action == "proxied" else UNTOLD)
    assert ending(each) == ("upstream_timeout", "upstream_timeout")
    assert each.trace.named("upstream exchange")[0].error == "timeout"
    assert each.trace.server.seconds > 0.39


@pytest.mark.nginx(server=SERVER)
@pytest.mark.parametrize(("action", "buffering"), [("proxied", "on"), ("proxied", "off"), ("static", "off")])
@CHUNKED
def test_the_client_leaves(stage: Stage, action: str, buffering: str, chunked: str) -> None:
    connection = stage.connect(receive_buffer_bytes=65536)
    connection.send(request_bytes("GET", f"/{buffering}/{action}?bytes=50000000{chunked}"))
    assert connection.socket.recv(20_000)
    time.sleep(0.1)
    connection.abort()
    # Not seen: an action without an upstream after a response that nginx had buffered whole.
    each = stage.exchange(EARLY if action == "proxied" else UNTOLD)
    assert ending(each) == ("client_closed_request", None)
    assert [span.error for span in each.trace.spans] == [None] * len(each.trace.spans)


@pytest.mark.nginx(listen="listen @LISTEN@ http2;", server=SERVER)
@BUFFERING
@pytest.mark.parametrize("how", ["truncate", "reset"])
def test_a_stream_is_broken_off(stage: Stage, buffering: str, how: str) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    query = "bytes=70000&end=truncate" if how == "truncate" else "bytes=1000&parts=2&part_ms=300"
    (stream,) = connection.start([Http2Request(f"/{buffering}/proxied?{query}")])
    time.sleep(0.15)
    if how == "reset":
        connection.reset(stream)
    stage.lines(1)
    connection.close()
    expected = ("upstream_incomplete", "upstream_incomplete") if how == "truncate" else ("client_closed_request", None)
    assert ending(stage.exchange(EARLY)) == expected


@pytest.mark.nginx(server=SERVER)
@pytest.mark.parametrize("target", ["/on/proxied", "/off/proxied", "/redirected"])
@pytest.mark.parametrize("query", ["", "bytes=0", "chunked=1", "bytes=70000&keep_alive=0", "status=404"])
def test_a_whole_response_looks_whole(stage: Stage, target: str, query: str) -> None:
    """Even if the client leaves while nginx acts. The status is the one that the client got."""
    with stage.connect() as connection:
        response = connection.request(f"{target}?{query}")
    each = stage.exchange(Slack(end_early=True, response_early=True, write_early=True, client_status=response.status))
    assert ending(each) == (None, None)
    assert each.trace.server.attributes["http.response.status_code"] == response.status


@pytest.mark.nginx(
    server="location / { return 200 answered; post_action /act; }"
    "location = /act { internal; proxy_pass http://@UP@/?status=503; }"
)
def test_an_action_that_fails_is_no_failed_request(stage: Stage) -> None:
    assert stage.get("/").body == b"answered"
    each = stage.exchange(Slack(end_early=True, write_early=True, client_status=200))
    assert each.log["status"] == "503"
    assert (each.trace.server.status, each.trace.server.attributes["http.response.status_code"]) == ("UNSET", 200)
    assert each.trace.named("upstream exchange")[0].error == "503"

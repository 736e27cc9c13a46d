"""Responses that began well but are incomplete: they end when nginx abandons them, and say whose fault it was."""

import time

import pytest

from e2e.http1_client import ConnectionEnded, request_bytes
from e2e.stage import Exchange, Stage
from e2e.timing import Slack

BOTH_BEGINNINGS = True

BUFFERING = pytest.mark.parametrize("buffering", ["on", "off"])
EARLY = Slack(response_early=True)


def ending(each: Exchange) -> tuple[str | None, str | None]:
    server = each.trace.server
    return server.attributes.get("nginx.termination"), server.error


def exchange_errors(each: Exchange) -> list[str | None]:
    return [span.error for span in each.trace.named("upstream exchange")]


def cut_short(stage: Stage, target: str) -> None:
    with stage.connect() as connection, pytest.raises(ConnectionEnded):
        connection.request(target)


SERVER = """
    proxy_read_timeout 400ms; proxy_http_version 1.1;
    location /on { proxy_pass http://@UP@; proxy_buffering on; }
    location /off { proxy_pass http://@UP@; proxy_buffering off; }
"""


@pytest.mark.nginx(server=SERVER)
@BUFFERING
@pytest.mark.parametrize("chunked", ["", "&chunked=1"], ids=["length", "chunked"])
def test_the_upstream_stalls(stage: Stage, buffering: str, chunked: str) -> None:
    cut_short(stage, f"/{buffering}?bytes=1000&parts=2&part_ms=700{chunked}")
    each = stage.exchange()
    assert (each.log["status"], each.log["upstream_status"]) == ("200", "200")
    assert float(each.log["request_time"]) > 0.39
    assert ending(each) == ("upstream_timeout", "upstream_timeout")
    assert exchange_errors(each) == ["timeout"]
    assert each.trace.server.seconds > 0.39


@pytest.mark.nginx(server=SERVER)
@BUFFERING
def test_the_upstream_closes(stage: Stage, buffering: str) -> None:
    cut_short(stage, f"/{buffering}?bytes=1000&end=truncate")
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert "prematurely closed" in stage.site.nginx.error_log.read_text()
    assert ending(each) == ("upstream_incomplete", "upstream_incomplete")
    assert exchange_errors(each) == ["incomplete_response"]


@pytest.mark.nginx(server=SERVER)
@BUFFERING
@pytest.mark.parametrize("version", ["chunked=1", "bytes=70000", "bytes=70000&keep_alive=0", "bytes=0", "status=204"])
def test_whole_responses_look_whole(stage: Stage, buffering: str, version: str) -> None:
    """The same ways to frame a response, and nothing is wrong with it."""
    with stage.connect() as connection:
        connection.request(f"/{buffering}?{version}")
        connection.request(f"/{buffering}?{version}", "HEAD")
        connection.request(f"/{buffering}?{version}&parts=2&part_ms=50")
    for each in stage.exchanges(3):
        assert ending(each) == (None, None)
        assert exchange_errors(each) == [None]


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; } error_page 404 /missing; proxy_intercept_errors on;"
    "location /missing { return 404 missing; } location /accel { proxy_pass http://@UP@; }"
    "location /file { internal; return 200 file; }"
)
def test_a_body_that_nginx_does_not_want_is_not_missing(stage: Stage) -> None:
    with stage.connect() as connection:
        assert connection.request("/?status=404&bytes=100000").status == 404
        assert connection.request("/accel?bytes=100000&header=X-Accel-Redirect:/file").body == b"file"
    for each in stage.exchanges(2, EARLY):
        assert ending(each) == (None, None)


@pytest.mark.nginx(server="location / { root @HTML@; } location /proxied { proxy_pass http://@UP@; }")
@pytest.mark.parametrize("target", ["/large.bin", "/proxied?bytes=50000000"])
def test_the_client_goes_away(stage: Stage, target: str) -> None:
    connection = stage.connect(receive_buffer_bytes=65536)
    connection.send(request_bytes("GET", target))
    assert connection.socket.recv(20_000)
    time.sleep(0.1)
    connection.abort()
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert ending(each) == ("client_closed_request", None)
    assert [span.error for span in each.trace.spans] == [None] * len(each.trace.spans)
    assert each.trace.server.seconds > 0.099


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; mirror /mirror; }"
    "location /mirror { internal; proxy_pass http://@OTHER@/?delay_ms=300; }"
)
def test_a_mirror_that_answers_later_is_no_incomplete_response(stage: Stage) -> None:
    assert stage.get("/").status == 200
    each = stage.exchange(Slack(end_early=True))
    assert ending(each) == (None, None)
    assert each.trace.server.seconds > 0.29


@pytest.mark.nginx(
    server="""
    lingering_time 300ms; lingering_timeout 300ms;
    location / { ssi on; ssi_types *; return 200 '<!--# include virtual="/slow" -->'; }
    location = /slow { proxy_pass http://@UP@/?delay_ms=1500; }
    """
)
def test_an_interim_response_is_no_response(stage: Stage) -> None:
    """nginx waits for a body that it does not need, gives up, and drops the page that it was about to send."""
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/", {"Expect": "100-continue", "Content-Length": "5"}))
        assert connection.read_until_closed() == b"HTTP/1.1 100 Continue\r\n\r\n"
    each = stage.exchange(EARLY)
    assert (each.log["status"], each.log["bytes_sent"]) == ("200", "25")
    assert ending(each) == ("aborted", "aborted")

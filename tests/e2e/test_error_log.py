"""Lines of nginx's error log on the trace of their request. Every other module's site compares all of them, too."""

import re
import socket
from collections.abc import Iterator

import pytest

from e2e.agent_process import Event, Trace
from e2e.error_lines import error_lines
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import Stage
from e2e.timing import ONE_TURN

AGENT_ENVIRONMENT = {"OTEL_NGINX_EBPF_LOG_LEVEL": "notice"}

ECONNREFUSED = 111
STREAMS = 100


@pytest.fixture(scope="module")
def syslog() -> Iterator[socket.socket]:
    """A server that nginx logs to, besides its file."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str], syslog: socket.socket) -> dict[str, str]:
    return {**upstream_addresses, "syslog": "{}:{}".format(*syslog.getsockname())}


def received(server: socket.socket) -> str:
    """Return the next datagram; an empty text if there is none."""
    try:
        return server.recv(65536).decode()
    except BlockingIOError:
        return ""


def events(trace: Trace) -> dict[str, list[Event]]:
    """Return the events of each span that has some, by the span's name."""
    found: dict[str, list[Event]] = {}
    for span in trace.spans:
        name = "SERVER" if span is trace.server else span.name
        if span.events:
            found.setdefault(name, []).extend(span.events)
    return found


def messages(trace: Trace) -> list[str]:
    return [event.attributes["nginx.error.message"] for span in trace.spans for event in span.events]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@; server @DEAD2@; server @UP@; }",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_on_the_attempt_that_failed(stage: Stage) -> None:
    assert stage.get("/?a=1").status == 200
    trace = stage.exchange().trace
    first, second, live = trace.named("upstream connect")
    for span in (first, second):
        refused, disabled = span.events
        assert refused.name == disabled.name == "nginx.error_log"
        assert refused.attributes == {
            "log.severity": "error",
            "nginx.error.errno": ECONNREFUSED,
            "nginx.error.message": "connect() failed (111: Connection refused) while connecting to upstream",
        }
        assert disabled.attributes == {
            "log.severity": "warn",
            "nginx.error.message": "upstream server temporarily disabled while connecting to upstream",
        }
        assert span.start_unix_ns < refused.time_unix_ns < disabled.time_unix_ns < live.start_unix_ns
    assert events(trace).keys() == {"upstream connect"}
    assert live.events == ()


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_read_timeout 200ms; }")
def test_on_the_exchange_that_timed_out(stage: Stage) -> None:
    assert stage.get("/?delay_ms=600").status == 504
    found = events(stage.exchange().trace)
    assert found.keys() == {"upstream exchange"}
    (event,) = found["upstream exchange"]
    assert re.fullmatch(  # “Operation” is musl's word
        r"upstream timed out \(110: (Connection|Operation) timed out\) while reading response header from upstream",
        str(event.attributes["nginx.error.message"]),
    )


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@; server @DEAD2@; }",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_no_live_upstreams_is_about_the_request(stage: Stage) -> None:
    with stage.connect() as connection:
        assert [connection.request("/").status for _ in range(2)] == [502, 502]
    _, untried = stage.exchanges(2)
    found = events(untried.trace)
    assert found.keys() == {"SERVER"}
    assert [event.attributes["nginx.error.message"] for event in found["SERVER"]] == [
        "no live upstreams while connecting to upstream"
    ]


@pytest.mark.nginx(
    server="location /up/ { proxy_pass http://@UP@; error_page 404 /page/missing; proxy_intercept_errors on; }"
    " location /page/ { root @HTML@; }"
)
def test_after_an_attempt_about_the_request(stage: Stage) -> None:
    """The upstream is still the request's last, but nginx does not work on it any more."""
    assert stage.get("/up/?status=404").status == 404
    found = events(stage.exchange().trace)
    assert found.keys() == {"SERVER"}
    (event,) = found["SERVER"]
    assert "open() " in event.attributes["nginx.error.message"]


@pytest.mark.nginx(server="location / { root @HTML@; log_not_found on; }")
def test_keepalive_requests_are_told_apart(stage: Stage) -> None:
    with stage.connect() as connection:
        for index in range(20):
            connection.request(f"/missing/{index}" if index % 3 else "/hello.txt")
    for index, each in enumerate(stage.exchanges(20)):
        found = messages(each.trace)
        assert len(found) == (1 if index % 3 else 0)
        assert all(f'/missing/{index}"' in message for message in found)


@pytest.mark.nginx(
    listen="listen @LISTEN@ http2;",
    http="upstream @NAME@ { server @DEAD1@ max_fails=0; server @DEAD2@ max_fails=0; }",
    server="location /dead/ { proxy_pass http://@NAME@; } location /file/ { root @HTML@; }",
)
def test_streams_that_fail_at_once(stage: Stage) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    kinds = ("dead", "file")
    connection.exchange([Http2Request(f"/{kinds[index % 2]}/{index}") for index in range(STREAMS)])
    connection.close()
    for each in stage.exchanges(STREAMS, ONE_TURN):
        path, found = each.trace.server.attributes["url.path"], events(each.trace)
        if path.startswith("/dead/"):
            assert {name: len(each) for name, each in found.items()} == {"upstream connect": 2}
            assert [len(span.events) for span in each.trace.named("upstream connect")] == [1, 1]
        else:
            assert found.keys() == {"SERVER"}
            assert [f'{path}"' in message for message in messages(each.trace)] == [True]


@pytest.mark.nginx(
    main="error_log syslog:server=@SYSLOG@ notice; error_log @PREFIX@/second.log error;",
    server="location / { root @HTML@; }",
)
def test_a_line_to_several_targets_is_one(stage: Stage, syslog: socket.socket) -> None:
    """nginx writes it to syslog first, then to two files."""
    assert stage.get("/several").status == 404
    (message,) = messages(stage.exchange().trace)
    files = [stage.site.nginx.error_log, stage.site.prefix / "second.log"]
    assert [sum("several" in line.message for line in error_lines(file)) for file in files] == [1, 1]
    assert "several" in message
    assert message in "".join(iter(lambda: received(syslog), ""))

"""HTTP/3. All clients share a QUIC socket: what a trace says about the client side is right, or is left out."""

import pytest

from e2e.agent_process import Trace
from e2e.nginx_server import nginx_build
from e2e.stage import FILES, Stage
from e2e.timing import ONE_TURN, Slack
from e2e.trace_contexts import CASES, check_cases

if "--with-http_v3_module" not in nginx_build():
    pytest.skip("this nginx has no HTTP/3; `make matrix` has some that do", allow_module_level=True)

# Not above: aioquic is needed only where nginx has HTTP/3.
from e2e.http3_client import Http3Request, fetch

# Traces are wanted of the requests too whose incoming context does not want one.
AGENT_ENVIRONMENT = {
    "OTEL_TRACES_SAMPLER": "always_on",
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST": "x-tenant,cookie",
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_RESPONSE": "x-answer,content-type,content-length",
}

QUIC = {
    "listen": "listen @LISTEN@ quic reuseport; listen @LISTEN@ ssl;"
    " ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
}
UPSTREAM = ["upstream connect", "upstream exchange"]


def upstream_spans(trace: Trace) -> list[str]:
    return [name for name in trace.outline() if name.startswith("upstream")]


def check_server(trace: Trace) -> None:
    assert trace.server.attributes["network.protocol.version"] == "3"
    assert trace.server.attributes["url.scheme"] == "https"
    assert trace.named("downstream write") == []  # packets leave after the request's end, together with other streams'


@pytest.mark.nginx(**QUIC, server="location / { return 200 'short text'; }")
def test_short_answers(stage: Stage) -> None:
    responses = fetch(stage.addresses["ipv4"], [Http3Request(f"/{index}") for index in range(10)], at_once=False)
    assert [(each.status, each.body) for each in responses] == [(200, b"short text")] * 10
    for each in stage.exchanges(10):
        check_server(each.trace)
        assert upstream_spans(each.trace) == []
        assert each.trace.server.seconds < 0.1


@pytest.mark.nginx(**QUIC, server="location / { root @HTML@; }")
def test_file(stage: Stage) -> None:
    (response,) = fetch(stage.addresses["ipv4"], [Http3Request("/page.html")])
    assert response.body == FILES["page.html"]
    check_server(stage.exchange().trace)


@pytest.mark.nginx(**QUIC, server="location / { proxy_pass http://@UP@; }")
def test_proxied(stage: Stage) -> None:
    """Two dozen streams at once, each with an upstream connection of its own."""
    requests = [Http3Request(f"/{index}?delay_ms={index * 4}&bytes={index * 1000}") for index in range(24)]
    responses = fetch(stage.addresses["ipv4"], requests)
    assert [len(each.body) for each in responses] == [index * 1000 for index in range(24)]
    for each in stage.exchanges(24, ONE_TURN):
        check_server(each.trace)
        assert upstream_spans(each.trace) == UPSTREAM
        delay_ms = int(each.log["request_uri"].partition("delay_ms=")[2].partition("&")[0])
        assert each.trace.named("upstream exchange")[0].seconds > delay_ms / 1000
        assert each.trace.server.seconds > delay_ms / 1000


@pytest.mark.nginx(
    **QUIC,
    http="upstream @NAME@ { server @DEAD1@; server @UP@; keepalive 2; }",
    server="location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }",
)
def test_failed_attempt_then_a_kept_alive_connection(stage: Stage) -> None:
    fetch(stage.addresses["ipv4"], [Http3Request("/"), Http3Request("/")], at_once=False)
    first, second = (each.trace for each in stage.exchanges(2))
    assert upstream_spans(first) == ["upstream connect", *UPSTREAM]
    assert first.named("upstream connect")[0].error == "ECONNREFUSED"
    assert upstream_spans(second) == ["upstream exchange"]


@pytest.mark.nginx(**QUIC, server="location / { proxy_pass http://@UP@; client_max_body_size 4m; }")
def test_body(stage: Stage) -> None:
    """Buffered: the upstream is asked when all of it is there, however slowly it comes."""
    requests = [
        Http3Request("/small", "POST", (b"b" * 100,)),
        Http3Request("/large", "POST", (b"b" * 1_000_000,)),
        Http3Request("/slow", "POST", (b"b" * 1000,) * 3, pause_seconds=0.1),
    ]
    assert [each.status for each in fetch(stage.addresses["ipv4"], requests, at_once=False)] == [200] * 3
    traces = [each.trace for each in stage.exchanges(3)]
    assert [upstream_spans(trace) for trace in traces] == [UPSTREAM] * 3
    for trace in traces:
        check_server(trace)
        assert trace.named("upstream connect")[0].start_unix_ns >= trace.named("downstream read")[0].end_unix_ns
    assert traces[2].named("downstream read")[0].seconds > 0.19


@pytest.mark.nginx(**QUIC, server="location / { proxy_pass http://@UP@; }")
def test_client_cancels(stage: Stage) -> None:
    left = Http3Request("/left?delay_ms=400", cancel_after_seconds=0.15)
    _, answered = fetch(stage.addresses["ipv4"], [left, Http3Request("/answered?delay_ms=250")])
    assert answered.status == 200
    exchanges = stage.exchanges(2, lambda log: Slack(response_early=log["status"] == "499"))
    cancelled = next(each for each in exchanges if each.log["request_uri"].startswith("/left"))
    assert cancelled.log["status"] == "499"
    assert cancelled.trace.server.attributes["nginx.termination"] == "client_closed_request"
    assert 0.1 < cancelled.trace.server.seconds < 0.35


@pytest.mark.nginx(**QUIC, server="location / { root @HTML@; limit_rate 20k; }")
def test_slow_download(stage: Stage) -> None:
    """nginx spreads the answer over more than half a second; the SERVER span lasts as long."""
    (response,) = fetch(stage.addresses["ipv4"], [Http3Request("/page.html")])
    assert response.body == FILES["page.html"]
    trace = stage.exchange().trace
    check_server(trace)
    assert trace.server.seconds > 0.5


@pytest.mark.nginx(**QUIC, server="location / { return 200; }")
def test_incoming_context(stage: Stage) -> None:
    """The cases of test_context.py, at once on one connection."""
    lower = [[(name.lower(), value) for name, value in headers] for headers, _ in CASES.values()]
    requests = [Http3Request(f"/?{number}", headers=tuple(headers)) for number, headers in enumerate(lower)]
    assert {each.status for each in fetch(stage.addresses["ipv4"], requests)} == {200}
    check_cases(stage.exchanges(len(CASES), ONE_TURN))


@pytest.mark.nginx(**QUIC, server="location / { return 200 text; default_type text/x-a; add_header X-Answer $arg_a; }")
def test_captured_headers(stage: Stage) -> None:
    sent = [(("x-tenant", f"{index}"), ("x-tenant", "again"), ("cookie", "secret")) for index in range(24)]
    requests = [Http3Request(f"/?a={index}", headers=headers) for index, headers in enumerate(sent)]
    fetch(stage.addresses["ipv4"], requests)
    for each in stage.exchanges(24, ONE_TURN):
        attributes = each.trace.server.attributes
        index = attributes["url.query"].removeprefix("a=")
        assert {name: value for name, value in attributes.items() if ".header." in name} == {
            "http.request.header.x-tenant": [index, "again"],
            "http.request.header.cookie": ["REDACTED"],
            "http.response.header.x-answer": [index],
            "http.response.header.content-type": ["text/x-a"],
            "http.response.header.content-length": ["4"],
        }

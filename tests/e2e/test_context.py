"""The trace context that a client sends: our spans continue its trace or begin one, as the specification demands."""

import re
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.stage import Stage
from e2e.timing import CROWDED, ONE_TURN, Slack
from e2e.trace_contexts import CASES, PARENT_ID, TRACE_ID, VALID, Context, Headers, check_cases, check_context, head

# Every request is traced, those too whose client did not want it.
AGENT_ENVIRONMENT = {"OTEL_TRACES_SAMPLER": "always_on"}

FILE = "location / { root @HTML@; }"
PROXIED = "location / { proxy_pass http://@UP@; }"
HTTP2 = "listen @LISTEN@ http2;"
TRACEPARENT = {"traceparent": VALID, "tracestate": "one=1"}
CONTINUED = Context(state="one=1")


@pytest.mark.nginx(server=FILE)
def test_http1(stage: Stage) -> None:
    """Different contexts one after another on a kept connection."""
    with stage.connect() as connection:
        for number, (headers, _) in enumerate(CASES.values()):
            connection.send(head(f"/hello.txt?{number}", headers))
            assert connection.read_response().status == 200
    check_cases(stage.exchanges(len(CASES)))


@pytest.mark.nginx(server=FILE)
def test_pipelined(stage: Stage) -> None:
    """All of them in nginx's buffer before the first one is answered."""
    with stage.connect() as connection:
        connection.send(b"".join(head(f"/hello.txt?{number}", case[0]) for number, case in enumerate(CASES.values())))
        for _ in CASES:
            assert connection.read_response().status == 200
    check_cases(stage.exchanges(len(CASES), CROWDED))


@pytest.mark.nginx(listen=HTTP2, server=PROXIED)
def test_http2(stage: Stage) -> None:
    """All of them at once on one connection, which remembers header lines from one stream to the next (HPACK)."""
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    requests = [Http2Request(f"/?{number}", headers=tuple(case[0])) for number, case in enumerate(CASES.values())]
    assert {each.status for each in connection.exchange(requests)} == {200}
    connection.close()
    check_cases(stage.exchanges(len(CASES), ONE_TURN))


HEADERS_MAX = 70
"""Beyond three parts of nginx's header list, of 20 elements each."""


def crowd(count: int) -> Headers:
    """So many other headers, then the context's two."""
    return [(f"x-other-{number}", f"{number}") for number in range(count)] + list(TRACEPARENT.items())


@pytest.mark.nginx(server=FILE)
def test_among_other_headers(stage: Stage) -> None:
    with stage.connect() as connection:
        for count in range(HEADERS_MAX):
            connection.send(head("/hello.txt", crowd(count)))
            assert connection.read_response().status == 200
    for each in stage.exchanges(HEADERS_MAX):
        assert check_context(each.trace, CONTINUED) == []


@pytest.mark.nginx(listen=HTTP2, server=FILE)
def test_among_other_headers_of_http2(stage: Stage) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    for count in range(HEADERS_MAX):
        assert connection.exchange([Http2Request("/hello.txt", headers=tuple(crowd(count)))])[0].status == 200
    connection.close()
    for each in stage.exchanges(HEADERS_MAX):
        assert check_context(each.trace, CONTINUED) == []


@pytest.mark.nginx(server=PROXIED)
def test_header_in_pieces(stage: Stage) -> None:
    """Cut within the context, and so long that nginx moves to a larger buffer before, within or after it."""
    with stage.connect() as connection:
        request = head("/", list(TRACEPARENT.items()))
        middle = request.index(VALID.encode()) + 20
        connection.send_slowly([request[:middle], request[middle:]], 0.05)
        assert connection.read_response().status == 200
        for before in (*range(700, 1100, 20), 5000):
            connection.send(head("/", [("x-long", "l" * before), *TRACEPARENT.items(), ("x-long", "l" * 5000)]))
            assert connection.read_response().status == 200
    for each in stage.exchanges(22):
        assert check_context(each.trace, CONTINUED) == []


@pytest.mark.nginx(
    server="""
    location / { return 200 text; }
    location /missing { root @HTML@; }
    location /denied { deny all; }
    location /dead { proxy_pass http://@DEAD1@; }
    location /slow { proxy_pass http://@UP@; }
    location /tunnel {
        proxy_pass http://@UP@;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection upgrade;
    }
    """
)
def test_whatever_becomes_of_the_request(stage: Stage) -> None:
    for target, status in (("/", 200), ("/missing", 404), ("/denied", 403), ("/dead", 502), ("/slow?status=503", 503)):
        assert stage.get(target, headers=TRACEPARENT).status == status
    with stage.connect() as connection:
        connection.send(request_bytes("POST", "/slow", {**TRACEPARENT, "Content-Length": "100"}))  # no body comes
    with stage.connect() as tunnel:
        tunnel.send(request_bytes("GET", "/tunnel", {**TRACEPARENT, "Upgrade": "echo", "Connection": "Upgrade"}))
        assert tunnel.read_response().status == 101
    for each in stage.exchanges(7, Slack(response_early=True, end_early=True)):
        assert check_context(each.trace, CONTINUED) == [], each.log["request_uri"]


@pytest.mark.nginx(
    server="""
    location / { auth_request /auth; mirror /mirror; proxy_pass http://@UP@; }
    location = /auth { internal; proxy_pass http://@OTHER@/?status=204; proxy_pass_request_body off; }
    location = /mirror { internal; proxy_pass http://@OTHER@/; }
    location /page { ssi on; ssi_types *; alias @HTML@/contexts.html; }
    location /include { proxy_pass http://@UP@; }
    """
)
def test_subrequests(stage: Stage) -> None:
    """Whatever is asked upstream for a request is in the trace that its client began."""
    page = b'<!--# include virtual="/include/1" --><!--# include virtual="/include/2" -->'
    (stage.site.prefix / "html" / "contexts.html").write_bytes(page)
    with stage.connect() as connection:
        for target in ("/", "/page"):
            assert connection.request(target, headers=TRACEPARENT).status == 200
    guarded, page_ = stage.exchanges(2, Slack(end_early=True, write_early=True))
    for each, exchanges in ((guarded, 3), (page_, 2)):
        assert check_context(each.trace, CONTINUED) == []
        assert len(each.trace.named("upstream exchange")) == exchanges


@pytest.mark.nginx(
    server="""
    location / { root @HTML@; error_page 404 = @fallback; try_files $uri @fallback; }
    location @fallback { proxy_pass http://@UP@; }
    location /rewritten { rewrite ^ /hello.txt last; }
    location /named { error_page 418 = @fallback; return 418; }
    location /accel { proxy_pass http://@UP@/?header=X-Accel-Redirect:/hello.txt; }
    """
)
def test_internal_redirects(stage: Stage) -> None:
    targets = ("/nothing", "/rewritten", "/named", "/accel")
    with stage.connect() as connection:
        for target in targets:
            assert connection.request(target, headers=TRACEPARENT).status == 200
    for each in stage.exchanges(len(targets), Slack(response_early=True)):
        assert check_context(each.trace, CONTINUED) == [], each.log["request_uri"]


SHORT_ID = TRACE_ID[16:]
B3 = f"{TRACE_ID}-{PARENT_ID}"
B3_MULTI = [("X-B3-TraceId", TRACE_ID), ("X-B3-SpanId", PARENT_ID)]
PROPAGATORS: dict[str, list[tuple[Headers, Context | None]]] = {
    "none": [([("traceparent", VALID)], None), ([("b3", f"{B3}-1")], None)],
    "tracecontext,baggage": [
        ([("traceparent", VALID), ("baggage", "key=value")], Context()),
        ([("b3", f"{B3}-1")], None),
        (B3_MULTI, None),
        ([("X-Request-ID", TRACE_ID)], None),
    ],
    "b3": [
        ([("b3", f"{B3}-1")], Context()),
        ([("b3", f"{B3}-0")], Context()),
        ([("b3", f"{B3}-d")], Context()),
        ([("b3", B3)], Context()),
        ([("b3", f"{B3}-1-{PARENT_ID}")], Context()),
        ([("B3", f"{SHORT_ID}-{PARENT_ID}-1")], Context(trace_id=SHORT_ID.zfill(32))),
        ([("b3", "0")], None),
        ([("b3", f"{B3[1:]}-1")], None),
        ([("b3", f"{'0' * 32}-{PARENT_ID}-1")], None),
        ([("b3", f"{TRACE_ID}-{'0' * 16}-1")], None),
        ([("b3", f"{TRACE_ID}-{PARENT_ID[1:]}-1")], None),
        ([("traceparent", VALID)], None),
    ],
    "b3multi": [
        ([*B3_MULTI, ("X-B3-Sampled", "1")], Context()),
        ([*B3_MULTI, ("X-B3-Sampled", "0")], Context()),
        ([*B3_MULTI, ("X-B3-Flags", "1")], Context()),
        (B3_MULTI, Context()),
        ([("x-b3-traceid", SHORT_ID), ("x-b3-spanid", PARENT_ID)], Context(trace_id=SHORT_ID.zfill(32))),
        (B3_MULTI[:1], None),
        (B3_MULTI[1:], None),
        ([("b3", f"{B3}-1")], None),
        ([("traceparent", VALID)], None),
    ],
    "tracecontext,b3,b3multi": [
        ([("traceparent", VALID)], Context()),
        ([("b3", f"{B3}-1")], Context()),
        (B3_MULTI, Context()),
        ([("traceparent", "nonsense"), ("b3", f"{B3}-1")], Context()),
    ],
    "xrequestid": [
        ([("X-Request-ID", TRACE_ID)], Context(parent_id="")),
        ([("X-Request-ID", re.sub(r"(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", TRACE_ID))], Context(parent_id="")),
        ([("X-Request-ID", "0" * 32)], None),
        ([("X-Request-ID", "request 17")], None),
        ([("traceparent", VALID)], None),
    ],
}


@pytest.mark.parametrize("propagators", PROPAGATORS)
@pytest.mark.nginx(server=FILE)
def test_propagators(stage: Stage, propagators: str, tmp_path: Path) -> None:
    """OTEL_PROPAGATORS names the headers that count; a second agent on the same nginx reads them."""
    cases = PROPAGATORS[propagators]
    agent = AgentProcess(
        stage.site.nginx.pid, tmp_path, environment={**AGENT_ENVIRONMENT, "OTEL_PROPAGATORS": propagators}
    )
    with stage.connect() as connection:
        for headers, _ in cases:
            connection.send(head("/hello.txt", headers))
            assert connection.read_response().status == 200
    exchanges = stage.match(stage.lines(len(cases)), agent.poll)
    agent.stop()
    wrong = [
        (headers, found)
        for each, (headers, expected) in zip(exchanges, cases, strict=True)
        if (found := check_context(each.trace, expected))
    ]
    assert wrong == []

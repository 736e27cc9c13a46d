"""--adopt-upstream-context: our spans have the trace id and span id that nginx itself sends upstream.

The tests use examples/traceparent.conf, and test its rules, too. The upstream's answer says what the upstream received.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess, Span, Trace
from e2e.gateways import UwsgiServer
from e2e.http1_client import Http1Connection, Response
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import NginxServer, free_ports, nginx_version
from e2e.stage import Exchange, Stage
from e2e.timing import LONG_TURN_MS, ONE_TURN, Slack
from e2e.trace_contexts import CASES, PARENT_ID, TRACE_ID, VALID, Context, Headers, check_cases, check_context, head

AGENT_ENVIRONMENT = {"OTEL_NGINX_EBPF_ADOPT_UPSTREAM_CONTEXT": "true", "OTEL_TRACES_SAMPLER": "always_on"}
SNIPPET = Path(__file__).parents[2] / "examples" / "traceparent.conf"
SITE_HTTP = f"include {SNIPPET};"

ECHO = "/?echo=1"
GATEWAYS = ("uwsgi", "fastcgi", "scgi")
OTHER_ID, OTHER_SPAN = "f" * 31 + "e", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str], public_directory: Path) -> Iterator[dict[str, str]]:
    if not shutil.which("uwsgi"):
        pytest.skip("needs uwsgi; `make setup-test` installs it")
    server = UwsgiServer(public_directory)
    yield {**upstream_addresses, **server.addresses}
    server.stop()


@dataclass(frozen=True)
class Told:
    """What an upstream was told."""

    trace_id: str
    span_id: str
    flags: int
    state: list[str]

    @classmethod
    def by(cls, response: Response) -> "Told":
        """From an answer to `echo=1`. There is exactly one traceparent, of version 00."""
        lines = [line.partition(":") for line in response.body.decode().split("\r\n")]
        fields = [(name.lower(), value.strip()) for name, _, value in lines]
        (value,) = (value for name, value in fields if name == "traceparent")
        assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", value), value
        _, trace_id, span_id, flags = value.split("-")
        return cls(trace_id, span_id, int(flags, 16), [value for name, value in fields if name == "tracestate"])


def exchange_of(trace: Trace) -> Span:
    (exchange,) = trace.named("upstream exchange")
    return exchange


def adopted(each: Exchange, told: Told) -> bool:
    return (each.trace.trace_id, exchange_of(each.trace).span_id) == (told.trace_id, told.span_id)


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_snippet(stage: Stage) -> None:
    """Every form of incoming context: what is sent, and that our trace is the one that was sent."""
    answers = []
    with stage.connect() as connection:
        for headers, _ in CASES.values():
            connection.send(head(ECHO, headers))
            answers.append(Told.by(connection.read_response()))
    exchanges = stage.exchanges(len(CASES))
    assert len({told.span_id for told in answers}) == len(CASES)
    for (name, (headers, expected)), told, each in zip(CASES.items(), answers, exchanges, strict=True):
        assert adopted(each, told)
        names = [field.lower() for field, _ in headers]
        if len(set(names)) < len(names) and nginx_version() < (1, 23):
            continue  # nginx's variable holds the first line only
        if expected is None:
            assert each.trace.server.parent_span_id is None, name
            assert (told.trace_id != TRACE_ID, told.flags, told.state) == (True, 1, []), name
        else:
            assert check_context(each.trace, expected) == [], name
            flags = int(headers[names.index("traceparent")][1][53:55], 16) & 3
            assert (told.trace_id, told.flags) == (expected.trace_id, flags), name
            assert ",".join(told.state).replace(" ", "") == expected.state, name


@pytest.mark.nginx(
    http="""
    upstream @NAME@ { server @LISTEN_SECOND@; keepalive 4; }
    server { listen @LISTEN_SECOND@; access_log logs/@NAME@.log json; location / { root @HTML@; } }
    """,
    server="""
    location / {
        proxy_pass http://@NAME@;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header traceparent $traceparent;
        proxy_set_header tracestate $tracestate;
    }
    """,
)
def test_nginx_behind_nginx(stage: Stage) -> None:
    """The second one's SERVER span is the child of the first one's exchange, on new connections and kept ones."""
    with stage.connect() as connection:
        for index in range(10):
            fields = {"traceparent": VALID, "tracestate": "one=1"} if index % 2 else {}
            assert connection.request(f"/hello.txt?{index}", headers=fields).status == 200
    by_request: dict[str, list[Trace]] = {}
    for each in stage.exchanges(20):
        by_request.setdefault(each.log["request_uri"], []).append(each.trace)
    for index in range(10):
        inner, outer = sorted(
            by_request[f"/hello.txt?{index}"], key=lambda trace: len(trace.named("upstream exchange"))
        )
        assert inner.trace_id == outer.trace_id
        assert inner.server.parent_span_id == exchange_of(outer).span_id
        assert outer.server.parent_span_id == (PARENT_ID if index % 2 else None)
        assert inner.trace_state == outer.trace_state == ("one=1" if index % 2 else "")


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@; keepalive 4; }",
    server="""
    client_max_body_size 5m;
    client_body_buffer_size 16k;
    location / { proxy_pass http://@UP@; }
    location /unix { proxy_pass http://@UP_UNIX@; }
    location /tls { proxy_pass https://@UP_TLS@; }
    location /kept {
        proxy_pass http://@NAME@;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header traceparent $traceparent;
    }
    location /unbuffered { proxy_pass http://@UP@; proxy_request_buffering off; }
    location /set {
        proxy_pass http://@UP@;
        proxy_set_header X-First "f$request_id$request_id$request_id";
        proxy_set_header TraceParent $traceparent;
        proxy_set_header X-Last last;
    }
    """,
)
def test_ways_to_send_a_request(stage: Stage) -> None:
    """To a socket of each kind, with a body or none, from memory or from a file, the header line anywhere."""
    answers = []
    targets = ("/", "/unix", "/tls", "/kept", "/kept", "/unbuffered", "/set")
    with stage.connect() as connection:
        for body in (b"", b"b" * 500, b"b" * 3_000_000):
            for target in targets:
                many = {f"x-other-{number}": f"{number}" * 50 for number in range(40)} if target == "/" else {}
                answers.append(Told.by(connection.request(target + "?echo=1", "POST", many, body)))
    slack = Slack(first_byte_unseen=True, late_max_ms=LONG_TURN_MS)
    unseen = []
    for each, told in zip(stage.exchanges(len(answers), slack), answers, strict=True):
        if not adopted(each, told):
            unseen.append(each.log["request_uri"])
    # nginx forgets the header before it sends the rest of the body; the answer, which repeats it, is in its place.
    assert unseen == ["/unbuffered?echo=1"]


FIRST = "proxy_set_header X-First $arg_first; proxy_set_header traceparent $traceparent;"


@pytest.mark.nginx(
    server='location / { proxy_pass http://@UP@; proxy_set_header traceparent ""; proxy_set_body $request_body; }'
)
def test_a_body_beside_the_header(stage: Stage) -> None:
    with stage.connect() as connection:
        body = f"a\r\ntraceparent: 00-{OTHER_ID}-{OTHER_SPAN}-01\r\n".encode()
        assert connection.request("/", "POST", {}, body).status == 200
    (each,) = stage.exchanges(1)
    assert each.trace.trace_id != OTHER_ID
    assert exchange_of(each.trace).span_id != OTHER_SPAN


@pytest.mark.nginx(server=f"location / {{ proxy_pass http://@UP@; {FIRST} }}")
def test_what_is_not_the_header(stage: Stage) -> None:
    """The word elsewhere in what is sent: in the URI, in other headers' names and values, before or behind it."""
    other = f"00-{OTHER_ID}-{OTHER_SPAN}-01"
    cases: list[tuple[str, Headers]] = [
        ("/traceparent?echo=1", []),
        (f"/?echo=1&first=traceparent:%20{other}", []),
        (f"/?echo=1&traceparent:{other}", [("cookie", f"traceparent={other}"), ("x-traceparent", other)]),
        (
            ECHO,
            [
                ("a-traceparent", other),
                ("traceparent-b", other),
                ("traceparents", other),
                ("x", f"traceparent: {other}"),
            ],
        ),
        (ECHO, [("x", f"\x107HTTP_TRACEPARENT{other}"), ("x", f"\x10\x01HTTP_TRACEPARENT7 {other}")]),
    ]
    with stage.connect() as connection:
        answers = []
        for target, headers in cases:
            connection.send(head(target, headers))
            answers.append(Told.by(connection.read_response()))
    exchanges = stage.exchanges(len(cases))
    wrong = [case for case, each, told in zip(cases, exchanges, answers, strict=True) if not adopted(each, told)]
    assert wrong == []


@pytest.mark.nginx(server="location /passed { proxy_pass http://@UP@/; proxy_set_header X-Other other; }")
def test_what_the_client_sent(stage: Stage) -> None:
    """It is passed on as it came, valid or not, one or several: the client's span, and never ours."""
    with stage.connect() as connection:
        for number, (headers, _) in enumerate(CASES.values()):
            connection.send(head(f"/passed?{number}", headers))
            assert connection.read_response().status == 200
    exchanges = stage.exchanges(len(CASES))
    check_cases(exchanges)
    assert {exchange_of(each.trace).span_id for each in exchanges}.isdisjoint(
        {PARENT_ID, PARENT_ID.replace("b7", "c8")}
    )


@pytest.mark.nginx(listen="listen @LISTEN@ http2;", server="location / { proxy_pass http://@UP@; }")
def test_concurrent_streams(stage: Stage) -> None:
    """Requests of one connection do not share what they send."""
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    requests = [
        Http2Request(f"/{index}?delay_ms={index * 3}", headers=(("traceparent", VALID),) if index % 2 else ())
        for index in range(40)
    ]
    assert {each.status for each in connection.exchange(requests)} == {200}
    connection.close()
    traces = [each.trace for each in stage.exchanges(40, ONE_TURN)]
    assert len({exchange_of(trace).span_id for trace in traces}) == 40
    continued = [trace for trace in traces if trace.trace_id == TRACE_ID]
    assert [trace.server.parent_span_id for trace in continued] == [PARENT_ID] * 20
    # The snippet makes both of $request_id.
    begun = [trace for trace in traces if trace.trace_id != TRACE_ID]
    assert [exchange_of(trace).span_id for trace in begun] == [trace.trace_id[:16] for trace in begun]


def _to_gateways() -> str:
    line = "@P@_param QUERY_STRING $query_string; @P@_param REQUEST_METHOD $request_method;"
    line += "@P@_param HTTP_TRACEPARENT $traceparent; @P@_param HTTP_TRACESTATE $tracestate if_not_empty;"
    line += "@P@_param SERVER_NAME n; @P@_param SERVER_PORT 1; @P@_param SERVER_PROTOCOL $server_protocol;"
    line += "@P@_param REQUEST_URI $request_uri; @P@_param PATH_INFO $uri; @P@_param CONTENT_LENGTH $content_length;"
    return "\n".join(f"location /@P@ {{ @P@_pass @{each.upper()}@; {line} }}".replace("@P@", each) for each in GATEWAYS)


@pytest.mark.parametrize("protocol", GATEWAYS)
@pytest.mark.nginx(server=_to_gateways())
def test_gateways(stage: Stage, protocol: str) -> None:
    with stage.connect() as connection:
        answers = [
            Told.by(connection.request(f"/{protocol}?echo=1", headers=headers))
            for headers in ({}, {"traceparent": VALID, "tracestate": "one=1"}, {"traceparent": "nonsense"})
        ]
    assert [told.state for told in answers] == [[], ["one=1"], []]
    for each, told in zip(stage.exchanges(3), answers, strict=True):
        assert adopted(each, told)


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@; server @OTHER@; }",
    server="location / { proxy_pass http://@NAME@; proxy_next_upstream http_503; }",
)
def test_several_attempts(stage: Stage) -> None:
    """All were told the same id: the last one has it, the first has another."""
    assert stage.get("/?status=503").status == 503
    trace = stage.exchange().trace
    first, last = trace.named("upstream exchange")
    assert trace.trace_id.startswith(last.span_id)
    assert first.span_id != last.span_id


@pytest.mark.nginx(
    server="""
    location / { auth_request /auth; proxy_pass http://@UP@; }
    location /static { auth_request /auth; alias @HTML@/hello.txt; }
    location = /auth { internal; proxy_pass http://@OTHER@/?status=204; proxy_pass_request_body off; }
    """
)
def test_subrequests(stage: Stage) -> None:
    """The request's own exchange comes before its subrequest's, which was told the same; alone that one has it."""
    told = Told.by(stage.get(ECHO))
    assert stage.get("/static").status == 200
    both, alone = (each.trace for each in stage.exchanges(2))
    auth, own = sorted(both.named("upstream exchange"), key=lambda span: "nginx.subrequest.uri" not in span.attributes)
    assert (both.trace_id, own.span_id) == (told.trace_id, told.span_id)
    assert auth.span_id != told.span_id
    assert alone.trace_id.startswith(exchange_of(alone).span_id)


@pytest.mark.nginx(
    server=f"""
    location /static {{ alias @HTML@/hello.txt; }}
    location /dead {{ proxy_pass http://@DEAD1@; }}
    location /passed {{ proxy_pass http://@UP@; proxy_set_header X-Other other; }}
    location /nonsense {{ proxy_pass http://@UP@; proxy_set_header traceparent nonsense; }}
    location /removed {{ proxy_pass http://@UP@; proxy_set_header traceparent ""; }}
    location /another {{ proxy_pass http://@UP@; proxy_set_header traceparent 00-{OTHER_ID}-{OTHER_SPAN}-01; }}
    """
)
def test_nothing_to_adopt(stage: Stage) -> None:
    """No upstream, none reached, the client's own or no valid one sent: the client's trace goes on, or one begins."""
    targets = ("/static", "/dead", "/passed", "/nonsense", "/removed")
    for target in targets:
        stage.get(target, headers={"traceparent": VALID})
        stage.get(target)
    assert stage.get("/another").status == stage.get("/another", headers={"traceparent": VALID}).status == 200
    exchanges = stage.exchanges(2 * len(targets) + 2)
    continued, begun = exchanges[: 2 * len(targets) : 2], exchanges[1 : 2 * len(targets) : 2]
    for each in continued:
        assert check_context(each.trace, Context()) == [], each.log["request_uri"]
        assert all(span.span_id != PARENT_ID for span in each.trace.spans)
    for each in begun:
        assert check_context(each.trace, None) == [], each.log["request_uri"]
    # A trace of nginx's own: its application is in that one, so we are.
    for each in exchanges[-2:]:
        assert (each.trace.trace_id, exchange_of(each.trace).span_id) == (OTHER_ID, OTHER_SPAN)
        assert each.trace.server.parent_span_id is None


def test_snippet_for_a_part_of_the_traces(
    public_directory: Path, upstream_addresses: dict[str, str], tmp_path: Path
) -> None:
    """By the rule that the snippet names, nginx tells the application what the sampler decides."""
    text = SNIPPET.read_text()
    (rule,) = re.findall(r"with: (\{.*\})", text)
    every = "map $request_id $traceparent_sampled { default 01; }"
    assert every in text
    prefix = public_directory / "part"
    prefix.mkdir()
    (port,) = free_ports(1)
    location = f"location / {{ proxy_pass http://{upstream_addresses['ipv4']}; }}"
    server = f"server {{ listen 127.0.0.1:{port}; keepalive_requests 1000; {location} }}"
    nginx = NginxServer(prefix, text.replace(every, every.replace("{ default 01; }", rule)) + server)
    nginx.start([("127.0.0.1", port)])
    environment = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.0625"}
    agent = AgentProcess(nginx.pid, tmp_path, environment={**AGENT_ENVIRONMENT, **environment})
    try:
        with Http1Connection(("127.0.0.1", port)) as connection:
            answers = [Told.by(connection.request(ECHO)) for _ in range(500)]
            flags = [
                Told.by(connection.request(ECHO, headers={"traceparent": VALID[:-1] + flag})).flags for flag in "01"
            ]
    finally:
        agent.stop()
        nginx.stop()
    wanted = {told.trace_id for told in answers if told.flags}
    assert 0 < len(wanted) < 500 / 4
    assert flags == [0, 1]
    assert {trace.trace_id for trace in agent.traces} == {*wanted, TRACE_ID}
    assert len(agent.traces) == len(wanted) + 1

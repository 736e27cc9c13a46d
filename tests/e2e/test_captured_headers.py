"""Captured headers: what the client sent and what nginx answered, as the client itself and nginx's log know them."""

import json
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from e2e.agent_process import PROGRAM, Trace
from e2e.http1_client import request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import BUILD, nginx_version, parse_log_line
from e2e.recorded_requests import RecordedNginx
from e2e.stage import FILES, Exchange, Site, Stage
from e2e.timing import ONE_TURN, Slack

REQUEST = "http.request.header."
RESPONSE = "http.response.header."
OF_REQUESTS = (
    "host",
    "x-tenant",
    "accept-language",
    "x-session-token",
    "authorization",
    "cookie",
    "x-" + "long-name-" * 5,
)
OF_RESPONSES = (
    *("content-type", "content-length", "last-modified", "location", "etag", "cache-control", "x-answer", "set-cookie"),
    *("server", "www-authenticate"),
)
CUT_AT_BYTES = 1024
SECRET = "swordfish"
ANY = "http.*.header.*"
"""Stands for headers that are missing and whose names are not known."""

AGENT_ENVIRONMENT = {
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST": ",".join(OF_REQUESTS).title(),
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_RESPONSE": ",".join(OF_RESPONSES),
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SANITIZE_FIELDS": "x-session",
}

REDACTED = ("x-session-token", "authorization", "cookie", "set-cookie")
LOGGED = {
    **{REQUEST + name: "http_" + name.replace("-", "_") for name in OF_REQUESTS if name not in REDACTED},
    **{RESPONSE + name: "sent_http_" + name.replace("-", "_") for name in OF_RESPONSES if name not in REDACTED},
}
MODULES = [
    Path(f"/usr/lib/nginx/modules/{name}_module.so")
    for name in ("ndk_http", "ngx_http_lua", "ngx_http_headers_more_filter")
]
HAS_MODULES = BUILD is None and all(path.exists() for path in MODULES)
SITE_MAIN = "\n".join(f"load_module {path};" for path in MODULES if HAS_MODULES)
SITE_HTTP = f"""
    log_format headers escape=json '{json.dumps({name: f"${variable}" for name, variable in LOGGED.items()})}';
    large_client_header_buffers 8 32k;
    default_type text/plain;
"""
debians = pytest.mark.skipif(not HAS_MODULES, reason="needs Debian's nginx and its module packages: run `make test`")


missed: list[int] = []
"""How many headers the kernel program counts as missing, by the tests that make it miss some."""


@dataclass(frozen=True)
class Captured:
    """The captured headers of a request, and the names of the incomplete ones."""

    headers: dict[str, list[str]]
    cut: list[str]
    exchange: Exchange


def captured(stage: Stage, count: int = 1, slack: Slack = Slack()) -> list[Captured]:  # noqa: B008
    """Returns what the traces of all requests say, compared with what nginx logged."""
    found = []
    exchanges = stage.exchanges(count, slack)
    name = stage.log.path.with_suffix(".headers").name
    logged = (stage.site.prefix / "logs" / name).read_bytes().splitlines()
    assert len(logged) == count
    for exchange, line in zip(exchanges, logged, strict=True):
        attributes = exchange.trace.server.attributes
        headers = {name: value for name, value in attributes.items() if ".header." in name}
        cut = attributes.get("nginx.truncated_attributes", [])
        check_log(headers, cut, parse_log_line(line))
        found.append(Captured(headers, cut, exchange))
    return found


def check_log(headers: dict[str, list[str]], cut: list[str], logged: dict[str, str]) -> None:
    if ANY in cut:
        return
    for name, value in logged.items():
        values = headers.get(name, [])
        # Since 1.23 nginx logs all headers of a name.
        text = ", ".join(values) if nginx_version() >= (1, 23) else "".join(values[:1])
        if name not in cut:
            assert text == value, name
        elif name in headers:
            assert value.startswith(text), name


def server(text: str) -> dict[str, Any]:
    return {"server": f"access_log logs/@NAME@.headers headers; {text}"}


def names(headers: dict[str, list[str]]) -> set[str]:
    return {name.removeprefix(REQUEST) for name in headers if name.startswith(REQUEST)}


@pytest.mark.nginx(**server("location / { return 200 text; }"))
def test_what_the_client_sent(stage: Stage) -> None:
    long_name = OF_REQUESTS[-1]
    head = [
        "GET / HTTP/1.1",
        "x-TENANT: first",
        "Host: localhost",
        "X-Tenant:    second, with spaces  ",
        "X-Other: not chosen",
        "X-Tenants: a longer name",
        "Accept-Language:",
        f"{long_name}: long",
        f"{long_name}r: another",
        "X_Tenant: with an underscore, which nginx drops",
        "",
        "",
    ]
    connection = stage.connect()
    connection.send("\r\n".join(head).encode())
    assert connection.read_response().status == 200
    assert connection.request("/again").status == 200
    first, second = captured(stage, 2)
    assert {name: value for name, value in first.headers.items() if name.startswith(REQUEST)} == {
        REQUEST + "host": ["localhost"],
        REQUEST + "x-tenant": ["first", "second, with spaces"],
        REQUEST + "accept-language": [""],
        REQUEST + long_name: ["long"],
    }
    assert names(second.headers) == {"host"}
    assert first.cut == second.cut == []
    assert first.headers[RESPONSE + "content-type"] == ["text/plain"]
    assert first.headers[RESPONSE + "content-length"] == ["4"]


@pytest.mark.nginx(**server(f"location / {{ add_header Set-Cookie 'id={SECRET}'; return 200 text; }}"))
def test_secrets_are_redacted(stage: Stage) -> None:
    headers = {"Authorization": f"Basic {SECRET}", "Cookie": f"id={SECRET}", "X-Session-Token": SECRET, "X-Tenant": "a"}
    assert SECRET in stage.get("/", headers=headers).headers["set-cookie"]
    (found,) = captured(stage)
    redacted = {name: value for name, value in found.headers.items() if value == ["REDACTED"]}
    assert set(redacted) == {
        *(REQUEST + name for name in ("authorization", "cookie", "x-session-token")),
        RESPONSE + "set-cookie",
    }
    assert found.headers[REQUEST + "x-tenant"] == ["a"]
    assert SECRET not in repr(found.exchange.trace)


@pytest.mark.nginx(**server("location / { return 200 text; }"))
def test_long_values_and_headers_behind_many_bytes(stage: Stage) -> None:
    """The last headers are in other buffers of nginx than the first: 64 KB of headers lie between them."""
    fillers = {f"X-Filler-{index}": "f" * 16_000 for index in range(4)}
    whole, longer = "w" * CUT_AT_BYTES, "l" * (CUT_AT_BYTES + 1)
    connection = stage.connect()
    assert connection.request("/", headers={"X-Tenant": whole, **fillers, "Accept-Language": "de"}).status == 200
    assert connection.request("/", headers={"X-Tenant": longer, "Accept-Language": "x" * 20_000}).status == 200
    first, second = captured(stage, 2)
    assert first.headers[REQUEST + "x-tenant"] == [whole]
    assert first.headers[REQUEST + "accept-language"] == ["de"]
    assert first.cut == []
    assert second.headers[REQUEST + "x-tenant"] == [longer[:-1]]
    assert second.headers[REQUEST + "accept-language"] == ["x" * CUT_AT_BYTES]
    assert second.cut == [REQUEST + "x-tenant", REQUEST + "accept-language"]


@pytest.mark.nginx(**server("location / { return 200 text; }"))
def test_bytes_that_are_not_text(stage: Stage) -> None:
    connection = stage.connect()
    connection.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Tenant: \xff\xfe\xc3\xa4 \x01\r\n\r\n")
    assert connection.read_response().status == 200
    (found,) = captured(stage)
    assert found.headers[REQUEST + "x-tenant"] == ["\\xff\\xfeä \x01"]


@pytest.mark.nginx(**server("location / { return 200 text; }"))
def test_more_headers_than_are_read(stage: Stage) -> None:
    """What is missing is counted and marked."""
    connection = stage.connect()
    for count, name in ((40, "X-Tenant"), (170, "X-Other")):
        head = "".join(f"{name}: {index}\r\n" for index in range(count))
        connection.send(f"GET / HTTP/1.1\r\nHost: localhost\r\n{head}Accept-Language: de\r\n\r\n".encode())
        assert connection.read_response().status == 200
    wanted, others = captured(stage, 2)
    assert wanted.headers[REQUEST + "x-tenant"] == [str(index) for index in range(30)]
    assert names(others.headers) == {"host"}
    for each in (wanted, others):
        assert each.cut == [ANY]
    missed.extend((1, 1))


@pytest.mark.nginx(**server("location / { return 200 text; }"))
def test_more_values_than_fit(stage: Stage) -> None:
    connection = stage.connect()
    head = "".join(f"X-Tenant: {index:04}{'v' * 996}\r\n" for index in range(20))
    connection.send(f"GET / HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
    assert connection.read_response().status == 200
    (found,) = captured(stage)
    values = found.headers[REQUEST + "x-tenant"]
    assert [value[:4] for value in values] == [f"{index:04}" for index in range(len(values))]
    assert {len(value) for value in values} == {1000}
    assert 8 <= len(values) < 20
    assert found.cut == [ANY]
    missed.append(20 - len(values) + 2)  # the response's type and length have no room, either


@pytest.mark.nginx(
    **server(
        """
        location /file/ { alias @HTML@/; charset utf-8; add_header X-Answer one; add_header X-Answer two; }
        location /moved { return 301 /elsewhere?q=1; }
        location /away { return 302 https://example.com/; }
        location /refused { auth_basic realm; auth_basic_user_file @PREFIX@/nginx.conf; }
        location /hidden { return 204; add_header X-Answer never; add_header Cache-Control no-store always; }
        location /peer { proxy_pass http://@UP@; proxy_hide_header X-Hidden; }
        """
    )
)
def test_what_nginx_answered(stage: Stage) -> None:
    peer = "/peer?header=X-Answer:from%20the%20peer&header=Cache-Control:max-age=1&header=Set-Cookie:a=b&bytes=7"
    targets = ["/file/hello.txt", "/moved", "/away", "/refused", "/hidden", peer, f"{peer}&chunked=1", "/none"]
    connection = stage.connect()
    answers = {}
    for target in targets:
        answers[target] = connection.request(target)
        if answers[target].headers.get("connection") == "close":
            connection = stage.connect()
    found = captured(stage, len(targets), ONE_TURN)
    for (target, answer), each in zip(answers.items(), found, strict=True):
        for name in OF_RESPONSES:
            got = each.headers.get(RESPONSE + name)
            if name == "server":  # nginx makes it when it sends the response, and keeps it nowhere
                assert got is None
            elif name == "set-cookie" and name in answer.headers:
                assert got == ["REDACTED"]
            else:
                assert (got[-1] if got else None) == answer.headers.get(name), f"{target}: {name}"
        assert each.cut == []
    assert found[0].headers[RESPONSE + "x-answer"] == ["one", "two"]
    assert found[0].headers[RESPONSE + "content-type"] == ["text/plain; charset=utf-8"]
    assert answers["/file/hello.txt"].body == FILES["hello.txt"]


@pytest.mark.nginx(
    **server(
        """
        add_header X-Answer never always;
        location / { proxy_pass http://@UP@; }
        location /acts { proxy_pass http://@UP@; post_action /after; }
        location /after { proxy_pass http://@UP@?header=X-Answer:after; }
        """
    )
)
def test_what_was_not_sent(stage: Stage) -> None:
    """A client that leaves gets no response; a post_action's response goes to nobody."""
    connection = stage.connect()
    connection.send(request_bytes("GET", "/?delay_ms=300", {"X-Tenant": "gone"}))
    connection.close()
    stage.lines(1)
    assert stage.get("/acts", headers={"X-Tenant": "here"}).status == 200
    for exchange in stage.exchanges(2, replace(ONE_TURN, write_early=True, end_early=True)):
        headers = exchange.trace.server.attributes
        assert {name for name in headers if name.startswith(RESPONSE)} == set()
        assert names(headers) == {"host", "x-tenant"}


@pytest.mark.nginx(**server("location / { return 200 text; add_header X-Answer never; }"))
def test_http_0_9_and_a_bad_request(stage: Stage) -> None:
    connection = stage.connect()
    connection.send(b"GET /\r\n")
    assert connection.read_until_closed() == b"text"
    connection = stage.connect()
    connection.send(b"GET / HTTP/1.1\r\nX-Tenant: a\r\nbad header\0\r\n\r\n")
    assert connection.read_response().status == 400
    connection.close()
    old, bad = (each.trace.server.attributes for each in stage.exchanges(2))
    assert {name for name in old if ".header." in name} == set()
    assert bad[REQUEST + "x-tenant"] == ["a"]
    assert bad[RESPONSE + "content-type"] == ["text/html"]


BY_MODULES = """
    more_set_input_headers 'X-Tenant: replaced' 'X-Session-Token: made up';
    more_set_headers 'X-Answer: set' 'Content-Type: text/x-b';
    location / {
        header_filter_by_lua_block {
            ngx.header["Cache-Control"] = "no-store"
            ngx.header["Cache-Control"] = nil
            ngx.header["ETag"] = {"a", "b"}
        }
        access_by_lua_block { ngx.req.set_header("Accept-Language", "replaced") }
        return 200 text;
    }
"""


@debians
@pytest.mark.nginx(**server(BY_MODULES if HAS_MODULES else ""))
def test_headers_that_modules_replaced(stage: Stage) -> None:
    """Of the request what the client sent; of the response what nginx sent."""
    headers = {"X-Tenant": "sent", "Accept-Language": "de"}
    response = stage.get("/", headers=headers)
    assert response.headers["x-answer"] == "set"
    assert "cache-control" not in response.headers
    attributes = stage.exchange().trace.server.attributes
    sent = {name: value for name, value in attributes.items() if name.startswith(REQUEST)}
    assert sent == {
        REQUEST + "host": ["localhost"],
        REQUEST + "x-tenant": ["sent"],
        REQUEST + "accept-language": ["de"],
    }
    assert attributes[RESPONSE + "x-answer"] == ["set"]
    assert attributes[RESPONSE + "content-type"] == ["text/x-b"]
    assert attributes[RESPONSE + "etag"] == ["b"]
    assert RESPONSE + "cache-control" not in attributes


HTTP_2 = {"listen": "listen @LISTEN@ ssl http2; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"}


@pytest.mark.nginx(**HTTP_2, **server("location / { proxy_pass http://@UP@; add_header X-Answer $http_x_tenant; }"))
def test_http2_with_many_streams(stage: Stage) -> None:
    client = Http2Connection(stage.addresses["ipv4"], tls=True)
    count = 100
    responses = client.start(
        [
            Http2Request(
                f"/{index}?delay_ms=50",
                headers=(
                    ("x-tenant", f"tenant {index}"),
                    ("x-tenant", f"again {index}"),
                    ("authorization", SECRET),
                    ("cookie", SECRET),
                    ("cookie", "b=c"),
                    *((("accept-language", "ä" * index),) if index % 2 else ()),
                ),
            )
            for index in range(count)
        ]
    )
    assert len(responses) == count
    answers = client.finish()
    client.close()
    assert {each.status for each in answers} == {200}
    for each in captured(stage, count, ONE_TURN):
        index = int(each.exchange.log["uri"].removeprefix("/"))
        expected = {
            REQUEST + "host": ["localhost"],  # the client's :authority
            REQUEST + "x-tenant": [f"tenant {index}", f"again {index}"],
            REQUEST + "authorization": ["REDACTED"],
            REQUEST + "cookie": ["REDACTED"],
        }
        if index % 2:
            expected[REQUEST + "accept-language"] = ["ä" * index]
        assert {name: value for name, value in each.headers.items() if name.startswith(REQUEST)} == expected
        assert each.headers[RESPONSE + "x-answer"][0].startswith(f"tenant {index}")
        assert each.headers[RESPONSE + "content-length"] == ["5"]
        assert SECRET not in repr(each.exchange.trace)


def test_a_capture_file_has_no_secrets_and_replays(public_directory: Path) -> None:
    http = "server { listen @0@; location / { add_header Set-Cookie 'cookie=secret'; return 200 text; } }"
    options = ["--capture-request-headers", "X-Tenant,Authorization,cookie", "--capture-response-headers=set-cookie"]
    nginx = RecordedNginx(public_directory / "recorded", http, {}, options=options)
    try:
        nginx.get("/a", headers={"X-Tenant": "one"})
        nginx.request("/a")  # looks for the secrets, too
    finally:
        nginx.stop()
    replay = [PROGRAM, "replay", nginx.capture, "--exporter", "json"]
    (trace,) = map(Trace.parse, subprocess.run(replay, capture_output=True, check=True).stdout.splitlines())
    assert {name: value for name, value in trace.server.attributes.items() if ".header." in name} == {
        REQUEST + "x-tenant": ["one"],
        REQUEST + "authorization": ["REDACTED"],
        REQUEST + "cookie": ["REDACTED"],
        RESPONSE + "set-cookie": ["REDACTED"],
    }


def test_what_is_missing_is_counted(site: Site) -> None:
    """The last test of the file, as it stops the agent."""
    site.stop_agent()
    counted = re.findall(r"partial_captured_headers (\d+)", site.agent.stderr())
    assert sum(map(int, counted)) == sum(missed)

"""Requests that try to harm readers of traces, and requests with secrets: one capture of them, in every exporter."""

import html
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from collector.process import collected, official

from e2e.agent_process import PROGRAM, AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until

# Of what is longer the rest is left out.
URI_BYTES_MAX, USER_AGENT_BYTES_MAX = 4096, 1024

# Never captured, not even in the file that `record` writes.
SECRET = b"s3cr3t-of-a-header"
SECRETS = [
    b"Authorization: Bearer " + SECRET,
    b"Proxy-Authorization: Basic " + SECRET,
    b"Cookie: session=" + SECRET,
    b"X-Api-Key: " + SECRET,
    b"Content-Length: %d" % len(SECRET),
]
# In URIs, which a capture file holds as they came; redacted by what makes spans of them.
KEY = b"s3cr3t-of-a-query"
SENSITIVE = [b"AWSAccessKeyId", b"Signature", b"sig", b"X-Goog-Signature"]
SENSITIVE += [b"X-Amz-Signature", b"X-Amz-Credential", b"X-Amz-Security-Token"]

TERMINAL = b"\x1b[2J\x1b]0;owned\x07\x1b[31mred \x9b31m\x08\x7f"
INVISIBLE = "\u202egnp.exe\u2066 \u200b\ufeff\u2028\u0085".encode()
NOT_UTF8 = b"\xff\xfe\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80"
PROTOBUF = bytes(byte for byte in range(0x21, 0x100) if byte not in b"\x7f?#%")
SCRIPT = b"<script>hostile()</script>"
FORGED_LINE = b'/a,127.0.0.1:1=>-,%20/b,%20200%0a1,"x":{"y":1}'

# Request targets and User-Agent headers. nginx itself refuses control characters in targets, with 400.
REQUESTS: list[tuple[bytes, bytes]] = [
    (b"/terminal" + TERMINAL, b"refused"),
    (b"/user-agent", TERMINAL),
    (b"/invisible/" + INVISIBLE.replace(b" ", b""), INVISIBLE),
    (b"/utf8/" + NOT_UTF8 + b"?" + NOT_UTF8, NOT_UTF8),
    (b"/bytes/" + PROTOBUF, b"\x0b\xff\xff\xff\xff\x0f" + PROTOBUF + bytes(range(1, 9))),
    (FORGED_LINE, b'", "forged": true}'),
    (b"/%0a%0d%1b[31m/a..%2f?%00=%1b", b"%s%n%x{0.__class__}${jndi:ldap://x}[link](x)[red]"),
    (b"/'\"><!--" + SCRIPT, b"</script>'\"><img/src=x/onerror=hostile()>" + SCRIPT),
    (b"/long/" + b"\xe2\x82\xac" * 20_000, b"\x1b" * 60_000),
    (b"/long?" + b"q" * 60_000, b"\xf0\x9f\x92\xa9" * 15_000),
    (b"/app?" + b"&".join(name + b"=" + KEY for name in SENSITIVE) + b"&kept=1", b"a client with secrets"),
]

NGINX_HTTP = """
    large_client_header_buffers 8 128k;
    server {
        listen 127.0.0.1:@LISTEN@;
        access_log logs/all.log json;
        location / { return 404; }
        location /app { proxy_pass http://@UP@; }
    }
"""

COLLECTOR = """\
receivers:
  otlp:
    protocols:
      grpc: { endpoint: "127.0.0.1:@GRPC@" }
      http: { endpoint: "127.0.0.1:@HTTP@" }
exporters:
  file: { path: "@OUTPUT@", format: proto, flush_interval: 50ms }
service:
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [file] }
"""


@dataclass(frozen=True)
class Recorded:
    """What the kernel program made of the requests, and what nginx says of them."""

    capture: Path
    lines: list[LogLine]
    stderr: str

    def replayed(self, exporter: str, *options: str, **environment: str) -> bytes:
        done = subprocess.run(
            [PROGRAM, "replay", self.capture, "--exporter", exporter, *options],
            capture_output=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "160", **environment},
        )
        assert done.returncode == 0
        assert f"received {len(self.lines)}, exported {len(self.lines)}, lost 0".encode() in done.stderr
        assert done.stderr.decode().replace("\n", "").isprintable()
        return done.stdout

    def report(self, page: Path) -> bytes:
        subprocess.run([PROGRAM, "report", self.capture, "-o", page], capture_output=True, check=True)
        return page.read_bytes()


def raw_request(target: bytes, user_agent: bytes) -> bytes:
    headers = [b"Host: localhost", b"Connection: close", b"User-Agent: " + user_agent]
    headers += [b"tracestate: a=\x1b[31m", b"traceparent: 00-\x1b"]
    method = b"POST" if target.startswith(b"/app") else b"GET"
    if method == b"POST":
        headers += SECRETS
    body = SECRET if method == b"POST" else b""
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *headers, b"", body])


@pytest.fixture(scope="module")
def recorded(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Recorded]:
    directory = public_directory / "hostile"
    directory.mkdir()
    (port,) = free_ports(1)
    http = NGINX_HTTP.replace("@LISTEN@", str(port)).replace("@UP@", upstream_addresses["ipv4"])
    nginx = NginxServer(directory, http)
    capture = directory / "hostile.capture"
    log = AccessLog(directory / "logs" / "all.log")
    try:
        nginx.start([("127.0.0.1", port)])
        # What is sent upstream is looked at, too.
        command = ["record", "--pid", str(nginx.pid), "-o", capture, "--adopt-upstream-context"]
        agent = AgentProcess(nginx.pid, directory, command, {"OTEL_PROPAGATORS": "tracecontext,b3,b3multi,xrequestid"})
        try:
            for target, user_agent in REQUESTS:
                with Http1Connection(("127.0.0.1", port)) as connection:
                    connection.send(raw_request(target, user_agent))
                    assert connection.read_until_closed().startswith(b"HTTP/1.1 ")
            wait_until(lambda: len(log.poll()) == len(REQUESTS), "nginx's log lines")
        finally:
            agent.stop()
        yield Recorded(capture, log.lines, agent.stderr())
    finally:
        nginx.stop()
    assert nginx.problems() == []


def facts(trace: Trace) -> tuple[Any, ...]:
    """What is of the request; ids and resources are of the replay."""
    return tuple((span.name, span.kind, span.start_unix_ns, sorted(span.attributes.items())) for span in trace.spans)


def test_the_requests_came_as_they_were_sent(recorded: Recorded) -> None:
    """Their harm reached nginx, and all were recorded."""
    assert [line["status"] for line in recorded.lines] == ["400", *["404"] * 9, "200"]
    assert recorded.lines[1]["http_user_agent"] == TERMINAL.decode("utf-8", "backslashreplace")
    assert len(recorded.lines[8]["http_user_agent"]) == 60_000
    assert f"received {len(REQUESTS)}, exported {len(REQUESTS)}, lost 0" in recorded.stderr
    assert recorded.stderr.replace("\n", "").isprintable()


def test_json_says_what_nginx_logged(recorded: Recorded) -> None:
    output = recorded.replayed("json")
    assert output.decode("ascii").replace("\n", "").isprintable()
    traces = [Trace.parse(line) for line in output.splitlines()]
    assert len(traces) == len(recorded.lines)
    for trace, line in zip(traces[1:-1], recorded.lines[1:-1], strict=True):
        attributes = trace.server.attributes
        query = attributes.get("url.query")
        target = attributes["url.path"] + ("" if query is None else f"?{query}")
        cut = attributes.get("nginx.truncated_attributes", ())
        for told, logged, names, bytes_max in (
            (target, line["request_uri"], {"url.path", "url.query"}, URI_BYTES_MAX),
            (attributes["user_agent.original"], line["http_user_agent"], {"user_agent.original"}, USER_AGENT_BYTES_MAX),
        ):
            if names & set(cut):
                # A character that the cut went through shows as its bytes.
                whole = re.sub(r"(\\x[0-9a-f]{2}){1,3}$", "", told)
                assert logged.startswith(whole)
                assert len(whole.encode()) >= bytes_max - 3
            else:
                assert told == logged


@pytest.mark.parametrize("color", ["never", "always"])
def test_the_terminal_gets_nothing_but_text_and_colours(recorded: Recorded, color: str) -> None:
    text = recorded.replayed("console", "--color", color, TERM="xterm-256color").decode()
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert bool(colours.search(text)) == (color == "always")
    assert colours.sub("", text).replace("\n", "").isprintable()


def test_a_request_is_one_line(recorded: Recorded) -> None:
    lines = recorded.replayed("line").decode().splitlines()
    assert len(lines) == len(recorded.lines)
    for line, logged in zip(lines, recorded.lines, strict=True):
        assert line.isprintable()
        fields = line.split(", ")
        assert len(fields) == 15
        assert fields[3] == logged["status"]
        assert fields[4] == f"request_size={logged['request_length']}"


def test_a_page_of_it_has_one_script(recorded: Recorded, tmp_path: Path) -> None:
    """The page's own; tests/unit/analysis/test_report.py says more."""
    page = recorded.report(tmp_path / "report.html").decode()
    assert SCRIPT.decode() not in page
    assert html.escape(SCRIPT.decode()) in page
    assert page.lower().count("<script") == 1
    assert page.replace("\n", "").isprintable()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_official_collector_understands_it(recorded: Recorded, protocol: str, tmp_path: Path) -> None:
    ports = dict(zip(("GRPC", "HTTP"), free_ports(2), strict=True))
    output = tmp_path / "collected.bin"
    config = COLLECTOR.replace("@OUTPUT@", str(output))
    for name, port in ports.items():
        config = config.replace(f"@{name}@", str(port))
    collector = official(config, ports.values(), tmp_path)
    try:
        endpoint = f"http://127.0.0.1:{ports['GRPC' if protocol == 'grpc' else 'HTTP']}"
        recorded.replayed("otlp", "--otlp-protocol", protocol, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
        wait_until(lambda: len(collected(output, bool)) == len(recorded.lines), "the collector's file")
    finally:
        collector.stop()
    by_json = [Trace.parse(line) for line in recorded.replayed("json").splitlines()]
    assert sorted(map(facts, collected(output, bool))) == sorted(map(facts, by_json))


def test_secrets_are_in_nothing(recorded: Recorded, tmp_path: Path) -> None:
    capture = recorded.capture.read_bytes()
    assert KEY in capture, "the request with the secrets was recorded"
    assert SECRET not in capture
    for exporter in ("console", "line", "json"):
        output = recorded.replayed(exporter)
        assert b"REDACTED" in output or exporter == "console"
        assert SECRET not in output
        assert KEY not in output
    report = recorded.report(tmp_path / "report.html")
    assert b"REDACTED" in report
    assert SECRET not in report
    assert KEY not in report
    (server,) = [
        span["attributes"]
        for line in recorded.replayed("json").splitlines()
        for span in json.loads(line)["spans"]
        if span["attributes"].get("url.path") == "/app"
    ]
    assert server["url.query"] == "&".join(f"{name.decode()}=REDACTED" for name in SENSITIVE) + "&kept=1"
    for exporter in ("console", "line", "json"):
        output = recorded.replayed(exporter, "--no-query")
        assert b"kept=1" not in output
        assert b"REDACTED" not in output
        assert b"qqqq" not in output

"""The probe that marks when a request begins: detached while no request needs it, attached again when needed."""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import wait_until
from e2e.scenario import BEGINNINGS
from e2e.stage import Stage
from e2e.timing import Slack

READ_WRITE = ["downstream read", "downstream write"]
NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
AGENT_ENVIRONMENT = {"OTEL_NGINX_EBPF_TEST_QUIET": "100 0.5"}
COARSE = Slack(early_max_ms=20, median_max_ms=20)
"""Some releases take ngx_current_msec from CLOCK_MONOTONIC_COARSE, which goes by the kernel's ticks."""
CLOSE = 3
"""The system call, on x86-64, which returns when no worker runs the probe any more."""
PLAIN_AND_TLS = (
    "listen @LISTEN@; listen @LISTEN_TLS@ ssl http2; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
)


def is_let_go(agent: AgentProcess) -> bool:
    """Whether it holds one probe less than it said to have attached, and is not about to give it back."""
    held = 0
    for descriptor in Path(f"/proc/{agent.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            held += "link_type:\tuprobe_multi" in descriptor.read_text()
    is_closing = Path(f"/proc/{agent.pid}/syscall").read_text().startswith(f"{CLOSE} ")
    return held < len(re.findall(r"ngx_\w+\+", agent.stderr())) and not is_closing


def let_go(stage: Stage, agent: AgentProcess) -> int:
    """Sends requests until it lets the probe go; how many."""
    count = 0

    def is_quiet() -> bool:
        nonlocal count
        count += 1
        return stage.get("/").status == 200 and is_let_go(agent)

    wait_until(is_quiet, "the probe to be let go")
    return count


@pytest.mark.nginx(listen=PLAIN_AND_TLS, server="location / { root @HTML@; } location /app { proxy_pass http://@UP@; }")
def test_https_brings_it_back(stage: Stage, tmp_path: Path) -> None:
    """A request on a connection whose handshake was over before, so that nothing announces it."""
    agent = AgentProcess(stage.site.nginx.pid, tmp_path, environment=AGENT_ENVIRONMENT)
    with stage.connect("tls", trusting_tls()) as connection:
        count = let_go(stage, agent)
        assert connection.request("/app?delay_ms=50").status == 200
        wait_until(lambda: not is_let_go(agent), "the probe to be back")
        assert connection.request("/hello.txt").status == 200
        assert connection.request("/app").status == 200
    exchanges = stage.match(stage.lines(count + 3), agent.poll, COARSE)
    agent.stop()
    assert "partial_beginning 1)" in agent.stderr()
    assert [each.trace.outline() for each in exchanges[:count]] == [READ_WRITE] * count
    first, *others = exchanges[count:]
    assert first.trace.outline() == NEW[1:3]
    assert first.trace.server.seconds > 0.05
    assert [each.trace.outline() for each in others] == [READ_WRITE, NEW]


@pytest.mark.nginx(listen=PLAIN_AND_TLS, server="location / { root @HTML@; } location /app { proxy_pass http://@UP@; }")
def test_handshake_brings_it_back(stage: Stage) -> None:
    agent = stage.site.agent
    count = let_go(stage, agent)
    with stage.connect("tls", trusting_tls()) as connection:
        wait_until(lambda: not is_let_go(agent), "the probe to be back")
        assert connection.request("/app").status == 200
    assert stage.exchanges(count + 1)[-1].trace.outline() == NEW


@pytest.mark.nginx(listen=PLAIN_AND_TLS, server="location / { root @HTML@; } location /app { proxy_pass http://@UP@; }")
def test_http2_brings_it_back(stage: Stage) -> None:
    """Streams share a socket: without the probe nothing tells whose what is."""
    agent = stage.site.agent
    connection = Http2Connection(stage.addresses["tls"], tls=True)
    count = let_go(stage, agent)
    assert [each.status for each in connection.exchange([Http2Request("/app"), Http2Request("/hello.txt")])] == [
        200
    ] * 2
    wait_until(lambda: not is_let_go(agent), "the probe to be back")
    assert [each.status for each in connection.exchange([Http2Request("/app")])] == [200]
    connection.close()
    exchanges = stage.match(stage.lines(count + 3)[:count], agent.poll)
    assert [each.trace.outline() for each in exchanges] == [READ_WRITE] * count

    def of_http2() -> list[Trace]:
        return [trace for trace in agent.poll() if trace.server.attributes["network.protocol.version"] == "2"]

    wait_until(lambda: len(of_http2()) >= 3, "the traces of HTTP/2")
    assert sorted(trace.outline() for trace in of_http2()) == [[], NEW, NEW[1:-1]]
    assert not any("nginx.upstream.attempts_lost" in trace.server.attributes for trace in of_http2())


@pytest.mark.nginx(
    listen="listen @LISTEN@; listen @LISTEN_BEHIND@ proxy_protocol;", server="location / { root @HTML@; }"
)
def test_proxy_protocol_brings_it_back(stage: Stage) -> None:
    """What introduces a client is read ahead of its first request, but not of its second."""
    agent = stage.site.agent
    count = let_go(stage, agent)
    with stage.connect("behind") as connection:
        connection.send_slowly([b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", request_bytes("GET", "/")], 0.2)
        assert connection.read_response().status == 200
        assert connection.request("/").status == 200
    wait_until(lambda: not is_let_go(agent), "the probe to be back")
    first, second = stage.exchanges(count + 2, COARSE)[count:]
    assert first.trace.outline() == []
    assert first.trace.server.seconds < 0.1
    assert second.trace.outline() == READ_WRITE


@pytest.mark.nginx(
    server="""location / { proxy_pass http://@UP@; }
    location /tunnel {
        proxy_pass http://@UP@;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection upgrade;
    }"""
)
def test_attached_without_it(stage: Stage, tmp_path: Path) -> None:
    """What began before is told from what began after, also on connections that are older than the agent."""
    with stage.connect() as old, stage.connect() as tunnel:
        assert old.request("/before").status == 200
        tunnel.send(request_bytes("GET", "/tunnel", {"Upgrade": "echo", "Connection": "Upgrade"}))
        assert tunnel.read_response().status == 101
        agent = AgentProcess(stage.site.nginx.pid, tmp_path, environment=BEGINNINGS["told"])
        assert is_let_go(agent)
        tunnel.send(b"ping")
        assert tunnel.socket.recv(10) == b"ping"
        tunnel.close()
        continued = request_bytes("POST", "/after", {"Expect": "100-continue", "Content-Length": "1000"})
        old.send_slowly([continued, b"b" * 1000], 0.2)
        assert old.read_response().status == 100
        assert old.read_response().status == 200
        assert old.request("/last").status == 200
    after = [line for line in stage.lines(4) if line["request_uri"] in ("/after", "/last")]
    exchanges = stage.match(after, agent.poll)
    agent.stop()
    assert len(agent.traces) == 2
    assert "began_before_attach 1" in agent.stderr()
    assert [each.trace.outline() for each in exchanges] == [NEW, NEW]
    assert exchanges[0].trace.named("downstream read")[0].seconds > 0.19
    stage.exchanges(4)

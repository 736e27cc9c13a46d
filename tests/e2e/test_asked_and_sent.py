"""What spans say that the client asked for, and that peers were sent: method, URL, host and protocol."""

import socket
from typing import Any

import pytest

from e2e.agent_process import Span
from e2e.http1_client import request_bytes
from e2e.stage import Stage
from e2e.timing import NO_SLACK, Slack

AGENT_ENVIRONMENT = {"OTEL_NGINX_EBPF_TRUSTED_PROXY": "127.0.0.2"}

ASKED = ("url.scheme", "server.address", "server.port")


def ask(stage: Stage, source: str, data: bytes) -> None:
    """Sends one request from this address, and waits until nginx closes the connection."""
    with socket.create_connection(stage.addresses["ipv4"], 10, (source, 0)) as connection:
        connection.sendall(data)
        while connection.recv(65536):
            pass


def clients(stage: Stage, count: int = 1, slack: Slack = NO_SLACK) -> list[Span]:
    return [span for each in stage.exchanges(count, slack) for span in each.trace.children if span.kind == "CLIENT"]


def picked(span: Span, *names: str) -> list[Any]:
    return [span.attributes.get(name) for name in names]


@pytest.mark.nginx(
    server="location /a/ { proxy_method PATCH; proxy_set_header Host asked.example:81;"
    "                proxy_pass http://@UP@/b?sig=1&a=; }"
    "location /named/ { proxy_http_version 1.1; proxy_set_header Host asked.example; proxy_pass http://@UP@; }"
    'location /hostless/ { proxy_set_header Host ""; proxy_pass http://@UP@; }'
)
def test_the_peer_was_sent_another_request(stage: Stage) -> None:
    for path in ("/a/x", "/named/x", "/hostless/x"):
        assert stage.get(path, "POST").status == 200
    moved, named, hostless = clients(stage, 3)
    sent = "http.request.method", "url.full", "server.address", "server.port", "network.protocol.version"
    peer = str(moved.attributes["nginx.upstream.peer"])
    host, _, port = peer.rpartition(":")
    url = "http://asked.example:81/b?sig=REDACTED&a=x"
    assert picked(moved, *sent) == ["PATCH", url, "asked.example", 81, "1.0"]
    assert picked(named, *sent) == ["POST", "http://asked.example/named/x", "asked.example", 80, "1.1"]
    assert picked(hostless, *sent) == ["POST", f"http://{peer}/hostless/x", host, int(port), "1.0"]
    for span in (moved, named, hostless):
        assert picked(span, "network.peer.address", "network.peer.port") == [host, int(port)]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@ max_fails=0; server @UP@ backup; }",
    server="location / { mirror /mirror; proxy_pass http://@NAME@; }"
    "location = /mirror { internal; proxy_method GET; proxy_pass http://@UP@; }",
)
def test_a_dead_peer_a_retry_and_a_subrequest(stage: Stage) -> None:
    assert stage.get("/x", "POST").status == 200
    spans = clients(stage)
    mirrored = [span for span in spans if "nginx.subrequest.uri" in span.attributes]
    dead, retried = (span for span in spans if span not in mirrored)
    assert (dead.name, dead.error, retried.name) == ("upstream connect", "ECONNREFUSED", "upstream exchange")
    names = "http.request.method", "http.request.resend_count"
    assert [picked(span, *names) for span in (dead, retried, *mirrored)] == [["POST", None], ["POST", 1], ["GET", None]]
    assert dead.attributes["url.full"] == retried.attributes["url.full"]
    for span in spans:
        assert str(span.attributes["url.full"]).startswith("http://")


@pytest.mark.nginx(
    server="location / { proxy_ssl_verify off; proxy_set_header Host tls.example; proxy_pass https://@UP_TLS@; }"
)
def test_tls(stage: Stage) -> None:
    assert stage.get("/x").status == 200
    (span,) = clients(stage, slack=Slack(first_byte_unseen=True))
    assert picked(span, "url.full", "server.address", "server.port") == ["https://tls.example/x", "tls.example", 443]


@pytest.mark.nginx(server="location / { return 200; }")
def test_the_target_in_absolute_form_wins_over_host(stage: Stage) -> None:
    headers = {"Host": "host.example", "Connection": "close"}
    ask(stage, "127.0.0.1", request_bytes("GET", "http://asked.example:82/a?b=c", headers))
    server = stage.exchange().trace.server
    assert picked(server, *ASKED, "url.path", "url.query") == ["http", "asked.example", 82, "/a", "b=c"]


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.nginx(server="set_real_ip_from 127.0.0.0/8; real_ip_header X-Real-IP; location / { return 200; }")
def test_only_a_trusted_proxy_is_believed(stage: Stage, source: str) -> None:
    """Whatever realip makes of the client's address."""
    port = stage.addresses["ipv4"][1]
    close = {"Host": "host.example", "Connection": "close", "X-Real-IP": "127.0.0.2"}
    ask(stage, source, request_bytes("GET", "/1", close | {"Forwarded": "proto=http, proto=https;host=shop.example"}))
    ask(stage, source, request_bytes("GET", "/2", close | {"X-Forwarded-Proto": "https"}))
    ask(stage, source, request_bytes("GET", "/3", close | {"X-Forwarded-Host": "shop.example:81"}))
    ask(stage, source, request_bytes("GET", "/4", close | {"Forwarded": "for=" + "a" * 600 + ";proto=https"}))
    servers = [each.trace.server for each in stage.exchanges(4)]
    direct = ["http", "host.example", port]
    told = [["https", "shop.example", 443], ["https", "host.example", 443], ["http", "shop.example", 81], direct]
    assert [picked(each, *ASKED) for each in servers] == ([direct] * 4 if source == "127.0.0.1" else told)
    assert {(each.attributes["client.address"], each.attributes["network.peer.address"]) for each in servers} == {
        ("127.0.0.2", source)
    }

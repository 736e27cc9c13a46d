"""TLS 1.3 early data: a request that arrives with the ClientHello, before the handshake is complete."""

import subprocess
from pathlib import Path

import pytest

from e2e.http1_client import request_bytes
from e2e.stage import Stage
from e2e.timing import Slack

READ_WRITE = ["downstream read", "downstream write"]
PROXIED = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]

TLS = {
    "listen": "listen @LISTEN@ ssl; ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
    " ssl_protocols TLSv1.3; ssl_early_data on;"
}


LINGERS = Slack(end_early=True)
"""Before it closes, nginx reads what the client still sends: here the handshake's end."""
EARLY = b"Early data was accepted"


def whole_request(method: str = "GET", body: bytes = b"") -> bytes:
    return request_bytes(method, "/", {"Connection": "close"}, body)


class EarlyClient:
    """openssl's, since Python's ssl has no early data. The first request fetches the session that later ones resume."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        host, port = stage.addresses["ipv4"]
        self._session = directory / "session.pem"
        self._early = directory / "early"
        self._command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-tls1_3", "-ign_eof"]
        assert b" 200 " in self._run(["-sess_out", str(self._session)], whole_request())

    def _run(self, arguments: list[str], data: bytes = b"") -> bytes:
        finished = subprocess.run([*self._command, *arguments], input=data, capture_output=True, timeout=20)
        return finished.stdout

    def request(self, early: bytes, later: bytes = b"") -> bytes:
        """The whole answer to a request that is sent with the ClientHello, and as far as `later`, after it."""
        self._early.write_bytes(early)
        return self._run(["-sess_in", str(self._session), "-early_data", str(self._early)], later)


@pytest.fixture
def client(stage: Stage, tmp_path: Path) -> EarlyClient:
    return EarlyClient(stage, tmp_path)


@pytest.mark.nginx(**TLS, server="location / { return 200 'short text'; }")
def test_early_request(stage: Stage, client: EarlyClient) -> None:
    for _ in range(3):
        assert EARLY in client.request(whole_request())
    for each in stage.exchanges(4, LINGERS):
        assert each.trace.outline() == READ_WRITE
        assert each.trace.server.attributes["url.scheme"] == "https"
        assert each.trace.server.seconds < 0.1
        assert 0 < each.trace.server.attributes["nginx.tls.handshake.duration_ns"] < 1e8


@pytest.mark.nginx(**TLS, server="location / { proxy_pass http://@UP@/?delay_ms=200; }")
def test_handshake_ends_while_the_upstream_works(stage: Stage, client: EarlyClient) -> None:
    """Its last messages are no part of the request."""
    assert EARLY in client.request(whole_request())
    first, early = stage.exchanges(2, LINGERS)
    for each in (first, early):
        assert each.trace.outline() == PROXIED
        assert each.trace.named("downstream read")[0].seconds < 0.1
        assert each.trace.named("downstream write")[0].seconds < 0.1
        assert each.trace.named("upstream exchange")[0].seconds > 0.199


@pytest.mark.nginx(**TLS, server="location / { proxy_pass http://@UP@; }")
def test_body_behind_the_early_header(stage: Stage, client: EarlyClient) -> None:
    whole = whole_request("POST", b"b" * 3000)
    assert EARLY in client.request(whole[:200], whole[200:])
    early = stage.exchanges(2, LINGERS)[1]
    assert early.trace.outline() == PROXIED
    read, connect = early.trace.named("downstream read")[0], early.trace.named("upstream connect")[0]
    assert read.end_unix_ns <= connect.start_unix_ns


@pytest.mark.nginx(**TLS, server="location / { proxy_pass http://@UP@; }")
def test_header_that_is_only_half_early(stage: Stage, client: EarlyClient) -> None:
    """nginx ends the handshake, with session tickets, while it waits for the rest."""
    whole = whole_request()
    assert EARLY in client.request(whole[:20], whole[20:])
    early = stage.exchanges(2, LINGERS)[1]
    assert early.trace.outline() == PROXIED

"""Provides an nginx whose requests are recorded and decoded, and a peer that keeps what it was sent."""

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from e2e.agent_process import EMPTY, AgentProcess
from e2e.http1_client import Http1Connection, Response, request_bytes
from e2e.nginx_server import NginxServer, free_ports, wait_until
from e2e.raw_upstream import RawUpstream
from otel_nginx_ebpf.traces.capture import CaptureError, read_capture
from otel_nginx_ebpf.traces.error_log import is_log_line
from otel_nginx_ebpf.traces.record import METHODS, Attempt, Request, decode

SECRETS = (b"Basic secret", b"cookie=secret", b"secret body")
"""What no record may have: values of headers, and a body."""


class KeepingPeer:
    """Keeps what each connection was sent first. Answers HTTP as the query asks (`status`, `accel`), else hangs up."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self._server = RawUpstream(self._serve)
        self.address = self._server.address
        self.stop = self._server.stop

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(0.3)
        received = b""
        with contextlib.suppress(TimeoutError):
            while b"\r\n\r\n" not in received and (data := connection.recv(1 << 18)):
                received += data
        self.sent.append(received)
        words = received.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1"):
            return
        query = parse_qs(urlsplit(words[1]).query)
        head = [f"HTTP/1.1 {query.get('status', ['200'])[0]} x", "Content-Length: 2", "Cache-Control: max-age=1"]
        head += [f"X-Accel-Redirect: {uri}" for uri in query.get("accel", [])]
        connection.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode() + b"ok")


def head_of(sent: bytes) -> tuple[str, str, str | None]:
    """Return the method, the request line and the Host header that a peer was sent."""
    line, *fields = sent.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    hosts = [value.strip() for name, _, value in (field.partition(":") for field in fields) if name.lower() == "host"]
    method = line.partition(" ")[0]
    return method if method in METHODS.values() else "_OTHER", line, hosts[0] if hosts else None


def told(attempt: Attempt) -> tuple[str, str | None, str | None]:
    """Return what the record says about the same."""
    return METHODS.get(attempt.method_bit, "_OTHER"), attempt.sent_line, attempt.sent_host


class RecordedNginx:
    """Runs nginx with servers that listen at `@0@`, `@1@`, …; words in capitals are addresses. Records its requests."""

    def __init__(
        self,
        prefix: Path,
        http: str,
        words: dict[str, str],
        main: str = "",
        options: Sequence[str] = (),
        environment: Mapping[str, str] = EMPTY,
    ) -> None:
        prefix.mkdir(mode=0o755)
        ports = free_ports(http.count("listen @"))
        self.addresses = [("127.0.0.1", port) for port in ports]
        for index, port in enumerate(ports):
            http = http.replace(f"@{index}@", f"127.0.0.1:{port}")
        for word, value in {**words, "PREFIX": str(prefix)}.items():
            http = http.replace(f"@{word}@", value)
        self._directory, self._options, self._environment = prefix, options, environment
        self.nginx = NginxServer(prefix, http, 1, main)
        self.nginx.start(self.addresses)
        self.attach()

    def attach(self) -> None:
        self.capture = self._directory / "requests.capture"
        command = ["record", "--pid", str(self.nginx.pid), "-o", self.capture, *self._options]
        self.agent = AgentProcess(0, self._directory, command, self._environment)

    def connect(self, server: int = 0) -> Http1Connection:
        return Http1Connection(self.addresses[server])

    def get(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Response:
        """Make a request with secrets."""
        secret = {"Authorization": "Basic secret", "Cookie": "cookie=secret", **(headers or {})}
        return self.send(request_bytes(method, target, secret, body), method=method)

    def send(self, request: bytes, server: int = 0, method: str = "GET") -> Response:
        with self.connect(server) as connection:
            connection.send(request)
            return connection.read_response(method)

    def requests(self, path: str) -> list[Request]:
        """Return the recorded requests of a path so far."""
        found = []
        with contextlib.suppress(CaptureError):  # the last record is not whole yet
            for frame in read_capture(self.capture):
                assert not any(secret in frame.raw for secret in SECRETS)
                if is_log_line(frame.raw):
                    continue
                request = decode(frame.raw)
                if (request.uri or "").partition("?")[0] == path:
                    found.append(request)
        return found

    def request(self, path: str) -> Request:
        """Wait for the only recorded request of a path."""
        wait_until(lambda: bool(self.requests(path)), f"the record of {path}")
        (request,) = self.requests(path)
        return request

    def stop(self) -> None:
        self.agent.stop()
        self.nginx.stop()
        assert self.nginx.problems() == []

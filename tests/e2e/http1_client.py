"""Provides an HTTP/1.1 client on a bare socket. It can be slow, rude and wrong, as real clients are."""

import socket
import ssl
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

Address = tuple[str, int] | str
"""A host and port, or the path of a unix socket."""


def family_of(address: Address) -> socket.AddressFamily:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


class ConnectionEnded(Exception):
    """The server closed the connection before the end of the response. `received` has the bytes before that."""

    def __init__(self, received: bytes) -> None:
        super().__init__(f"connection ended after {len(received)} bytes of a response: {received[:200]!r}")
        self.received = received


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    body_bytes: int
    body: bytes
    """The first megabyte of the body."""


def request_bytes(method: str, target: str, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    """Return a whole request. Add Host, and Content-Length for a body without other framing."""
    fields = {"Host": "localhost", **(headers or {})}
    if body and "Transfer-Encoding" not in fields:
        fields.setdefault("Content-Length", str(len(body)))
    head = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(head).encode("latin-1") + body


class Http1Connection:
    """A connection. Every read has a deadline of `timeout` seconds."""

    def __init__(
        self,
        address: Address,
        tls: ssl.SSLContext | None = None,
        receive_buffer_bytes: int | None = None,
        timeout: float = 20.0,
        before_hello_s: float = 0,
        session: ssl.SSLSession | None = None,
    ) -> None:
        family = family_of(address)
        connection = socket.socket(family)
        if receive_buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(timeout)
        connection.connect(address)
        if family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time.sleep(before_hello_s)
        self.socket = tls.wrap_socket(connection, server_hostname="localhost", session=session) if tls else connection
        self._buffer = b""

    def __enter__(self) -> "Http1Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def abort(self) -> None:
        """Close the connection with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_slowly(self, parts: Iterable[bytes], pause_seconds: float) -> None:
        """Send the parts one by one, with a pause between two parts, as a slow client."""
        for index, part in enumerate(parts):
            if index:
                time.sleep(pause_seconds)
            self.socket.sendall(part)

    def request(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Response:
        self.send(request_bytes(method, target, headers, body))
        return self.read_response(method)

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 18)
        except (ConnectionResetError, ssl.SSLEOFError):
            return b""

    def read_until_closed(self) -> bytes:
        received, self._buffer = self._buffer, b""
        while data := self._receive():
            received += data
        return received

    def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            data = self._receive()
            if not data:
                raise ConnectionEnded(self._buffer)
            self._buffer += data
        taken, _, self._buffer = self._buffer.partition(mark)
        return taken

    def _read_exactly(self, count: int, keep: int = 1 << 20) -> bytes:
        """Read `count` bytes; return the first `keep` bytes."""
        kept, left = b"", count
        while left:
            data, self._buffer = self._buffer or self._receive(), b""
            if not data:
                raise ConnectionEnded(kept)
            data, self._buffer = data[:left], data[left:]
            left -= len(data)
            kept += data[: max(0, keep - len(kept))]
        return kept

    def read_response(self, method: str = "GET") -> Response:
        """Read a response. Raise ConnectionEnded if the server closes the connection before the end of the response."""
        lines = self._read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if method == "HEAD" or status < 200 or status in (204, 304):
            return Response(status, headers, 0, b"")
        if headers.get("transfer-encoding") == "chunked":
            body, total = b"", 0
            while size := int(self._read_until(b"\r\n"), 16):
                body = (body + self._read_exactly(size + 2)[:size])[: 1 << 20]
                total += size
            self._read_until(b"\r\n")
        elif "content-length" in headers:
            total = int(headers["content-length"])
            body = self._read_exactly(total)
        else:
            body = self.read_until_closed()
            total = len(body)
        return Response(status, headers, total, body)


def trusting_tls(version: ssl.TLSVersion | None = None, alpn: list[str] | None = None) -> ssl.SSLContext:
    """Return a client context that accepts the test's self-signed certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version:
        context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(alpn)
    return context

"""Runs an HTTP/1.1 upstream that records each request as its bytes came. The request's target says how it answers.

    /KIND/NUMBER?size=BYTES&status=STATUS&slow=1

`slow`: it reads late, with a small buffer. The body of an answer is `pattern(size)`.
"""

import hashlib
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

_TARGET = re.compile(rb"/[\w-]+/(\d+)\?size=(\d+)(?:&status=(\d+))?(&slow=1)?")


@cache
def pattern(size: int) -> bytes:
    return (b"0123456789abcdef-" * (size // 17 + 1))[:size]


@dataclass(frozen=True)
class Received:
    """A request as it arrived."""

    number: int
    head: bytes
    body_sha: str
    peer: str
    first_of_connection: bool

    @property
    def contexts(self) -> list[str]:
        """The values of all traceparent headers."""
        found = re.findall(rb"\r\ntraceparent:[ \t]*([^\r\n]*)\r\n", self.head.replace(b"\r\n", b"\r\n\r\n"), re.I)
        return [value.decode("latin-1") for value in found]

    @property
    def well_formed(self) -> bool:
        lines = self.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        return bool(re.fullmatch(rb"[A-Z]+ \S+ HTTP/1\.[01]", lines[0])) and all(
            re.fullmatch(rb"[\w-]+: ?[^\r\n]*", line) for line in lines[1:]
        )


@dataclass
class RecordingUpstream:
    host: str = "127.0.0.1"
    fails: bool = False
    """Answers each request with 503."""
    received: list[Received] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What was not a request."""

    def __post_init__(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, 0), family=family, backlog=512)
        port = self._listener.getsockname()[1]
        self.address = f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # stopped
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer, first = b"", True
        with connection, suppress(OSError):
            while True:
                while b"\r\n\r\n" not in buffer:
                    data = connection.recv(1 << 16)
                    if not data:
                        if buffer:
                            self.broken.append(f"the connection ended after {buffer[:300]!r}")
                        return
                    buffer += data
                head, end, buffer = buffer.partition(b"\r\n\r\n")
                target = _TARGET.search(head)
                if target is None:
                    self.broken.append(f"not a request: {head[:300]!r}")
                    return
                if target[4]:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    time.sleep(0.05)
                if re.search(rb"\r\nExpect: 100-continue", head, re.I):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                length = re.search(rb"\r\nContent-Length: *(\d+)", head, re.I)
                digest = hashlib.sha256()
                if re.search(rb"\r\nTransfer-Encoding: *chunked", head, re.I):
                    buffer = self._read_chunks(connection, buffer, digest)
                left = int(length[1]) if length else 0
                while left:
                    if not buffer:
                        buffer = connection.recv(1 << 18)
                        if not buffer:
                            return
                    part, buffer = buffer[:left], buffer[left:]
                    left -= len(part)
                    digest.update(part)
                if target[4]:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                self.received.append(Received(int(target[1]), head + end, digest.hexdigest(), self.address, first))
                first = False
                status, body = (503, b"busy") if self.fails else (int(target[3] or 200), pattern(int(target[2])))
                closes = b"\r\nConnection: close" in head or b" HTTP/1.0\r\n" in head
                connection.sendall(
                    b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\n%s\r\n"
                    % (status, len(body), b"Connection: close\r\n" * closes)
                )
                connection.sendall(body)
                if closes:
                    return

    @staticmethod
    def _read_chunks(connection: socket.socket, buffer: bytes, digest: "hashlib._Hash") -> bytes:
        while True:
            while b"\r\n" not in buffer:
                buffer += connection.recv(1 << 16)
            line, _, buffer = buffer.partition(b"\r\n")
            size = int(line, 16)
            while len(buffer) < size + 2:
                buffer += connection.recv(1 << 18)
            digest.update(buffer[:size])
            buffer = buffer[size + 2 :]
            if size == 0:
                return buffer

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

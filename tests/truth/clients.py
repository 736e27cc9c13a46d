"""Runs clients. They do what an action says, and record when."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from e2e.http1_client import Address, ConnectionEnded, Http1Connection, trusting_tls

from truth.actions import Action, Ask
from truth.knowledge import PATIENCE_S, Known, now_ns
from truth.streams import Streams

SLOW_READ_S, SLOW_READ_BYTES = 0.005, 16_384


def perform(action: Action, address: Address) -> list[Known]:
    """Perform the whole action. Never raise for what a server may do."""
    kept = [
        Known(ask, action.is_http2, action.pipelined or (action.is_http2 and len(action.asks) > 1))
        for ask in action.asks
    ]
    with suppress(OSError):
        if action.nonsense:
            _nonsense(action, address)
        elif action.is_http2:
            Streams(action, address, kept).run()
        else:
            _Requests(action, address, kept).run()
    return kept


def _nonsense(action: Action, address: Address) -> None:
    tls = trusting_tls() if action.kind == "tls" else None
    with Http1Connection(address, tls, timeout=PATIENCE_S) as connection:
        connection.send(action.nonsense.encode("latin-1"))
        connection.read_until_closed()


class _TimedConnection(Http1Connection):
    """Records when it first and last received something. Can receive slowly."""

    received_ns: int | None = None
    first_ns: int | None = None
    slow = False

    def _receive(self) -> bytes:
        if self.slow:
            time.sleep(SLOW_READ_S)
        try:
            data = self.socket.recv(SLOW_READ_BYTES) if self.slow else super()._receive()
        except ConnectionError:
            data = b""
        if data:
            self.received_ns = now_ns()
            self.first_ns = self.first_ns or self.received_ns
        return data

    @contextmanager
    def response_of(self, known: Known) -> Iterator[None]:
        """Record when the first byte of the response arrived. Bytes in the buffer arrived with the response before."""
        self.first_ns = self.received_ns if self._buffer else None
        self.slow = known.ask.slow_reader
        try:
            yield
        finally:
            known.first_byte_ns = known.first_byte_ns or self.first_ns


class _Requests:
    """Makes HTTP/1 requests one after another, or pipelined."""

    def __init__(self, action: Action, address: Address, kept: list[Known]) -> None:
        self._kept, self._pipelined, self._ended = kept, action.pipelined, False
        slow = any(known.ask.slow_reader for known in kept)
        tls = trusting_tls() if action.kind == "tls" else None
        self._connection = _TimedConnection(address, tls, 32_768 if slow else None, PATIENCE_S)
        name = self._connection.socket.getsockname()
        for known in kept:
            known.port = str(name[1]) if isinstance(name, tuple) else ""

    def run(self) -> None:
        with self._connection:
            if self._pipelined:
                for known in self._kept:
                    known.sent_ns = now_ns()
                try:
                    self._connection.send(b"".join(_head(known.ask) + known.ask.body for known in self._kept))
                except OSError as error:  # nginx reads no further, or is gone
                    for known in self._kept:
                        known.left_ns, known.problem = now_ns(), repr(error)
                    return
                for known in self._kept:
                    known.all_sent_ns = now_ns()
            for known in self._kept:
                if not self._one(known):
                    self._leave_rest(known)
                    break

    def _leave_rest(self, last: Known) -> None:
        """Mark unread requests as left with the connection, unless nginx closed it."""
        for each in self._kept:
            if each.sent_ns and not each.whole and not self._ended:
                each.left_ns = last.left_ns or now_ns()

    def _one(self, known: Known) -> bool:
        """Make one exchange; return whether the connection is still good."""
        try:
            if known.sent_ns is None and not self._send(known):
                return False
            return self._read(known)
        except ConnectionEnded as ended:
            self._ended = True
            known.received_bytes = len(ended.received)
        except TimeoutError:
            known.problem = "no answer"
        except (OSError, ValueError, IndexError) as error:
            known.problem = repr(error)
        return False

    def _send(self, known: Known) -> bool:
        ask, connection = known.ask, self._connection
        known.sent_ns = now_ns()
        if ask.body_mode == "at once" and ask.fate != "sending":
            connection.send(_head(ask) + ask.body)
        else:
            connection.send(_head(ask))
            if ask.body_mode == "expect":
                with connection.response_of(known):
                    if (status := connection.read_response(ask.method).status) != 100:
                        known.status, known.last_byte_ns = status, connection.received_ns
                        return False
                known.first_byte_ns = None  # that byte was not the answer's
            half = len(ask.body) // 2
            time.sleep(ask.pause_ms / 2000)
            self._send_piece(ask, ask.body[:half])
            time.sleep(ask.pause_ms / 2000)
            if ask.fate == "sending":
                self._leave(known)
                return False
            self._send_piece(ask, ask.body[half:])
            if ask.body_mode == "chunked":
                connection.send(b"0\r\n\r\n")
        known.all_sent_ns = now_ns()
        return True

    def _send_piece(self, ask: Ask, piece: bytes) -> None:
        if piece:
            self._connection.send(b"%x\r\n%s\r\n" % (len(piece), piece) if ask.body_mode == "chunked" else piece)

    def _read(self, known: Known) -> bool:
        ask, connection = known.ask, self._connection
        if ask.fate == "half_close" and not isinstance(connection.socket, ssl.SSLSocket):
            known.left_ns = now_ns()  # nginx sees a half-close as the client leaving
            connection.socket.shutdown(socket.SHUT_WR)
        with connection.response_of(known):
            if ask.fate == "unanswered":
                time.sleep(ask.leave_ms / 1000)
                self._leave(known)
                return False
            if ask.fate == "midway":
                known.received_bytes = len(connection.socket.recv(ask.leave_bytes))
                known.first_byte_ns = now_ns() if known.received_bytes else None
                time.sleep(ask.leave_ms / 1000)
                self._leave(known)
                return False
            response = connection.read_response(ask.method)
            while response.status < 200 and response.status != 101:
                response = connection.read_response(ask.method)
        known.status, known.last_byte_ns = response.status, connection.received_ns
        known.received_bytes = response.body_bytes
        ends_itself = ask.method == "HEAD" or {"content-length", "transfer-encoding"} & response.headers.keys()
        known.by_the_end = not ends_itself
        closing = response.headers.get("connection", "").lower() == "close"
        return not closing and not (
            ask.version == "HTTP/1.0" and "keep-alive" not in response.headers.get("connection", "")
        )

    def _leave(self, known: Known) -> None:
        known.left_ns = now_ns()
        self._connection.abort() if known.ask.abort else self._connection.close()


def _head(ask: Ask) -> bytes:
    fields = {"Host": "localhost", **ask.headers}
    if ask.body_mode == "chunked":
        fields["Transfer-Encoding"] = "chunked"
    elif ask.body:
        fields["Content-Length"] = str(len(ask.body))
    if ask.body_mode == "expect":
        fields["Expect"] = "100-continue"
    lines = [
        f"{ask.method} {ask.target} {ask.version}",
        *(f"{name}: {value}" for name, value in fields.items()),
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1")

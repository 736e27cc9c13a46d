"""The channel between supervisor and emitter: a pair of unix sockets that keep messages apart."""

import select
import socket
import time
from collections import deque

from otel_nginx_ebpf.process.messages import (
    REPORT_BYTES,
    Belongs,
    EmitterReport,
    Kind,
    Order,
    decode_order,
    decode_report,
    encode_order,
    encode_report,
)

# A unix socket's buffer takes 208 KiB by default.
_MESSAGE_BYTES_MAX = 1 << 18
_DESCRIPTORS_MAX = 8

# A stopped emitter does not read. The supervisor waits for it no longer than this.
_SEND_S = 1.0

# The supervisor reads at most so many reports at once, so that an emitter that floods it cannot stop its other work.
_REPORTS_AT_ONCE = 16

# How long the emitter waits for an answer.
_ANSWER_S = 2.0


class EmitterGoneError(Exception):
    """The emitter has ended, or it broke the protocol; the text says how."""


class SupervisorEnd:
    """The supervisor's end of the channel. Owns its socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.settimeout(_SEND_S)

    def tell(self, order: Order) -> None:
        """Sends a message to the emitter.

        Raises:
            EmitterGoneError: The emitter does not take it.
        """
        message, descriptors = encode_order(order)
        try:
            socket.send_fds(self._socket, [message], descriptors)
        except TimeoutError:
            raise EmitterGoneError("it takes no message") from None
        except OSError:
            raise EmitterGoneError from None

    def reports(self, timeout_s: float) -> list[EmitterReport]:
        """Returns the reports that have come; waits up to `timeout_s` seconds for the first.

        Raises:
            EmitterGoneError: The emitter has ended, or sent something else.
        """
        found: list[EmitterReport] = []
        while len(found) < _REPORTS_AT_ONCE and select.select([self._socket], [], [], 0 if found else timeout_s)[0]:
            found.append(self._report())
        return found

    def _report(self) -> EmitterReport:
        try:
            raw = self._socket.recv(REPORT_BYTES + 1)
        except OSError:
            raw = b""
        if not raw:
            raise EmitterGoneError
        try:
            return decode_report(raw)
        except ValueError as error:
            raise EmitterGoneError(f"it sent {raw!r}") from error

    def close(self) -> None:
        self._socket.close()


class EmitterEnd:
    """The emitter's end of the channel. Owns its socket."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._waiting: deque[Order] = deque()
        self.ended = False
        """Whether the supervisor is gone."""

    def report(self, kind: Kind, number: int = 0, pid: int = 0) -> None:
        """Sends a report to the supervisor. Does nothing if the supervisor is gone."""
        try:
            self._socket.send(encode_report(EmitterReport(kind, number, pid)))
        except OSError:
            self.ended = True

    def orders(self, timeout_s: float) -> list[Order]:
        """Returns the messages that have come; waits up to `timeout_s` seconds for the first."""
        found = list(self._waiting)
        self._waiting.clear()
        while not self.ended and select.select([self._socket], [], [], 0 if found else timeout_s)[0]:
            if order := self._receive():
                found.append(order)
        return found

    def ask_whose(self, number: int, pid: int) -> Belongs | None:
        """Asks which nginx a process belongs to; returns `None` if no answer comes."""
        self.report(Kind.WHOSE, number, pid)
        deadline_s = time.monotonic() + _ANSWER_S
        while not self.ended and select.select([self._socket], [], [], max(0, deadline_s - time.monotonic()))[0]:
            order = self._receive()
            if isinstance(order, Belongs) and order.pid == pid:
                return order
            if order:
                self._waiting.append(order)
        return None

    def _receive(self) -> Order | None:
        try:
            raw, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX)
        except OSError:
            raw = b""
        if not raw:
            self.ended = True
            return None
        return decode_order(raw, descriptors)


def make_channel() -> tuple[SupervisorEnd, socket.socket]:
    """Makes both ends; the second is the socket for an `EmitterEnd`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return SupervisorEnd(ours), theirs

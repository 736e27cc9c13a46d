"""What supervisor and emitter say to each other, over a pair of unix sockets that keep messages apart.

The supervisor is believed: JSON, with descriptors. The emitter, which reads what strangers send, is not: it has a few
messages of twelve bytes, which can make the supervisor detach, and no more.
"""

import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

_REPORT = struct.Struct("=III")

# A unix socket's buffer takes 208 KiB by default.
_MESSAGE_BYTES_MAX = 1 << 18
_DESCRIPTORS_MAX = 8

# A stopped emitter need not read, and this many seconds of it do not hold the supervisor up.
_SEND_S = 1.0

# So many reports at a time, that an emitter which sends more does not keep the supervisor from its work.
_REPORTS_AT_ONCE = 16

# How long the emitter waits for an answer.
_ANSWER_S = 2.0


class Kind(IntEnum):
    """Of a report."""

    BEGUN = 1
    """It has given up its privileges and is ready for records."""
    CONTRADICTED = 2
    """A worker's memory contradicts its binary's layout."""
    SILENT = 3
    """A function of a binary is never called."""
    WHOSE = 4
    """Which nginx a process of a binary belongs to is asked."""


class Report(NamedTuple):
    """From the emitter."""

    kind: Kind
    number: int
    """Of the attachment; 0 where it is about none."""
    pid: int


class EmitterGoneError(Exception):
    """It has ended; or, as the text says, does what no emitter does."""


class SupervisorEnd:
    """Of the channel. Owns its socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.settimeout(_SEND_S)

    def tell(self, what: str, descriptors: Sequence[int] = (), **values: Any) -> None:
        """Raises `EmitterGoneError` where nobody takes it."""
        message = json.dumps({"what": what, **values}).encode()
        try:
            socket.send_fds(self._socket, [message], descriptors)
        except TimeoutError:
            raise EmitterGoneError("it takes no message") from None
        except OSError:
            raise EmitterGoneError from None

    def reports(self, timeout_s: float) -> list[Report]:
        """Those that have come; waits for one, for so long. Raises `EmitterGoneError`."""
        found: list[Report] = []
        while len(found) < _REPORTS_AT_ONCE and select.select([self._socket], [], [], 0 if found else timeout_s)[0]:
            found.append(self._report())
        return found

    def _report(self) -> Report:
        try:
            raw = self._socket.recv(_REPORT.size + 1)
        except OSError:
            raw = b""
        if not raw:
            raise EmitterGoneError
        try:
            kind, number, pid = _REPORT.unpack(raw)
            return Report(Kind(kind), number, pid)
        except (struct.error, ValueError) as error:
            raise EmitterGoneError(f"it sent {raw!r}") from error

    def close(self) -> None:
        self._socket.close()


class Message(NamedTuple):
    """From the supervisor."""

    what: str
    values: dict[str, Any]
    descriptors: list[int]


class EmitterEnd:
    """Of the channel. Owns its socket."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._waiting: deque[Message] = deque()
        self.ended = False
        """The supervisor is gone."""

    def report(self, kind: Kind, number: int = 0, pid: int = 0) -> None:
        try:
            self._socket.send(_REPORT.pack(kind, number, pid))
        except OSError:
            self.ended = True

    def messages(self, timeout_s: float) -> list[Message]:
        """Those that have come; waits for one, for so long."""
        found = list(self._waiting)
        self._waiting.clear()
        while not self.ended and select.select([self._socket], [], [], 0 if found else timeout_s)[0]:
            if message := self._receive():
                found.append(message)
        return found

    def ask(self, kind: Kind, number: int, pid: int) -> Message | None:
        """The answer, of the same name as the question; None where there comes none."""
        self.report(kind, number, pid)
        deadline_s = time.monotonic() + _ANSWER_S
        while not self.ended and select.select([self._socket], [], [], max(0, deadline_s - time.monotonic()))[0]:
            if message := self._receive():
                if message.what == kind.name.lower() and message.values["pid"] == pid:
                    return message
                self._waiting.append(message)
        return None

    def _receive(self) -> Message | None:
        try:
            raw, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES_MAX, _DESCRIPTORS_MAX)
        except OSError:
            raw = b""
        if not raw:
            self.ended = True
            return None
        values = json.loads(raw)
        return Message(values.pop("what"), values, descriptors)


def make_channel() -> tuple[SupervisorEnd, socket.socket]:
    """The supervisor's end, and the socket that is to be the emitter's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return SupervisorEnd(ours), theirs

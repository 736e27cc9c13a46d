"""Holds what a client knows about a request: when its first byte left, and which bytes came back when."""

import time
from dataclasses import dataclass

from truth.actions import Ask

PATIENCE_S = 4.0
"""No request takes this long by itself. A client that waits longer gives up, and records that."""


@dataclass
class Known:
    """What the client knows of a request, in Unix nanoseconds. None means that it did not happen."""

    ask: Ask
    http2: bool
    shared: bool
    """Whether the client sent it together with others: pipelined, or as streams of one connection."""
    port: str = ""
    """The port of the client's socket, as in nginx's $remote_port."""
    sent_ns: int | None = None
    all_sent_ns: int | None = None
    first_byte_ns: int | None = None
    last_byte_ns: int | None = None
    """Set only for a whole response."""
    status: int | None = None
    left_ns: int | None = None
    received_bytes: int = 0
    by_the_end: bool = False
    """Whether the response ended with its connection, so that the client cannot know if it is whole."""
    problem: str = ""

    @property
    def whole(self) -> bool:
        return self.last_byte_ns is not None


def now_ns() -> int:
    return time.time_ns()

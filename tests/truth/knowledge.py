"""What a client knows of a request: when its first byte went out, and what came back when."""

import time
from dataclasses import dataclass

from truth.actions import Ask

PATIENCE_S = 4.0
"""No request takes this long by itself: a client that waits longer gives up, and says so."""


@dataclass
class Known:
    """What the client knows of one request; Unix nanoseconds, None where it did not happen."""

    ask: Ask
    http2: bool
    shared: bool
    """Sent together with others: pipelined, or streams of one connection."""
    port: str = ""
    """Of the client's socket, as in nginx's $remote_port."""
    sent_ns: int | None = None
    all_sent_ns: int | None = None
    first_byte_ns: int | None = None
    last_byte_ns: int | None = None
    """Only of a whole response."""
    status: int | None = None
    left_ns: int | None = None
    received_bytes: int = 0
    by_the_end: bool = False
    """The response ended with its connection: whole as far as the client can know."""
    problem: str = ""

    @property
    def whole(self) -> bool:
        return self.last_byte_ns is not None


def now_ns() -> int:
    return time.time_ns()

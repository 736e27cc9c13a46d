"""Runs the HTTP/2 clients: all streams of a connection at once. They reset some streams."""

import time
from contextlib import suppress

import h2.events
import h2.exceptions
from e2e.http1_client import Address
from e2e.http2_client import Http2Connection, Http2Request

from truth.actions import Action
from truth.knowledge import PATIENCE_S, Known, now_ns


class _TimedConnection(Http2Connection):
    """Records when each stream's first and last frame arrived, and when its body was sent."""

    def __init__(self, address: Address, tls: bool) -> None:
        self.first_ns: dict[int, int] = {}
        self.last_ns: dict[int, int] = {}
        self.sent_ns: dict[int, int] = {}
        self.whole: set[int] = set()
        """Streams whose response ended. nginx resets such a stream if it does not want the rest of a body."""
        super().__init__(address, tls)

    def release_bodies(self) -> None:
        unsent = set(self._unsent)
        super().release_bodies()
        self.sent_ns |= dict.fromkeys(unsent - self._unsent.keys(), now_ns())

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived | h2.events.DataReceived | h2.events.StreamEnded):
            self.first_ns.setdefault(event.stream_id, now_ns())
            self.last_ns[event.stream_id] = now_ns()
        if isinstance(event, h2.events.StreamEnded):
            self.whole.add(event.stream_id)
        super()._handle(event)

    def receive_until(self, until_ns: int) -> None:
        """Receive until `until_ns`, or until every stream has ended."""
        while (left_ns := until_ns - now_ns()) > 0 and not all(each.ended for each in self._responses.values()):
            self.transport.socket.settimeout(left_ns / 1e9)
            with suppress(TimeoutError):
                data = self.transport.socket.recv(1 << 18)
                if not data:
                    raise ConnectionError("the server closed the HTTP/2 connection with streams open")
                for event in self._h2.receive_data(data):
                    self._handle(event)
                self.release_bodies()
        self.transport.socket.settimeout(PATIENCE_S)

    def cancel(self, stream: int) -> bool:
        """Reset the stream unless it has ended; return whether it was reset."""
        if self._responses[stream].ended:
            return False
        self.reset(stream)
        return True


class Streams:
    """Makes HTTP/2 requests as concurrent streams, with bodies at once or after a pause. Resets some streams."""

    def __init__(self, action: Action, address: Address, kept: list[Known]) -> None:
        self._kept = kept
        self._connection = _TimedConnection(address, action.kind == "tls2")
        name = self._connection.transport.socket.getsockname()
        for known in kept:
            known.port = str(name[1])

    def run(self) -> None:
        asks = [known.ask for known in self._kept]
        requests = [
            Http2Request(
                ask.target, ask.method, tuple((name.lower(), value) for name, value in ask.headers.items()), ask.body
            )
            for ask in asks
        ]
        held = any(ask.body_mode == "slowly" for ask in asks)
        connection = self._connection
        responses = {}
        try:
            sent_ns = now_ns()
            responses = dict(connection.start(requests, hold_bodies=held))
            streams = list(responses)
            for known in self._kept:
                known.sent_ns, known.all_sent_ns = sent_ns, None if known.ask.body else now_ns()
            if held:
                time.sleep(max(ask.pause_ms for ask in asks) / 1000)
                connection.release_bodies()
            self._leave(streams)
            connection.finish()
        except TimeoutError:
            for known in self._kept:
                known.problem = "no answer"
        except (OSError, h2.exceptions.ProtocolError) as error:
            for known in self._kept:
                known.problem = repr(error)
        closed_ns = now_ns()
        connection.close()
        for known, (stream, response) in zip(self._kept, responses.items(), strict=False):
            known.first_byte_ns = connection.first_ns.get(stream)
            known.all_sent_ns = known.all_sent_ns or connection.sent_ns.get(stream)
            known.status = response.status or None
            known.received_bytes = response.body_bytes
            if stream in connection.whole and known.left_ns is None:
                known.last_byte_ns = connection.last_ns.get(stream)
            elif known.left_ns is None and not response.reset:
                known.left_ns = closed_ns

    def _leave(self, streams: list[int]) -> None:
        """Reset the streams whose clients leave, in order of time."""
        leaving = [
            (known, stream) for known, stream in zip(self._kept, streams, strict=True) if known.ask.fate != "whole"
        ]
        began_ns = now_ns()
        for known, stream in sorted(leaving, key=lambda pair: pair[0].ask.leave_ms):
            self._connection.receive_until(began_ns + known.ask.leave_ms * 1_000_000)
            with suppress(h2.exceptions.ProtocolError):
                if self._connection.cancel(stream):
                    known.left_ns = now_ns()

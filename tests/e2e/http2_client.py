"""Provides an HTTP/2 client: concurrent streams on one connection, over TLS (ALPN) or with prior knowledge."""

from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.settings

from e2e.http1_client import Address, Http1Connection, trusting_tls


@dataclass(frozen=True)
class Http2Request:
    target: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


@dataclass
class Http2Response:
    status: int = 0
    body_bytes: int = 0
    body: bytes = b""
    """The first megabyte of the body."""
    reset: bool = False
    ended: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Http2Connection:
    def __init__(self, address: Address, tls: bool) -> None:
        self.transport = Http1Connection(address, trusting_tls(alpn=["h2"]) if tls else None)
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_inbound_headers=False)
        )
        self._h2.initiate_connection()
        # The window is large, so that a response waits for this client only if a test wants that.
        self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
        self._h2.increment_flow_control_window(1 << 26)
        self._responses: dict[int, Http2Response] = {}
        self._unsent: dict[int, bytes] = {}
        self._flush()

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self.transport.send(data)

    def close(self) -> None:
        self.transport.close()

    def start(self, requests: list[Http2Request], hold_bodies: bool = False) -> dict[int, Http2Response]:
        """Open a stream for each request, all at once. Bodies follow as far as the windows allow.

        With `hold_bodies` the bodies wait for `release_bodies`.
        """
        for request in requests:
            stream = self._h2.get_next_available_stream_id()
            pseudo = [(":method", request.method), (":scheme", "https"), (":authority", "localhost")]
            length = [("content-length", str(len(request.body)))] if request.body else []
            self._h2.send_headers(
                stream,
                [*pseudo, (":path", request.target), *length, *request.headers],
                end_stream=not request.body,
            )
            self._responses[stream] = Http2Response()
            if request.body:
                self._unsent[stream] = request.body
        if hold_bodies:
            self._flush()
        else:
            self.release_bodies()
        return self._responses

    def release_bodies(self) -> None:
        for stream, body in list(self._unsent.items()):
            while body and (room := self._h2.local_flow_control_window(stream)) > 0:
                piece = body[: min(room, self._h2.max_outbound_frame_size)]
                body = body[len(piece) :]
                self._h2.send_data(stream, piece, end_stream=not body)
            self._unsent[stream] = body
            if not body:
                del self._unsent[stream]
        self._flush()

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream, error_code=8)  # CANCEL
        self._responses[stream].ended = True
        self._unsent.pop(stream, None)
        self._flush()

    def finish(self) -> list[Http2Response]:
        """Read until every stream has ended; return the responses since the last call, in the order of the requests."""
        while not all(response.ended for response in self._responses.values()):
            data = self.transport.socket.recv(1 << 18)
            if not data:
                raise ConnectionError("the server closed the HTTP/2 connection with streams open")
            for event in self._h2.receive_data(data):
                self._handle(event)
            self.release_bodies()
        responses, self._responses = self._responses, {}
        return list(responses.values())

    def _handle(self, event: h2.events.Event) -> None:
        response = self._responses.get(getattr(event, "stream_id", None) or 0)
        if response is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            response.headers = dict(event.headers)  # type: ignore[arg-type]
            response.status = int(response.headers[":status"])
        elif isinstance(event, h2.events.DataReceived):
            response.body_bytes += len(event.data)
            response.body += event.data[: (1 << 20) - len(response.body)]
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            response.ended = True
        elif isinstance(event, h2.events.StreamReset):
            response.ended = response.reset = True

    def exchange(self, requests: list[Http2Request]) -> list[Http2Response]:
        self.start(requests)
        return self.finish()

"""Provides an HTTP/3 client, on aioquic: concurrent requests on one QUIC connection."""

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Any

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent

TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Http3Request:
    target: str
    method: str = "GET"
    body: tuple[bytes, ...] = ()
    pause_seconds: float = 0
    """The pause before each further part of the body."""
    cancel_after_seconds: float | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass
class Http3Response:
    status: int = 0
    body: bytes = b""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class _Protocol(QuicConnectionProtocol):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._h3 = H3Connection(self._quic)
        self._responses: dict[int, Http3Response] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        for h3_event in self._h3.handle_event(event):
            self._handle(h3_event)

    def _handle(self, event: H3Event) -> None:
        if not isinstance(event, HeadersReceived | DataReceived) or event.stream_id not in self._responses:
            return
        response = self._responses[event.stream_id]
        if isinstance(event, HeadersReceived):
            response.status = int(dict(event.headers)[b":status"])
        else:
            response.body += event.data
        if event.stream_ended:
            response.ended.set()

    async def ask(self, request: Http3Request, authority: str) -> Http3Response:
        stream = self._quic.get_next_available_stream_id()
        response = self._responses[stream] = Http3Response()
        pseudo = {":method": request.method, ":scheme": "https", ":authority": authority, ":path": request.target}
        headers = [(name.encode(), value.encode()) for name, value in (*pseudo.items(), *request.headers)]
        if request.body:
            headers.append((b"content-length", str(sum(map(len, request.body))).encode()))
        self._h3.send_headers(stream, headers, end_stream=not request.body)
        for index, part in enumerate(request.body):
            if index:
                self.transmit()
                await asyncio.sleep(request.pause_seconds)
            self._h3.send_data(stream, part, end_stream=index == len(request.body) - 1)
        self.transmit()
        if request.cancel_after_seconds is None:
            await response.ended.wait()
        else:
            await asyncio.sleep(request.cancel_after_seconds)
            self._quic.reset_stream(stream, 0x10C)  # H3_REQUEST_CANCELLED
            self._quic.stop_stream(stream, 0x10C)
            self.transmit()
        return response


async def _fetch(host: str, port: int, requests: list[Http3Request], at_once: bool) -> list[Http3Response]:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, verify_mode=ssl.CERT_NONE)
    async with connect(host, port, configuration=configuration, create_protocol=_Protocol) as client:
        assert isinstance(client, _Protocol)
        asking = [client.ask(request, f"{host}:{port}") for request in requests]
        return list(await asyncio.gather(*asking)) if at_once else [await each for each in asking]


def fetch(address: tuple[str, int], requests: list[Http3Request], at_once: bool = True) -> list[Http3Response]:
    """Return the responses in the order of the requests. A cancelled request has what arrived before it."""
    return asyncio.run(asyncio.wait_for(_fetch(*address, requests, at_once), TIMEOUT_SECONDS))

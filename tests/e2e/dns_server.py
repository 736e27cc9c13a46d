"""Answers nginx's own resolver over UDP, as a name server with given records.

It answers unknown names with NXDOMAIN, and names without a record of the type with an empty answer. It answers a name
that begins with `slow` after SLOW_SECONDS.
"""

import socket
import struct
import threading
import time
from types import TracebackType

SLOW_SECONDS = 0.2

_A, _IN = 1, 1
_TTL_SECONDS = 1
_RESPONSE, _NXDOMAIN = 0x8180, 3
_QUESTION_NAME = 0xC00C
"""A pointer to the question's name, at byte 12 (RFC 1035, 4.1.4)."""


def _parse_name(query: bytes, offset: int) -> tuple[str, int]:
    labels = []
    while length := query[offset]:
        labels.append(query[offset + 1 : offset + 1 + length].decode())
        offset += 1 + length
    return ".".join(labels), offset + 1


class DnsServer:
    """Answers on `address` until the context ends. `records` are IPv4 addresses by name."""

    def __init__(self, records: dict[str, list[str]]) -> None:
        self._records = records
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._socket.getsockname())
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "DnsServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        name, end = _parse_name(query, 12)
        (kind,) = struct.unpack_from("!H", query, end)
        if name.startswith("slow"):
            time.sleep(SLOW_SECONDS)
        known = self._records.get(name)
        hosts = (known or []) if kind == _A else []
        flags = _RESPONSE if known is not None else _RESPONSE | _NXDOMAIN
        header = query[:2] + struct.pack("!5H", flags, 1, len(hosts), 0, 0)
        answers = [
            struct.pack("!HHHLH", _QUESTION_NAME, _A, _IN, _TTL_SECONDS, 4) + socket.inet_aton(host) for host in hosts
        ]
        return header + query[12 : end + 4] + b"".join(answers)

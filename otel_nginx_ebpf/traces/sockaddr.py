"""Parses socket addresses into host and port: the bytes of a `struct sockaddr`, and nginx's own text.

The text is as nginx prints it (ngx_sock_ntop): `unix:/path`, and `unix:` for a unix socket without a path.
"""

import re
import socket
import struct
import sys
from dataclasses import dataclass

_FAMILY_BYTES = 2
_PEER = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclass(slots=True)
class Address:
    """A socket's address. A unix socket has `unix:/path` as its host, and no port."""

    host: str
    port: int | None

    def __str__(self) -> str:
        """Returns the address as nginx writes it: `127.0.0.1:80`, `[::1]:80`, `unix:/path`."""
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(raw: bytes) -> Address | None:
    """Returns the address in a `struct sockaddr` of this machine's byte order.

    `None`: the family is not AF_INET, AF_INET6 or AF_UNIX, or the bytes end too early.
    """
    if len(raw) < _FAMILY_BYTES:
        return None
    family = int.from_bytes(raw[:_FAMILY_BYTES], sys.byteorder)
    if family == socket.AF_UNIX:
        path = raw[_FAMILY_BYTES:].split(b"\0", 1)[0]
        return Address("unix:" + path.decode("utf-8", "backslashreplace"), None)
    if family == socket.AF_INET and len(raw) >= 8:
        (port,) = struct.unpack_from("!H", raw, 2)
        return Address(socket.inet_ntop(socket.AF_INET, raw[4:8]), port)
    if family == socket.AF_INET6 and len(raw) >= 24:
        (port,) = struct.unpack_from("!H", raw, 2)
        return Address(socket.inet_ntop(socket.AF_INET6, raw[8:24]), port)
    return None


def parse_peer(text: str) -> Address | None:
    """Returns the address in an element of $upstream_addr: `127.0.0.1:80`, `[::1]:80`, `unix:/path`.

    `None`: the element is something else. If no peer is live, nginx puts the upstream block's name there.
    """
    if text.startswith("unix:"):
        return Address(text, None)
    match = _PEER.fullmatch(text)
    if match is None:
        return None
    family, host = (socket.AF_INET6, match["v6"]) if match["v6"] else (socket.AF_INET, match["v4"])
    port = int(match["port"])
    try:
        socket.inet_pton(family, host)
    except OSError:
        return None
    return Address(host, port) if port <= 65535 else None

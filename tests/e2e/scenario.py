"""A scenario's nginx configuration, and what the words in it stand for:

@NAME@                                   unique to the scenario; fit for an upstream's or a cache's name
@UP@ @OTHER@ @UP6@ @UP_UNIX@ @UP_TLS@    the live upstream, at several addresses
@DEAD1@ @DEAD2@                          peers that refuse the connection
@DEAF@                                   a peer whose listen queue is full: connecting takes for ever
@LISTEN@                                 a free address on 127.0.0.1; @LISTEN6@ on ::1; @LISTEN_UNIX@
@PREFIX@ @HTML@ @CERTIFICATE@ @KEY@      paths
"""

import re
import socket
from dataclasses import dataclass, field

import pytest

from e2e.http1_client import Address
from e2e.nginx_server import free_ports


def peers_that_fail(sockets: list[socket.socket]) -> dict[str, str]:
    """Addresses that refuse (dead1, dead2) or never answer (deaf) a connect, while `sockets` stay open."""
    addresses = {}
    for name in ("dead1", "dead2", "deaf"):
        peer = socket.socket()
        sockets.append(peer)
        peer.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
        addresses[name] = "{}:{}".format(*peer.getsockname())
    deaf = sockets[-1]
    deaf.listen(0)
    for _ in range(3):  # the kernel drops further SYNs once the queue is full
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(deaf.getsockname())
        sockets.append(filler)
    return addresses


@dataclass
class Scenario:
    """One test's nginx configuration, from its `nginx` marker."""

    name: str
    server: str
    http: str
    listen: str
    addresses: dict[str, Address] = field(default_factory=dict)

    @classmethod
    def of(cls, item: pytest.Item) -> "Scenario | None":
        marker = item.get_closest_marker("nginx")
        if marker is None:
            return None
        listen = marker.kwargs.get("listen", "listen @LISTEN@;")
        return cls(item.name, marker.kwargs.get("server", ""), marker.kwargs.get("http", ""), listen)

    @property
    def identifier(self) -> str:
        return re.sub(r"\W+", "_", self.name).strip("_")

    def text(self, words: dict[str, str]) -> str:
        def word(match: re.Match[str]) -> str:
            return self.identifier if match[1] == "NAME" else self._listen(match[1]) or words[match[1]]

        config = f"""
{self.http}
server {{
    {self.listen}
    access_log logs/@NAME@.log json;
    {self.server}
}}"""
        text = re.sub(r"@(LISTEN_UNIX)@", lambda match: f"unix:{words['PREFIX']}/{self.identifier}.sock", config)
        if text != config:
            self.addresses["unix"] = f"{words['PREFIX']}/{self.identifier}.sock"
        return re.sub(r"@(\w+)@", word, text)

    def _listen(self, word: str) -> str | None:
        if word not in ("LISTEN", "LISTEN6"):
            return None
        kind, host = ("ipv4", "127.0.0.1") if word == "LISTEN" else ("ipv6", "::1")
        if kind not in self.addresses:
            self.addresses[kind] = (host, free_ports(1, host)[0])
        port = self.addresses[kind][1]
        return f"[{host}]:{port}" if kind == "ipv6" else f"{host}:{port}"

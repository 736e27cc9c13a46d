"""Makes a scenario's nginx configuration. These words in it stand for:

@NAME@                                   a name of the scenario's own, for an upstream or a cache
@UP@ @OTHER@ @UP6@ @UP_UNIX@ @UP_TLS@    the live upstream, at several addresses
@DEAD1@ @DEAD2@                          peers that refuse the connection
@DEAF@                                   a peer with a full listen queue: a connect never ends
@LISTEN@                                 a free address on 127.0.0.1; @LISTEN6@ on ::1; @LISTEN_UNIX@
@LISTEN_ANYTHING@                        another address on 127.0.0.1, `anything` in the stage's addresses
@PREFIX@ @HTML@ @CERTIFICATE@ @KEY@      paths
and the name of every other upstream in the module's `upstream_addresses`, in capitals
"""

import re
import socket
from dataclasses import dataclass, field

import pytest

from e2e.agent_process import EMPTY
from e2e.http1_client import Address
from e2e.nginx_server import free_ports

BEGINNINGS = {"marked": EMPTY, "told": {"OTEL_NGINX_EBPF_TEST_QUIET": "0 0"}}
"""What shows the beginning of a plain HTTP/1 request, a probe or only the client's socket, and the variables for it.

A module with `BOTH_BEGINNINGS = True` runs once with each."""


def peers_that_fail(sockets: list[socket.socket]) -> dict[str, str]:
    """Return addresses that refuse a connect (dead1, dead2) or never answer it (deaf), while `sockets` stay open."""
    addresses = {}
    for name in ("dead1", "dead2", "deaf"):
        peer = socket.socket()
        sockets.append(peer)
        peer.bind(("127.0.0.1", 0))  # bound, does not listen: connects are refused, and nobody else gets the port
        addresses[name] = "{}:{}".format(*peer.getsockname())
    deaf = sockets[-1]
    deaf.listen(0)
    for _ in range(3):  # the kernel drops further SYNs when the queue is full
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(deaf.getsockname())
        sockets.append(filler)
    return addresses


@dataclass
class Scenario:
    """The nginx configuration of a test, from its `nginx` marker."""

    name: str
    server: str
    http: str
    listen: str
    main: str
    addresses: dict[str, Address] = field(default_factory=dict)

    @classmethod
    def of(cls, item: pytest.Item) -> "Scenario | None":
        marker = item.get_closest_marker("nginx")
        if marker is None:
            return None
        listen = marker.kwargs.get("listen", "listen @LISTEN@;")
        server, http, main = (marker.kwargs.get(name, "") for name in ("server", "http", "main"))
        return cls(item.name, server, http, listen, main)

    @property
    def identifier(self) -> str:
        return re.sub(r"\W+", "_", re.sub(rf"\b({'|'.join(BEGINNINGS)})\b", "", self.name)).strip("_")

    def http_text(self, words: dict[str, str]) -> str:
        config = f"""
{self.http}
server {{
    {self.listen}
    access_log logs/@NAME@.log json;
    {self.server}
}}"""
        return self._filled(config, words)

    def main_text(self, words: dict[str, str]) -> str:
        return self._filled(self.main, words)

    def _filled(self, config: str, words: dict[str, str]) -> str:
        def word(match: re.Match[str]) -> str:
            return self.identifier if match[1] == "NAME" else self._listen(match[1]) or words[match[1]]

        text = re.sub(r"@(LISTEN_UNIX)@", lambda match: f"unix:{words['PREFIX']}/{self.identifier}.sock", config)
        if text != config:
            self.addresses["unix"] = f"{words['PREFIX']}/{self.identifier}.sock"
        return re.sub(r"@(\w+)@", word, text)

    def _listen(self, word: str) -> str | None:
        if not word.startswith("LISTEN"):
            return None
        host = "::1" if word == "LISTEN6" else "127.0.0.1"
        kind = {"LISTEN": "ipv4", "LISTEN6": "ipv6"}.get(word) or word.removeprefix("LISTEN_").lower()
        if kind not in self.addresses:
            self.addresses[kind] = (host, free_ports(1, host)[0])
        port = self.addresses[kind][1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""The proxies in front of nginx whose word about the client's request counts."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from otel_nginx_ebpf.traces.sockaddr import parse

UNIX = "unix:"
"""Stands for all peers of unix sockets, as in nginx's `set_real_ip_from`."""


class TrustedProxies:
    """The trusted networks. Raises ValueError if a text is neither a network, nor an address, nor `unix:`."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._unix = UNIX in texts
        self._networks: list[IPv4Network | IPv6Network] = [
            ip_network(text, strict=False) for text in texts if text != UNIX
        ]
        self.has = lru_cache(256)(self._has)

    def _has(self, sockaddr: bytes) -> bool:
        """Tells whether the peer with this `struct sockaddr` is trusted."""
        peer = parse(sockaddr)
        if peer is None:
            return False
        if peer.port is None:
            return self._unix
        address: IPv4Address | IPv6Address = ip_address(peer.host)
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:  # a listener for both families
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.traces.sockaddr import Address, parse, parse_peer


def inet(host: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + ipaddress.IPv4Address(host).packed + bytes(8)


def inet6(host: str, port: int, scope: int = 0) -> bytes:
    address = ipaddress.IPv6Address(host).packed
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + address + struct.pack("=I", scope)


def unix(path: bytes) -> bytes:
    return struct.pack("=H", socket.AF_UNIX) + path


@pytest.mark.parametrize(
    ("raw", "address", "text"),
    [
        (inet("192.0.2.7", 443), Address("192.0.2.7", 443), "192.0.2.7:443"),
        (inet6("::1", 80), Address("::1", 80), "[::1]:80"),
        (inet6("fe80::1", 80, scope=3), Address("fe80::1", 80), "[fe80::1]:80"),
        (inet6("::ffff:192.0.2.7", 8080), Address("::ffff:192.0.2.7", 8080), "[::ffff:192.0.2.7]:8080"),
        (unix(b""), Address("unix:", None), "unix:"),
        (unix(b"\0" * 108), Address("unix:", None), "unix:"),
        (unix(b"\0abstract"), Address("unix:", None), "unix:"),
        (unix(b"/run/app.sock\0"), Address("unix:/run/app.sock", None), "unix:/run/app.sock"),
        (unix(b"/run/\xff.sock"), Address("unix:/run/\\xff.sock", None), "unix:/run/\\xff.sock"),
    ],
)
def test_sockaddr_bytes_become_the_address_nginx_prints(raw: bytes, address: Address, text: str) -> None:
    assert parse(raw) == address
    assert str(address) == text


@pytest.mark.parametrize("raw", [b"", b"\x02", inet("192.0.2.7", 443)[:7], inet6("::1", 80)[:23], b"\x10\0" * 20])
def test_cut_or_foreign_sockaddr_is_no_address(raw: bytes) -> None:
    assert parse(raw) is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("[::1]:8080", Address("::1", 8080)),
        ("unix:/run/app.sock", Address("unix:/run/app.sock", None)),
        ("backend", None),
        ("backend:80", None),
        ("127.0.0.1", None),
        ("127.0.0.1:65536", None),
        ("1.2.3:80", None),
        ("[::g]:80", None),
        ("", None),
    ],
)
def test_an_upstream_peer_is_an_address_or_a_name(text: str, address: Address | None) -> None:
    assert parse_peer(text) == address


@given(st.binary(max_size=128))
def test_parse_never_fails(raw: bytes) -> None:
    address = parse(raw)
    assert address is None or address.host


@given(st.text(max_size=64))
def test_parse_peer_never_fails(text: str) -> None:
    parse_peer(text)


@given(st.ip_addresses(v=6), st.integers(0, 65535))
def test_a_printed_address_parses_back(address: ipaddress.IPv6Address, port: int) -> None:
    parsed = parse(inet6(str(address), port))
    assert parsed is not None
    assert parse_peer(str(parsed)) == parsed

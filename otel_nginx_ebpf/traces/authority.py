"""The host and the port that a URL, a Host header or a forwarding proxy names."""

import re

Authority = tuple[str, int | None]
"""A host, without the brackets of an IPv6 address, and a port."""

DEFAULT_PORTS = {"http": 80, "https": 443}

# The start of a request target in absolute form (RFC 9112, 3.2.2), up to the end of its authority (RFC 3986, 3.2).
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)")


def split(host: str) -> Authority:
    """Returns the host and the port of an authority such as `example.com:8443` or `[::1]`. Ignores a user's name."""
    host = host.rpartition("@")[2]
    bare, colon, digits = host.rpartition(":")
    port = None
    if colon and digits.isascii() and digits.isdigit() and len(digits) <= 5 and not bare.endswith(":"):
        host, port = bare, int(digits)
    return host.removeprefix("[").removesuffix("]"), port


def of_absolute_form(target: str) -> tuple[str, str] | None:
    """Returns the scheme, in lower case, and the authority of a request target in absolute form; else `None`."""
    match = _ABSOLUTE.match(target)
    return (match[1].lower(), match[2]) if match and match[2] else None

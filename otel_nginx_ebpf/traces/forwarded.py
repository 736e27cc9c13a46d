"""What a proxy in front of nginx says about the client's request: `Forwarded` (RFC 7239) and `X-Forwarded-*`.

Anyone can send these headers. They count only if the socket's peer is a proxy that the user trusts
(`--trusted-proxy`). Each proxy appends its element, so the last element is from the nearest proxy, the only one that is
trusted: an earlier element may come from the client.
"""

import re
from typing import NamedTuple

from otel_nginx_ebpf.traces.authority import DEFAULT_PORTS

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = re.compile(rf'[ \t]*({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*")[ \t]*', re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)

# A host and perhaps a port: a registered name, an IPv4 address, or an IPv6 address in brackets (RFC 3986, 3.2.2).
_HOST = re.compile(r"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class Origin(NamedTuple):
    """The scheme and the authority of the client's request. `None`: the proxy does not say."""

    scheme: str | None = None
    authority: str | None = None


def origin(forwarded: str | None, x_forwarded_proto: str | None, x_forwarded_host: str | None) -> Origin:
    """Returns what the nearest proxy says. `Forwarded` wins; what it leaves out comes from `X-Forwarded-*`."""
    pairs = _last_element(forwarded) if forwarded is not None else {}
    return Origin(
        _scheme(pairs.get("proto")) or _scheme(_last(x_forwarded_proto)),
        _authority(pairs.get("host")) or _authority(_last(x_forwarded_host)),
    )


def _last_element(header: str) -> dict[str, str]:
    """Returns the pairs of the header's last element. Empty: the header is not of RFC 7239's form."""
    pairs: dict[str, str] = {}
    begins = False
    position, end = 0, len(header)
    while position < end:
        if header[position] in ", \t;":  # a list may have empty elements (RFC 9110, 5.6.1)
            begins = begins or header[position] == ","
            position += 1
            continue
        if begins:
            pairs, begins = {}, False
        match = _PAIR.match(header, position)
        if match is None or (match.end() < end and header[match.end()] not in ",;"):
            return {}
        name, value = match[1].lower(), match[2]
        if name in pairs:  # "Each parameter MUST NOT occur more than once per field-value"
            return {}
        pairs[name] = _ESCAPE.sub(r"\1", value[1:-1]) if value.startswith('"') else value
        position = match.end()
    return pairs


def _last(header: str | None) -> str | None:
    return None if header is None else header.rpartition(",")[2].strip(" \t")


def _scheme(text: str | None) -> str | None:
    scheme = text.lower() if text else None
    return scheme if scheme in DEFAULT_PORTS else None


def _authority(text: str | None) -> str | None:
    return text if text and _HOST.fullmatch(text) else None

"""What a peer was sent: the method, the URL and the host, by the request line and the Host header of its request."""

from otel_nginx_ebpf.traces.authority import of_absolute_form
from otel_nginx_ebpf.traces.methods import method_of_bit
from otel_nginx_ebpf.traces.record import Attempt, Request
from otel_nginx_ebpf.traces.sockaddr import parse_peer
from otel_nginx_ebpf.traces.url import redact_query

_VERSIONS = frozenset({"1.0", "1.1", "2"})


def parse_line(line: str) -> tuple[str | None, str, str | None]:
    """Returns method, target and version of a request line. Without a version, the line was cut short."""
    method, _, rest = line.partition(" ")
    target, _, version = rest.rpartition(" HTTP/")
    return (method or None, target, version) if version in _VERSIONS else (method or None, rest, None)


def sent_method(request: Request, attempt: Attempt, line_method: str | None) -> str | None:
    """Returns the method that the peer was sent. `None`: not known.

    `line_method`: the method of the request line, which nginx writes for HTTP/1 only. Otherwise nginx's number tells
    the method. Without both, the main request's attempts have the client's method.
    """
    if line_method is not None:
        return line_method
    bit = attempt.method_bit
    if not bit or bit == request.method_bit:
        return method_of_bit(bit) or (None if attempt.subrequest else request.method)
    return method_of_bit(bit)


def resend_count(attempts: tuple[Attempt, ...], number: int) -> int:
    """Returns how often the request of an attempt had been tried before, with another peer. 0: never, or not known."""
    upstream_request = attempts[number - 1].upstream_request
    if not upstream_request:
        return 0
    return sum([each.upstream_request == upstream_request for each in attempts[: number - 1]])


def full_url(target: str, host: str | None, peer: str | None, tls: bool, query: bool) -> str | None:
    """Returns url.full of a request to a peer. Values of sensitive parameters are redacted, and so are credentials.

    Args:
        target: The request target.
        host: The Host header. Without it, the peer's own address is the authority (RFC 9112, 3.3).
        peer: The peer, as nginx names it.
        tls: Whether nginx speaks TLS with the peer.
        query: Whether to keep the query string.
    """
    scheme = "https" if tls else "http"
    if not target.startswith("/"):
        if absolute := of_absolute_form(target):
            scheme, host = absolute
            target = target[len(scheme) + len("://") + len(host) :]
        elif target == "*":  # OPTIONS (RFC 9110, 7.1)
            target = ""
        if target[:1] not in ("", "/", "?"):
            return None
    if host is None:
        address = parse_peer(peer) if peer is not None else None
        if address is None or address.port is None:
            return None
        host = peer
    elif "@" in host:
        host = "REDACTED:REDACTED@" + host.rpartition("@")[2]
    path, question, arguments = target.partition("?")
    if question and query:
        path = f"{path}?{redact_query(arguments)}"
    return f"{scheme}://{host}{path}"

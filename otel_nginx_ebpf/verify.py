"""Whether a request looks like one: what a wrong struct layout would hardly survive.

The kernel program has checked `r->signature` and `r->main` by then. Pure.
"""

from otel_nginx_ebpf.record import Request
from otel_nginx_ebpf.sockaddr import parse, parse_peer

# ngx_http_request.h; CONNECT since 1.21.1.
_METHOD_BITS = {
    "GET": 0x2,
    "HEAD": 0x4,
    "POST": 0x8,
    "PUT": 0x10,
    "DELETE": 0x20,
    "MKCOL": 0x40,
    "COPY": 0x80,
    "MOVE": 0x100,
    "OPTIONS": 0x200,
    "PROPFIND": 0x400,
    "PROPPATCH": 0x800,
    "LOCK": 0x1000,
    "UNLOCK": 0x2000,
    "PATCH": 0x4000,
    "TRACE": 0x8000,
    "CONNECT": 0x10000,
}
_HTTP_VERSIONS = frozenset({9, 1000, 1001, 2000, 3000})
_PLAUSIBLE_BYTES = 2**50
_PLAUSIBLE_COUNT = 2**40
_PLAUSIBLE_MS = 2**40
_CLOCKS_APART_MS = 3_600_000
# nginx's clock stands still while it is at work; so long only where it is blocked.
_CLOCK_LAG_MS = 10_000


def contradictions(request: Request, unix_offset_ns: int) -> tuple[str, ...]:
    """What is wrong with a request, in words; nothing where all agrees.

    Args:
        request: The decoded record.
        unix_offset_ns: Unix time minus monotonic time.
    """
    found: list[str] = []

    def expect(holds: bool, what: str) -> None:
        if not holds:
            found.append(what)

    if request.method is not None:
        bit = _METHOD_BITS.get(request.method)
        expect(
            request.method_bit in ({bit} if bit else {1}) | ({1} if bit == 0x10000 else set()), "method and its number"
        )
    expect(request.http_version in _HTTP_VERSIONS, "HTTP version")
    expect(0 <= request.status < 1000, "status")
    expect(request.request_bytes < _PLAUSIBLE_BYTES and request.sent_bytes < _PLAUSIBLE_BYTES, "sizes")
    expect(0 < request.connection < _PLAUSIBLE_COUNT, "connection number")
    if request.requests_seen is not None:
        expect(request.connection_requests == request.requests_seen, "number of the connection's requests")
    created_unix_ms = (request.created_mono_ns + unix_offset_ns) // 1_000_000
    expect(abs(request.nginx_start_unix_ms - created_unix_ms) < _CLOCKS_APART_MS, "start time")
    expect(request.client_sockaddr is not None and parse(request.client_sockaddr) is not None, "client address")
    for attempt in request.attempts:
        times = (attempt.connect_ms, attempt.header_ms, attempt.response_ms)
        expect(all(time is None or time < _PLAUSIBLE_MS for time in times), "upstream times")
        if attempt.connect_start_mono_ns is not None and attempt.response_ms is not None:
            lasted_ms = (attempt.ended_mono_ns - attempt.connect_start_mono_ns) // 1_000_000
            expect(abs(attempt.response_ms - lasted_ms) < _CLOCK_LAG_MS, "upstream response time")
        expect(attempt.peer is None or parse_peer(attempt.peer) is not None, "upstream peer's address")
        expect(attempt.status is None or attempt.status < 1000, "upstream status")
        expect(attempt.received_bytes < _PLAUSIBLE_BYTES, "upstream sizes")
    return tuple(found)

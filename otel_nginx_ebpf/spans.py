"""From a completed request to its trace: pure, so that everything about a span's content is decided and tested here.

    SERVER    GET /api/            first request byte read → last response byte written
      INTERNAL  downstream read      first request byte → request and body complete
      INTERNAL  upstream connect     connect started → connected (with TLS: after the handshake), or failed
      CLIENT    upstream exchange    first byte sent upstream → last byte received from it
      INTERNAL  downstream write     first response byte → last response byte to the client

A phase that did not happen, or was not seen, has no span. Every span has a length: a boundary that the kernel sees only
once (a response written by one system call) begins where the worker was last seen at something else.
"""

import errno
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from opentelemetry.semconv._incubating.attributes import http_attributes as incubating_http
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.record import Attempt, Request
from otel_nginx_ebpf.sockaddr import Address, parse, parse_peer
from otel_nginx_ebpf.trace import AttributeValue, Span, Trace

NGINX_ATTEMPTS = "nginx.upstream.attempts"
NGINX_ATTEMPTS_LOST = "nginx.upstream.attempts_lost"
NGINX_CONNECTION_ID = "nginx.connection.id"
NGINX_CONNECTION_REQUESTS = "nginx.connection.requests"
NGINX_NO_LIVE_PEERS = "nginx.upstream.no_live_peers"
NGINX_SERVER_NAME = "nginx.server_name"
NGINX_TERMINATION = "nginx.termination"
NGINX_TRUNCATED = "nginx.truncated_attributes"
NGINX_UPSTREAM_ATTEMPT = "nginx.upstream.attempt"
NGINX_UPSTREAM_NAME = "nginx.upstream.name"
NGINX_UPSTREAM_PEER = "nginx.upstream.peer"
NGINX_UPSTREAM_REUSED = "nginx.upstream.connection.reused"
NGINX_UPSTREAM_STATUS = "nginx.upstream.status"
NGINX_UPSTREAM_TTFB = "nginx.upstream.time_to_first_byte_ns"
NGINX_SUBREQUEST_URI = "nginx.subrequest.uri"
NGINX_WORKER_PID = "nginx.worker.pid"

# Semantic conventions, http.request.method: RFC 9110, PATCH (RFC 5789) and QUERY.
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})

# Semantic conventions, url.query: values to redact by default.
_SENSITIVE_PARAMETERS = frozenset(
    {
        "AWSAccessKeyId",
        "Signature",
        "sig",
        "X-Goog-Signature",
        "X-Amz-Signature",
        "X-Amz-Credential",
        "X-Amz-Security-Token",
    }
)
_REDACTED = "REDACTED"

_SWITCHING_PROTOCOLS = 101
_GATEWAY_TIMEOUT = 504
_HTTP_VERSIONS = {9: "0.9", 1000: "1.0", 1001: "1.1", 2000: "2", 3000: "3"}
_TERMINATIONS = {408: "timeout", 499: "client_closed_request"}

# How far nginx's cached clock can lie behind when it notes that a response's header is complete.
_HEADER_CLOCK_SLACK_NS = 10_000_000


# Which attribute lacks its end where the kernel program cut a string.
_ATTRIBUTE_OF = {
    "STRING_METHOD": http_attributes.HTTP_REQUEST_METHOD,
    "STRING_URI": url_attributes.URL_PATH,
    "STRING_HOST": server_attributes.SERVER_ADDRESS,
    "STRING_USER_AGENT": user_agent_attributes.USER_AGENT_ORIGINAL,
    "STRING_LOCATION": http_attributes.HTTP_ROUTE,
    "STRING_SERVER_NAME": NGINX_SERVER_NAME,
    "STRING_CLIENT_SOCKADDR": client_attributes.CLIENT_ADDRESS,
    "STRING_LOCAL_SOCKADDR": server_attributes.SERVER_ADDRESS,
    "STRING_PEER": NGINX_UPSTREAM_PEER,
    "STRING_UPSTREAM": NGINX_UPSTREAM_NAME,
    "STRING_SUBREQUEST_URI": NGINX_SUBREQUEST_URI,
}


class IdGenerator(Protocol):
    """Makes ids; never 0. The SDK's own generators fit."""

    def generate_trace_id(self) -> int: ...

    def generate_span_id(self) -> int: ...


class RandomIds:
    """Random ids, as W3C Trace Context wants them."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._bits: Callable[[int], int] = (source or random.Random()).getrandbits

    def generate_trace_id(self) -> int:
        return self._bits(128) or 1

    def generate_span_id(self) -> int:
        return self._bits(64) or 1


def build_trace(
    request: Request,
    unix_offset_ns: int,
    ids: IdGenerator,
    *,
    query: bool = True,
    resource: Mapping[str, AttributeValue] | None = None,
) -> Trace:
    """The trace of one request.

    Args:
        request: The decoded record.
        unix_offset_ns: Unix time minus monotonic time, for all times of this request.
        ids: Makes the trace's and the spans' ids.
        query: Whether to keep the URI's query string; sensitive values in it are redacted.
        resource: Resource attributes of the nginx it is from.
    """
    server_id = ids.generate_span_id()

    def span(phase: "_Phase") -> Span:
        return Span(
            name=phase.name,
            kind=phase.kind,
            span_id=ids.generate_span_id(),
            parent_span_id=server_id,
            start_unix_ns=phase.start_mono_ns + unix_offset_ns,
            end_unix_ns=phase.end_mono_ns + unix_offset_ns,
            attributes=phase.attributes,
            error=phase.error,
        )

    phases = sorted(
        (phase for phase in _phases(request) if phase.end_mono_ns > phase.start_mono_ns),
        key=lambda phase: (phase.start_mono_ns, phase.end_mono_ns),
    )
    start_mono_ns = request.first_read_mono_ns or request.created_mono_ns
    server = Span(
        name=_server_name(request),
        kind=SpanKind.SERVER,
        span_id=server_id,
        parent_span_id=None,
        start_unix_ns=start_mono_ns + unix_offset_ns,
        end_unix_ns=_server_end_mono_ns(request, phases) + unix_offset_ns,
        attributes=_server_attributes(request, query),
        error=str(request.status) if request.status >= 500 else None,
    )
    return Trace(
        trace_id=ids.generate_trace_id(),
        spans=(server, *map(span, phases)),
        request=request,
        unix_offset_ns=unix_offset_ns,
        resource=resource or {},
    )


class _Phase:
    """A child span to be: its times are monotonic."""

    def __init__(
        self,
        name: str,
        start_mono_ns: int,
        end_mono_ns: int,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: dict[str, AttributeValue] | None = None,
        error: str | None = None,
    ) -> None:
        self.name = name
        self.start_mono_ns = start_mono_ns
        self.end_mono_ns = end_mono_ns
        self.kind = kind
        self.attributes = attributes or {}
        self.error = error


def _termination(request: Request) -> int:
    """The status with which nginx broke the request off, or 0.

    ngx_http_terminate_request sets the status where nothing was sent, but closes a request whose header had been read
    with rc 0."""
    if request.rc == 0 and request.sent_bytes == 0 and request.status in _TERMINATIONS:
        return request.status
    return request.rc


def _server_end_mono_ns(request: Request, phases: list[_Phase]) -> int:
    """The last response byte, or a child that ends later (a mirror's exchange). Where nothing was written, a tunnel was
    opened, or nginx broke the request off, the request's own end."""
    if request.last_write_mono_ns is None or _termination(request) or request.status == _SWITCHING_PROTOCOLS:
        return request.ended_mono_ns
    return max(request.last_write_mono_ns, *(phase.end_mono_ns for phase in phases), request.created_mono_ns)


def _phases(request: Request) -> Iterator[_Phase]:
    yield from _downstream_read(request)
    for index, attempt in enumerate(request.attempts):
        yield from _attempt_phases(request, attempt, index + 1)
    if request.first_write_mono_ns is not None and request.last_write_mono_ns is not None:
        yield _Phase("downstream write", request.first_write_mono_ns, request.last_write_mono_ns)


def _downstream_read(request: Request) -> Iterator[_Phase]:
    """Ends where the request is known to be complete: at its last read, or, when one read brought it whole, where nginx
    begins to work on it. A pipelined request whose bytes had come before has none."""
    start = request.first_read_mono_ns
    end = max(request.last_read_mono_ns or 0, request.created_mono_ns)
    if start is None and request.last_read_mono_ns is not None:
        start = request.created_mono_ns
    if start is not None:
        yield _Phase("downstream read", start, end)


def _attempt_phases(request: Request, attempt: Attempt, number: int) -> Iterator[_Phase]:
    shared = _peer_attributes(attempt, number)
    # nginx notes a connect time when it is about to send: with TLS not before the handshake has succeeded.
    ready = attempt.connect_ms is not None
    if attempt.connect_start_mono_ns is not None:
        if ready and attempt.connected_mono_ns is not None:
            yield _Phase(
                "upstream connect",
                attempt.connect_start_mono_ns,
                attempt.connected_mono_ns,
                attributes=shared,
            )
        else:
            error = _failure(attempt)
            yield _Phase(
                "upstream connect",
                attempt.connect_start_mono_ns,
                attempt.connect_failed_mono_ns or attempt.ended_mono_ns,
                attributes=shared | {error_attributes.ERROR_TYPE: error},
                error=error,
            )
    if ready and attempt.first_write_mono_ns is not None:
        yield _exchange(request, attempt, attempt.first_write_mono_ns, shared)


def _exchange(request: Request, attempt: Attempt, start_mono_ns: int, shared: dict[str, AttributeValue]) -> _Phase:
    attributes = shared | {
        NGINX_UPSTREAM_REUSED: attempt.connect_start_mono_ns is None,
        incubating_http.HTTP_RESPONSE_SIZE: attempt.received_bytes,
    }
    if attempt.sent_bytes is not None:
        attributes[incubating_http.HTTP_REQUEST_SIZE] = attempt.sent_bytes
    if request.method is not None and not attempt.subrequest:
        attributes[http_attributes.HTTP_REQUEST_METHOD] = _method(request.method)
    answered = attempt.header_ms is not None and attempt.status is not None
    error = None
    if answered:
        assert attempt.status is not None
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = attempt.status
        if attempt.status >= 400:
            error = str(attempt.status)
        first_byte_ns = _time_to_first_byte_ns(attempt, start_mono_ns)
        if first_byte_ns is not None:
            attributes[NGINX_UPSTREAM_TTFB] = first_byte_ns
    else:
        error = _failure(attempt)
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error

    broken_off = _termination(request) != 0 and attempt is request.attempts[-1]
    if answered and attempt.last_read_mono_ns and not broken_off and attempt.status != _SWITCHING_PROTOCOLS:
        end_mono_ns = attempt.last_read_mono_ns
    else:
        end_mono_ns = attempt.ended_mono_ns
    return _Phase("upstream exchange", start_mono_ns, end_mono_ns, SpanKind.CLIENT, attributes, error)


def _time_to_first_byte_ns(attempt: Attempt, start_mono_ns: int) -> int | None:
    """From the first byte sent to the first received.

    With TLS the first bytes read may be session tickets (RFC 8446, 4.6.1) or a gRPC server's settings and pings, and
    not the response's. They are believed only where nginx's own, coarser clock saw the header at the same time."""
    if attempt.first_read_mono_ns is None:
        return None
    if attempt.tls and attempt.header_ms is not None:
        header_mono_ns = (attempt.connect_start_mono_ns or start_mono_ns) + attempt.header_ms * 1_000_000
        if attempt.first_read_mono_ns < header_mono_ns - _HEADER_CLOCK_SLACK_NS:
            return None
    return attempt.first_read_mono_ns - start_mono_ns


def _failure(attempt: Attempt) -> str:
    """error.type of an attempt without a response."""
    if attempt.connect_errno:
        return errno.errorcode.get(attempt.connect_errno, "_OTHER")
    return "timeout" if attempt.status == _GATEWAY_TIMEOUT else "_OTHER"


def _peer_attributes(attempt: Attempt, number: int) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {NGINX_UPSTREAM_ATTEMPT: number}
    if attempt.peer is not None:
        attributes[NGINX_UPSTREAM_PEER] = attempt.peer
        _add_address(
            attributes,
            parse_peer(attempt.peer),
            server_attributes.SERVER_ADDRESS,
            server_attributes.SERVER_PORT,
        )
    if attempt.upstream is not None:
        attributes[NGINX_UPSTREAM_NAME] = attempt.upstream
    if attempt.status is not None:
        attributes[NGINX_UPSTREAM_STATUS] = attempt.status
    if attempt.subrequest_uri is not None:
        attributes[NGINX_SUBREQUEST_URI] = attempt.subrequest_uri
    return attributes


def _add_address(attributes: dict[str, AttributeValue], address: Address | None, host_key: str, port_key: str) -> None:
    if address is None:
        return
    attributes[host_key] = address.host
    if address.port:  # a client that a header names (realip) has port 0, which nginx prints as none
        attributes[port_key] = address.port


def _method(method: str) -> str:
    return method if method in _KNOWN_METHODS else "_OTHER"


def _server_name(request: Request) -> str:
    method = request.method if request.method in _KNOWN_METHODS else "HTTP"
    return f"{method} {request.location}" if request.location else method


def redact_query(query: str) -> str:
    """The query string with the values of sensitive parameters replaced, as the semantic conventions say."""
    parts = query.split("&")
    for index, part in enumerate(parts):
        name, equals, _ = part.partition("=")
        if equals and name in _SENSITIVE_PARAMETERS:
            parts[index] = f"{name}={_REDACTED}"
    return "&".join(parts)


def _host_and_port(request: Request, local: Address | None) -> tuple[str | None, int | None]:
    """server.address and server.port: from the Host header, the port from the listening socket where that has none."""
    host, port = request.host, local.port if local else None
    if host is None:
        return (local.host if local else None), port
    bare, colon, digits = host.rpartition(":")
    if colon and digits.isascii() and digits.isdigit() and len(digits) <= 5 and not bare.endswith(":"):
        host, port = bare, int(digits)
    return host.removeprefix("[").removesuffix("]"), port


def _server_attributes(request: Request, query: bool) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        url_attributes.URL_SCHEME: "https" if request.tls else "http",
        http_attributes.HTTP_RESPONSE_STATUS_CODE: request.status,
        incubating_http.HTTP_REQUEST_SIZE: request.request_bytes,
        incubating_http.HTTP_RESPONSE_SIZE: request.sent_bytes,
        NGINX_CONNECTION_ID: request.connection,
        NGINX_CONNECTION_REQUESTS: request.connection_requests,
        NGINX_WORKER_PID: request.worker_pid,
    }
    if request.method is not None:
        attributes[http_attributes.HTTP_REQUEST_METHOD] = _method(request.method)
        if request.method not in _KNOWN_METHODS:
            attributes[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = request.method
    if request.uri is not None:
        path, question, arguments = request.uri.partition("?")
        attributes[url_attributes.URL_PATH] = path
        if question and query:
            attributes[url_attributes.URL_QUERY] = redact_query(arguments)
    if request.cut:
        attributes[NGINX_TRUNCATED] = tuple(
            url_attributes.URL_QUERY if string == "STRING_URI" and "?" in (request.uri or "") else _ATTRIBUTE_OF[string]
            for string in request.cut
        )
    if request.location:
        attributes[http_attributes.HTTP_ROUTE] = request.location
    if request.user_agent:
        attributes[user_agent_attributes.USER_AGENT_ORIGINAL] = request.user_agent
    if request.server_name:
        attributes[NGINX_SERVER_NAME] = request.server_name
    if request.method is not None and request.http_version in _HTTP_VERSIONS:
        # Without a method nginx could not parse the request line, and the version is its default.
        attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = _HTTP_VERSIONS[request.http_version]
    if request.status >= 500:
        attributes[error_attributes.ERROR_TYPE] = str(request.status)
    if (termination := _termination(request)) in _TERMINATIONS:
        attributes[NGINX_TERMINATION] = _TERMINATIONS[termination]

    local = parse(request.local_sockaddr) if request.local_sockaddr else None
    client = parse(request.client_sockaddr) if request.client_sockaddr else None
    _add_address(attributes, client, client_attributes.CLIENT_ADDRESS, client_attributes.CLIENT_PORT)
    host, port = _host_and_port(request, local)
    if host is not None:
        attributes[server_attributes.SERVER_ADDRESS] = host
    if port is not None:
        attributes[server_attributes.SERVER_PORT] = port

    if request.attempts:
        attributes[NGINX_ATTEMPTS] = len(request.attempts)
    if request.attempts_lost:
        attributes[NGINX_ATTEMPTS_LOST] = request.attempts_lost
    own_attempts = sum(not attempt.subrequest for attempt in request.attempts)
    if not request.attempts_lost and request.upstream_states > own_attempts:
        attributes[NGINX_NO_LIVE_PEERS] = request.upstream_states - own_attempts
    return attributes

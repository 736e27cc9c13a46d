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
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from operator import itemgetter
from typing import Generic, Protocol, TypeVar

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

from otel_nginx_ebpf.traces.model import AttributeValue, Span, Trace
from otel_nginx_ebpf.traces.record import HTTP_VERSIONS, METHODS, Attempt, Request, http_status
from otel_nginx_ebpf.traces.sockaddr import Address, parse, parse_peer
from otel_nginx_ebpf.traces.trace_state import canonical

DOWNSTREAM_READ = "downstream read"
DOWNSTREAM_WRITE = "downstream write"
UPSTREAM_CONNECT = "upstream connect"
UPSTREAM_EXCHANGE = "upstream exchange"

NGINX_ATTEMPTS = "nginx.upstream.attempts"
NGINX_ATTEMPTS_LOST = "nginx.upstream.attempts_lost"
NGINX_CONNECTION_ID = "nginx.connection.id"
NGINX_CONNECTION_REQUESTS = "nginx.connection.requests"
NGINX_NO_LIVE_PEERS = "nginx.upstream.no_live_peers"
NGINX_SAMPLING_KEPT_FOR = "nginx.sampling.kept_for"
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

_KNOWN_METHODS = frozenset(METHODS.values())

# Semantic conventions, url.query: values to redact by default.
_SENSITIVE = re.compile(
    r"((?:^|(?<=&))(?:AWSAccessKeyId|Signature|sig|X-Goog-Signature|X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token))"
    r"=[^&]*"
)

_GATEWAY_TIMEOUT = 504

# Endings that are the server side's fault: a response that was not whole is an error, whatever its status (semantic
# conventions, HTTP spans, Status).
_FAULTS = frozenset({"upstream_incomplete", "upstream_timeout", "shutdown", "aborted"})

# error.type of an exchange whose response had begun.
_INCOMPLETE = {"incomplete": "incomplete_response", "timeout": "timeout"}

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
    """Makes span ids; never 0. The SDK's own generators fit."""

    def generate_span_id(self) -> int: ...


class RandomIds:
    """Random ids, as W3C Trace Context wants them."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._bits: Callable[[int], int] = (source or random.Random()).getrandbits

    def generate_span_id(self) -> int:
        return self._bits(64) or 1


@dataclass(slots=True)
class Part:
    """What a span has in common with other requests'. The first of a span's parts has its name, kind and error."""

    attributes: Mapping[str, AttributeValue]
    name: str | None = None
    kind: SpanKind = SpanKind.INTERNAL
    error: str | None = None


P = TypeVar("P")

Sketch = tuple[int, int, int, tuple[P, ...]]
"""A span: its start and end in CLOCK_MONOTONIC nanoseconds, its id, its parts."""

# How many parts are kept of those made of the configuration's strings, and of those made of a request's own.
_KEPT_PARTS = 1024
_KEPT_OWN_PARTS = 256


class Sketcher(Generic[P]):
    """Decides which spans a request has. What it has in common with others is made once, and kept as `make` returns it:
    for the readable model the `Part` itself, for an encoder bytes."""

    def __init__(self, make: Callable[[Part], P], number: Callable[[str], Callable[[int], P]], *, query: bool) -> None:
        """`number(name)` makes a part with one attribute, whose value differs from request to request. Without `query`
        the query strings of URIs are left out."""

        def kept(part: Callable[..., Part], count: int = _KEPT_PARTS) -> Callable[..., P]:
            return lru_cache(count)(lambda *facts: make(part(*facts)))

        self._server_part = kept(_server_part)
        self._connect_part = kept(_connect_part)
        self._exchange_part = kept(_exchange_part)
        self._uri_part = kept(lambda uri: _uri_part(uri, query), _KEPT_OWN_PARTS)
        self._client_part = kept(_client_part, _KEPT_OWN_PARTS)
        self._user_agent_part = kept(_user_agent_part, _KEPT_OWN_PARTS)
        self._cut_part = kept(_cut_part)
        self._request_size = number(incubating_http.HTTP_REQUEST_SIZE)
        self._response_size = number(incubating_http.HTTP_RESPONSE_SIZE)
        self._connection_id = number(NGINX_CONNECTION_ID)
        self._connection_requests = number(NGINX_CONNECTION_REQUESTS)
        self._first_byte = number(NGINX_UPSTREAM_TTFB)
        self._read_parts = (make(Part({}, DOWNSTREAM_READ)),)
        self._write_parts = (make(Part({}, DOWNSTREAM_WRITE)),)

    def sketch(self, request: Request, new_id: Callable[[], int]) -> list[Sketch[P]]:
        """The SERVER span, then the others by start time. What did not happen, or was not seen, has none."""
        server_id = new_id()
        children = []
        last_end_mono_ns = request.created_mono_ns
        for child in self._children(request, new_id):
            start_mono_ns, end_mono_ns = child[0], child[1]
            if end_mono_ns > start_mono_ns:
                children.append(child)
                if end_mono_ns > last_end_mono_ns:
                    last_end_mono_ns = end_mono_ns
        children.sort(key=itemgetter(0))
        return [
            (
                request.first_read_mono_ns or request.created_mono_ns,
                _server_end_mono_ns(request, last_end_mono_ns),
                server_id,
                self._server_parts(request),
            ),
            *children,
        ]

    def _server_parts(self, request: Request) -> tuple[P, ...]:
        attempts = request.attempts
        attempts_lost, no_live_peers = request.attempts_lost, 0
        for peer in request.unseen_peers:
            if parse_peer(peer) is None:  # the upstream's own name
                no_live_peers += 1
            else:
                attempts_lost += 1
        parts = [
            self._server_part(
                request.method,
                request.location,
                request.host,
                request.local_sockaddr,
                request.server_name,
                request.tls,
                request.http_version,
                request.status,
                request.worker_pid,
                request.ending,
                len(attempts),
                attempts_lost,
                no_live_peers,
                request.kept,
            ),
            self._connection_id(request.connection),
            self._connection_requests(request.connection_requests),
        ]
        if request.request_bytes is not None:
            parts.append(self._request_size(request.request_bytes))
        if request.sent_bytes is not None:
            parts.append(self._response_size(request.sent_bytes))
        if request.uri is not None:
            parts.append(self._uri_part(request.uri))
        if request.client_sockaddr is not None:
            parts.append(self._client_part(request.client_sockaddr))
        if request.user_agent is not None:
            parts.append(self._user_agent_part(request.user_agent))
        if request.cut:
            parts.append(self._cut_part(request.cut, "?" in (request.uri or "")))
        return tuple(parts)

    def _children(self, request: Request, new_id: Callable[[], int]) -> Iterator[Sketch[P]]:
        # A request that one read brought whole is complete where nginx begins to work on it. One whose bytes had all
        # come before (pipelining) has no read.
        start_mono_ns = request.first_read_mono_ns
        last_read_mono_ns = request.last_read_mono_ns
        if start_mono_ns is None and last_read_mono_ns is not None:
            start_mono_ns = request.created_mono_ns
        if start_mono_ns is not None:
            end_mono_ns = max(last_read_mono_ns or 0, request.created_mono_ns)
            yield start_mono_ns, end_mono_ns, new_id(), self._read_parts

        for number, attempt in enumerate(request.attempts, 1):
            start_mono_ns = attempt.connect_start_mono_ns
            if start_mono_ns is not None:
                connected = attempt.connect_ms is not None and attempt.connected_mono_ns is not None
                error = None if connected else failure(attempt.connect_errno, attempt.status, attempt.outcome)
                end_mono_ns = (
                    attempt.connected_mono_ns if connected else attempt.connect_failed_mono_ns
                ) or attempt.ended_mono_ns
                part = self._connect_part(*_peer_facts(attempt, number), error)
                yield start_mono_ns, end_mono_ns, new_id(), (part,)
            if has_exchange(attempt):
                yield self._exchange(request, attempt, number, new_id)

        if request.first_write_mono_ns is not None and request.last_write_mono_ns is not None:
            yield request.first_write_mono_ns, request.last_write_mono_ns, new_id(), self._write_parts

    def _exchange(self, request: Request, attempt: Attempt, number: int, new_id: Callable[[], int]) -> Sketch[P]:
        start_mono_ns = attempt.first_write_mono_ns
        assert start_mono_ns is not None
        answered = is_answered(attempt)
        parts = [
            self._exchange_part(
                *_peer_facts(attempt, number),
                _is_reused(attempt),
                None if attempt.subrequest else request.method,
                answered,
                exchange_error(answered, attempt.connect_errno, attempt.status, attempt.outcome),
            ),
        ]
        if attempt.received_bytes is not None:
            parts.append(self._response_size(attempt.received_bytes))
        if attempt.sent_bytes is not None:
            parts.append(self._request_size(attempt.sent_bytes))
        if answered:
            first_byte_ns = _time_to_first_byte_ns(attempt, start_mono_ns)
            if first_byte_ns is not None:
                parts.append(self._first_byte(first_byte_ns))
        span_id = _exchange_id(request.attempts, number) or new_id()
        return start_mono_ns, _exchange_end_mono_ns(attempt), span_id, tuple(parts)


@lru_cache
def _readable(query: bool) -> Sketcher[Part]:
    return Sketcher(lambda part: part, lambda name: lambda value: Part({name: value}), query=query)


def sketches(request: Request) -> list[Sketch[Part]]:
    """The spans of one request, to be measured: the ids mean nothing."""
    return _readable(False).sketch(request, count(1).__next__)


def build_trace(
    request: Request,
    unix_offset_ns: int,
    ids: IdGenerator,
    *,
    query: bool = True,
    resource: Mapping[str, AttributeValue] | None = None,
) -> Trace:
    """The trace of one request, to be read.

    Args:
        request: The decoded record.
        unix_offset_ns: Unix time minus monotonic time, for all times of this request.
        ids: Makes the spans' ids.
        query: Whether to keep the URI's query string; sensitive values in it are redacted.
        resource: Resource attributes of the nginx it is from.
    """
    server, *children = _readable(query).sketch(request, ids.generate_span_id)

    def span(sketch: Sketch[Part], parent_span_id: int | None) -> Span:
        start_mono_ns, end_mono_ns, span_id, parts = sketch
        attributes: dict[str, AttributeValue] = {}
        for part in parts:
            attributes |= part.attributes
        return Span(
            name=parts[0].name or "",
            kind=parts[0].kind,
            span_id=span_id,
            parent_span_id=parent_span_id,
            start_unix_ns=start_mono_ns + unix_offset_ns,
            end_unix_ns=end_mono_ns + unix_offset_ns,
            attributes=attributes,
            error=parts[0].error,
        )

    return Trace(
        trace_id=request.trace_id,
        spans=(span(server, request.parent_span_id), *(span(child, server[2]) for child in children)),
        request=request,
        unix_offset_ns=unix_offset_ns,
        resource=resource or {},
        trace_flags=request.trace_flags,
        trace_state=canonical(request.trace_state),
    )


def _server_end_mono_ns(request: Request, last_child_mono_ns: int) -> int:
    """The last response byte, or a child that ends later.

    The request's own end where nginx went on afterwards (a mirror's exchange, post_action), gave the response up,
    opened a tunnel, or wrote nothing.
    """
    if request.last_write_mono_ns is None or not request.ends_with_write:
        return request.ended_mono_ns
    return max(request.last_write_mono_ns, last_child_mono_ns)


def _exchange_id(attempts: tuple[Attempt, ...], number: int) -> int | None:
    """The id that the peer of an exchange was told, where the exchange is the one to have it.

    nginx writes one text for all attempts of a request and, with proxy_set_header, of its subrequests. The last attempt
    has it, a subrequest's only where no other has: that is whose answer the client got."""
    own = attempts[number - 1]
    if own.span_id is None or len(attempts) == 1:
        return own.span_id
    told = [attempt for attempt in attempts if attempt.span_id == own.span_id and has_exchange(attempt)]
    last = ([attempt for attempt in told if not attempt.subrequest] or told)[-1]
    return own.span_id if last is own else None


def has_exchange(attempt: Attempt) -> bool:
    """Whether anything was sent to the peer."""
    # nginx notes a connect time when it is about to send: with TLS not before the handshake has succeeded.
    return attempt.connect_ms is not None and attempt.first_write_mono_ns is not None


def is_answered(attempt: Attempt) -> bool:
    """Whether the peer sent a response."""
    return attempt.header_ms is not None and attempt.status is not None


def exchange_times(request: Request) -> Iterator[tuple[Attempt, int, int]]:
    """Of each attempt that has an exchange its start and end, CLOCK_MONOTONIC nanoseconds."""
    for attempt in request.attempts:
        if attempt.first_write_mono_ns is not None and has_exchange(attempt):
            yield attempt, attempt.first_write_mono_ns, _exchange_end_mono_ns(attempt)


def _exchange_end_mono_ns(attempt: Attempt) -> int:
    if attempt.last_read_mono_ns is None or not attempt.ends_with_read:
        return attempt.ended_mono_ns
    return attempt.last_read_mono_ns


def _is_reused(attempt: Attempt) -> bool | None:
    """None: nginx's clock was too coarse to see it connect, or there was nothing to see (`--detail request`)."""
    if attempt.connect_start_mono_ns is None and attempt.connected_mono_ns is not None:
        return None
    return attempt.connect_start_mono_ns is None


def _time_to_first_byte_ns(attempt: Attempt, start_mono_ns: int) -> int | None:
    """From the first byte sent to the first received.

    With TLS the first bytes read may be session tickets (RFC 8446, 4.6.1) or a gRPC server's settings and pings, and
    not the response's. They are believed only where nginx's own, coarser clock saw the header at the same time."""
    if attempt.first_read_mono_ns is None or attempt.first_read_mono_ns < start_mono_ns:
        return None  # what a peer says before it is asked is no response
    if attempt.tls and attempt.header_ms is not None:
        header_mono_ns = (attempt.connect_start_mono_ns or start_mono_ns) + attempt.header_ms * 1_000_000
        if attempt.first_read_mono_ns < header_mono_ns - _HEADER_CLOCK_SLACK_NS:
            return None
    return attempt.first_read_mono_ns - start_mono_ns


def failure(connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """error.type of an attempt without a response. None: nginx gave it up for no fault of the peer."""
    if connect_errno:
        return errno.errorcode.get(connect_errno, "_OTHER")
    if outcome == "abandoned":
        return None
    return "timeout" if status == _GATEWAY_TIMEOUT else "_OTHER"


def exchange_error(answered: bool, connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """error.type of an exchange: no response, a status from 400 on, or a response that did not come whole."""
    if not answered:
        return failure(connect_errno, status, outcome)
    code = http_status(status)
    if code is not None and code >= 400:
        return str(code)
    return _INCOMPLETE.get(outcome or "")


def server_error(status: int, ending: str | None) -> str | None:
    """error.type of a SERVER span: a status from 500 on, or the server side's fault that the response was not whole."""
    code = http_status(status)
    if code is not None and code >= 500:
        return str(code)
    return ending if ending in _FAULTS else None


PeerFacts = tuple[int, str | None, str | None, int | None, str | None]


def _peer_facts(attempt: Attempt, number: int) -> PeerFacts:
    return number, attempt.peer, attempt.upstream, attempt.status, attempt.subrequest_uri


def _peer_attributes(
    number: int, peer: str | None, upstream: str | None, status: int | None, subrequest_uri: str | None
) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {NGINX_UPSTREAM_ATTEMPT: number}
    if peer is not None:
        attributes[NGINX_UPSTREAM_PEER] = peer
        _add_address(attributes, parse_peer(peer), server_attributes.SERVER_ADDRESS, server_attributes.SERVER_PORT)
    if upstream is not None:
        attributes[NGINX_UPSTREAM_NAME] = upstream
    if status is not None:
        attributes[NGINX_UPSTREAM_STATUS] = status
    if subrequest_uri is not None:
        attributes[NGINX_SUBREQUEST_URI] = subrequest_uri
    return attributes


def _connect_part(
    number: int,
    peer: str | None,
    upstream: str | None,
    status: int | None,
    subrequest_uri: str | None,
    error: str | None,
) -> Part:
    attributes = _peer_attributes(number, peer, upstream, status, subrequest_uri)
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    return Part(attributes, UPSTREAM_CONNECT, error=error)


def _exchange_part(
    number: int,
    peer: str | None,
    upstream: str | None,
    status: int | None,
    subrequest_uri: str | None,
    reused: bool | None,
    method: str | None,
    answered: bool,
    error: str | None,
) -> Part:
    attributes = _peer_attributes(number, peer, upstream, status, subrequest_uri)
    if reused is not None:
        attributes[NGINX_UPSTREAM_REUSED] = reused
    if method is not None:
        attributes[http_attributes.HTTP_REQUEST_METHOD] = known_method(method)
    if answered and (code := http_status(status)) is not None:
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = code
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    return Part(attributes, UPSTREAM_EXCHANGE, SpanKind.CLIENT, error)


def _add_address(attributes: dict[str, AttributeValue], address: Address | None, host_key: str, port_key: str) -> None:
    if address is None:
        return
    attributes[host_key] = address.host
    if address.port:  # a client that a header names (realip) has port 0, which nginx prints as none
        attributes[port_key] = address.port


def known_method(method: str) -> str:
    """http.request.method."""
    return method if method in _KNOWN_METHODS else "_OTHER"


def redact_query(query: str) -> str:
    """The query string with the values of sensitive parameters replaced, as the semantic conventions say."""
    return _SENSITIVE.sub(r"\1=REDACTED", query)


def _host_and_port(host: str | None, local: Address | None) -> tuple[str | None, int | None]:
    """server.address and server.port: from the Host header, the port from the listening socket where that has none."""
    port = local.port if local else None
    if host is None:
        return (local.host if local else None), port
    bare, colon, digits = host.rpartition(":")
    if colon and digits.isascii() and digits.isdigit() and len(digits) <= 5 and not bare.endswith(":"):
        host, port = bare, int(digits)
    return host.removeprefix("[").removesuffix("]"), port


def _server_part(
    method: str | None,
    location: str | None,
    host: str | None,
    local_sockaddr: bytes | None,
    server_name: str | None,
    tls: bool,
    http_version: int,
    status: int,
    worker_pid: int,
    ending: str | None,
    attempts: int,
    attempts_lost: int,
    no_live_peers: int,
    kept: str | None,
) -> Part:
    attributes: dict[str, AttributeValue] = {
        url_attributes.URL_SCHEME: "https" if tls else "http",
        NGINX_WORKER_PID: worker_pid,
    }
    if (code := http_status(status)) is not None:
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = code
    name = "HTTP"
    if method is not None:
        attributes[http_attributes.HTTP_REQUEST_METHOD] = known_method(method)
        if method in _KNOWN_METHODS:
            name = method
        else:
            attributes[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = method
        # Without a method nginx could not parse the request line, and the version is its default.
        if http_version in HTTP_VERSIONS:
            attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = HTTP_VERSIONS[http_version]
    if location:
        attributes[http_attributes.HTTP_ROUTE] = location
        name = f"{name} {location}"
    if server_name:
        attributes[NGINX_SERVER_NAME] = server_name
    error = server_error(status, ending)
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    if ending is not None:
        attributes[NGINX_TERMINATION] = ending
    if kept is not None:
        attributes[NGINX_SAMPLING_KEPT_FOR] = kept

    address, port = _host_and_port(host, parse(local_sockaddr) if local_sockaddr else None)
    if address is not None:
        attributes[server_attributes.SERVER_ADDRESS] = address
    if port is not None:
        attributes[server_attributes.SERVER_PORT] = port

    if attempts:
        attributes[NGINX_ATTEMPTS] = attempts
    if attempts_lost:
        attributes[NGINX_ATTEMPTS_LOST] = attempts_lost
    if no_live_peers > 0:
        attributes[NGINX_NO_LIVE_PEERS] = no_live_peers
    return Part(attributes, name, SpanKind.SERVER, error)


def _uri_part(uri: str, query: bool) -> Part:
    path, question, arguments = uri.partition("?")
    attributes: dict[str, AttributeValue] = {url_attributes.URL_PATH: path}
    if question and query:
        attributes[url_attributes.URL_QUERY] = redact_query(arguments)
    return Part(attributes)


def _client_part(sockaddr: bytes) -> Part:
    attributes: dict[str, AttributeValue] = {}
    _add_address(attributes, parse(sockaddr), client_attributes.CLIENT_ADDRESS, client_attributes.CLIENT_PORT)
    return Part(attributes)


def _user_agent_part(user_agent: str) -> Part:
    return Part({user_agent_attributes.USER_AGENT_ORIGINAL: user_agent})


def _cut_part(cut: tuple[str, ...], has_query: bool) -> Part:
    attribute_of = _ATTRIBUTE_OF | ({"STRING_URI": url_attributes.URL_QUERY} if has_query else {})
    names = tuple(attribute_of[string] for string in cut if string in attribute_of)
    return Part({NGINX_TRUNCATED: names})

"""Builds the spans of a trace from the phases of a request. Pure, so that tests can check a span's content.

    SERVER    GET /api/            first request byte read → last response byte written
      INTERNAL  downstream read      first request byte → request and body complete
      INTERNAL  upstream connect     connect started → connected (with TLS: after the handshake); CLIENT if it failed
      CLIENT    upstream exchange    first byte sent upstream → last byte received from it
      INTERNAL  downstream write     first response byte → last response byte to the client

Every phase has a span, and every span has a length. The kernel sees some phases only once, such as a response that one
system call writes. Such a phase begins when the worker was last seen doing something else.
"""

import random
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import repeat
from typing import Generic, Protocol, TypeVar

from opentelemetry.semconv._incubating.attributes import http_attributes as incubating_http
from opentelemetry.semconv.attributes import http_attributes, url_attributes

from otel_nginx_ebpf.traces import attributes, captured_headers, upstream_attributes
from otel_nginx_ebpf.traces.attributes import SpanFields
from otel_nginx_ebpf.traces.authority import of_absolute_form
from otel_nginx_ebpf.traces.choices import DEFAULT_CHOICES, SpanChoices
from otel_nginx_ebpf.traces.events import events_of
from otel_nginx_ebpf.traces.forwarded import Origin, origin
from otel_nginx_ebpf.traces.model import AttributeValue, Span, Trace
from otel_nginx_ebpf.traces.phases import (
    DOWNSTREAM_READ,
    DOWNSTREAM_WRITE,
    REQUEST,
    UPSTREAM_CONNECT,
    UPSTREAM_EXCHANGE,
    Phase,
    has_exchange,
    is_answered,
    is_failed_connect,
    phases_of,
    time_to_first_byte_ns,
)
from otel_nginx_ebpf.traces.record import Attempt, Request
from otel_nginx_ebpf.traces.sent import full_url, parse_line, resend_count, sent_method
from otel_nginx_ebpf.traces.sockaddr import parse_peer
from otel_nginx_ebpf.traces.trace_state import canonical
from otel_nginx_ebpf.traces.url import redact_query


class IdGenerator(Protocol):
    """Makes span ids, which are never 0. The SDK's own generators fit."""

    def generate_span_id(self) -> int: ...


class RandomIds:
    """Makes random ids, as W3C Trace Context asks for."""

    def __init__(self, source: random.Random | None = None) -> None:
        bits = (source or random.Random()).getrandbits
        self.generate_span_id: Callable[[], int] = filter(None, map(bits, repeat(64))).__next__


F = TypeVar("F")

BuiltSpan = tuple[Phase, int, tuple[F, ...]]
"""A span: its phase, its id and its fields."""

# Cache sizes: for fields made of the configuration's strings, and for fields made of a request's own strings.
_KEPT_FIELDS = 1024
_KEPT_OWN_FIELDS = 256


class SpanBuilder(Generic[F]):
    """Builds the spans of requests.

    Fields that many requests share are made once, and cached as `make` returns them: as `SpanFields` for the readable
    model, as bytes for an encoder.
    """

    def __init__(
        self,
        make: Callable[[SpanFields], F],
        number: Callable[[str], Callable[[int], F]],
        text: Callable[[str], Callable[[str], F]],
        choices: SpanChoices,
    ) -> None:
        """`number(name)` and `text(name)` return functions that make an attribute whose value requests do not share."""

        def kept(fields: Callable[..., SpanFields], count: int = _KEPT_FIELDS) -> Callable[..., F]:
            return lru_cache(count)(lambda *facts: make(fields(*facts)))

        self._server = kept(partial(attributes.server_fields, choices))
        self._connect = kept(upstream_attributes.connect_fields)
        self._sent = kept(partial(upstream_attributes.request_fields, choices))
        self._url = text(url_attributes.URL_FULL)
        self._query = choices.query
        self._url_path = text(url_attributes.URL_PATH)
        self._url_query = text(url_attributes.URL_QUERY)
        self._client = kept(partial(attributes.client_fields, choices), _KEPT_OWN_FIELDS)
        self._user_agent = kept(attributes.user_agent_fields, _KEPT_OWN_FIELDS)
        self._header = kept(attributes.header_fields, _KEPT_OWN_FIELDS)
        self._cut = kept(attributes.cut_fields)
        chosen = choices.opt_in
        self._request_size = _number_if(incubating_http.HTTP_REQUEST_SIZE, chosen, number)
        self._response_size = _number_if(incubating_http.HTTP_RESPONSE_SIZE, chosen, number)
        self._connection_id = number(attributes.NGINX_CONNECTION_ID)
        self._connection_requests = number(attributes.NGINX_CONNECTION_REQUESTS)
        self._handshake = number(attributes.NGINX_TLS_HANDSHAKE)
        self._longest_turn = number(attributes.NGINX_WORKER_LONGEST_TURN)
        self._resend_count = number(http_attributes.HTTP_REQUEST_RESEND_COUNT)
        self._first_byte = number(attributes.NGINX_UPSTREAM_TTFB)
        self._trusts = _trust(choices.trusted_proxies)
        self._origin = lru_cache(_KEPT_OWN_FIELDS)(origin)
        self.downstream = {name: (make(SpanFields({}, name)),) for name in (DOWNSTREAM_READ, DOWNSTREAM_WRITE)}

    def build(self, request: Request, new_id: Callable[[], int]) -> list[BuiltSpan[F]]:
        """Returns the span of each phase, in the order of `phases_of`: the SERVER span first."""
        spans = []
        for phase in phases_of(request):
            _, _, kind, number, error = phase
            span_id = None
            if kind == UPSTREAM_EXCHANGE:
                fields = self._exchange_fields(request, number, error)
                span_id = told_id(request.attempts, number)
            elif kind == UPSTREAM_CONNECT:
                fields = self._connect_fields(request, number, error)
            elif kind == REQUEST:
                fields = self._server_fields(request, error)
            else:
                fields = self.downstream[kind]
            spans.append((phase, span_id or new_id(), fields))
        return spans

    def _server_fields(self, request: Request, error: str | None) -> tuple[F, ...]:
        fields = [
            self.server_fields(request, error),
            *self.own_server_fields(
                request.connection,
                request.connection_requests,
                request.request_bytes,
                request.sent_bytes,
                request.uri,
                request.client_sockaddr,
                request.peer_sockaddr,
                request.user_agent,
                request.captured_headers,
                request.handshake_ns,
                request.longest_turn_ns,
            ),
        ]
        headers = request.captured_headers
        cut_headers = captured_headers.parse(headers)[1] if headers else ()
        if request.cut or cut_headers or request.headers_missing:
            fields.append(self._cut(request.cut, "?" in (request.uri or ""), cut_headers, request.headers_missing))
        return tuple(fields)

    def server_fields(self, request: Request, error: str | None) -> F:
        """Returns the fields of a SERVER span that many requests share."""
        attempts_lost, no_live_peers = request.attempts_lost, 0
        for peer in request.unseen_peers:
            if parse_peer(peer) is None:  # the upstream's name: no peer was live
                no_live_peers += 1
            else:
                attempts_lost += 1
        target = request.request_target
        return self._server(
            request.method,
            request.location,
            request.host if target is None else _host_of(target, request.host),
            self._told(request) if self.trusts(request.peer_sockaddr) else None,
            request.local_sockaddr,
            request.server_name,
            request.tls,
            request.http_version,
            request.status,
            request.worker_pid,
            request.ending,
            len(request.attempts),
            attempts_lost,
            no_live_peers,
            request.cache_status,
            request.limit_req_status,
            request.limit_conn_status,
            request.waited_for_cache,
            request.kept,
            request.rule,
            error,
        )

    def own_server_fields(
        self,
        connection: int,
        connection_requests: int,
        request_bytes: int | None,
        sent_bytes: int | None,
        uri: str | None,
        client_sockaddr: bytes | None,
        peer_sockaddr: bytes | None,
        user_agent: str | None,
        headers: bytes,
        handshake_ns: int | None,
        longest_turn_ns: int | None,
    ) -> list[F]:
        """Returns the fields of a SERVER span that requests do not share."""
        fields = [self._connection_id(connection), self._connection_requests(connection_requests)]
        if self._request_size is not None and request_bytes is not None:
            fields.append(self._request_size(request_bytes))
        if self._response_size is not None and sent_bytes is not None:
            fields.append(self._response_size(sent_bytes))
        if uri is not None:
            path, question, arguments = uri.partition("?")
            fields.append(self._url_path(path))
            if question and self._query:
                fields.append(self._url_query(redact_query(arguments)))
        if client_sockaddr is not None or peer_sockaddr is not None:
            fields.append(self._client(client_sockaddr, peer_sockaddr))
        if user_agent is not None:
            fields.append(self._user_agent(user_agent))
        if headers:
            fields += [self._header(*header) for header in captured_headers.parse(headers)[0].items()]
        if handshake_ns:
            fields.append(self._handshake(handshake_ns))
        if longest_turn_ns:
            fields.append(self._longest_turn(longest_turn_ns))
        return fields

    def trusts(self, peer_sockaddr: bytes | None) -> bool:
        """Tells whether the word of the socket's peer about the client's request counts."""
        return self._trusts is not None and peer_sockaddr is not None and self._trusts(peer_sockaddr)

    def _told(self, request: Request) -> Origin:
        """Returns what the proxy in front of nginx says about the client's request."""
        forwarded, proto, host, cut = (
            request.forwarded,
            request.x_forwarded_proto,
            request.x_forwarded_host,
            request.cut,
        )
        if cut:  # the proxy's element is the last, and is what was cut off
            forwarded = None if "STRING_FORWARDED" in cut else forwarded
            proto = None if "STRING_X_FORWARDED_PROTO" in cut else proto
            host = None if "STRING_X_FORWARDED_HOST" in cut else host
        return self._origin(forwarded, proto, host)

    def _connect_fields(self, request: Request, number: int, error: str | None) -> tuple[F, ...]:
        attempt = request.attempts[number - 1]
        if is_failed_connect(attempt, error):
            return tuple(self._sent_fields(UPSTREAM_CONNECT, request, number, False, error))
        return (self.connect_fields(number, attempt, error),)

    def connect_fields(self, number: int, attempt: Attempt, error: str | None) -> F:
        """Returns the fields of a connect after which nginx could send its request."""
        return self._connect(number, attempt.peer, attempt.upstream, attempt.status, attempt.subrequest_uri, error)

    def _exchange_fields(self, request: Request, number: int, error: str | None) -> tuple[F, ...]:
        attempt = request.attempts[number - 1]
        fields = self._sent_fields(UPSTREAM_EXCHANGE, request, number, is_answered(attempt), error)
        fields += self.own_exchange_fields(attempt.sent_bytes, attempt.received_bytes, time_to_first_byte_ns(attempt))
        return tuple(fields)

    def own_exchange_fields(
        self, sent_bytes: int | None, received_bytes: int | None, first_byte_ns: int | None
    ) -> list[F]:
        """Returns the numbers of an exchange."""
        fields = []
        if self._response_size is not None and received_bytes is not None:
            fields.append(self._response_size(received_bytes))
        if self._request_size is not None and sent_bytes is not None:
            fields.append(self._request_size(sent_bytes))
        if first_byte_ns is not None:
            fields.append(self._first_byte(first_byte_ns))
        return fields

    def _sent_fields(self, phase: str, request: Request, number: int, answered: bool, error: str | None) -> list[F]:
        """Returns the fields of a CLIENT span: what the peer was sent, or would have been sent."""
        attempt = request.attempts[number - 1]
        method, target, version = parse_line(attempt.sent_line) if attempt.sent_line is not None else (None, None, None)
        asked = self.asked(attempt, target)
        return [
            self.sent_fields(phase, request, number, method, version, asked, answered, error),
            *self.url_fields(attempt, target, version, asked),
            *self.resend_fields(request.attempts, number),
        ]

    @staticmethod
    def asked(attempt: Attempt, target: str | None) -> str | None:
        """Returns the authority that the peer was asked for. `None`: not known."""
        if target is None or target.startswith("/"):
            return attempt.sent_host
        return _host_of(target, attempt.sent_host)

    def resend_fields(self, attempts: tuple[Attempt, ...], number: int) -> tuple[F, ...]:
        count = resend_count(attempts, number) if number > 1 else 0
        return (self._resend_count(count),) if count else ()

    def sent_fields(
        self,
        phase: str,
        request: Request,
        number: int,
        method: str | None,
        version: str | None,
        asked: str | None,
        answered: bool,
        error: str | None,
    ) -> F:
        """Returns the fields of a CLIENT span that many requests share. `method`, `version`, `asked`: as sent."""
        attempt = request.attempts[number - 1]
        return self._sent(
            phase,
            number,
            attempt.peer,
            attempt.upstream,
            attempt.status,
            attempt.subrequest_uri,
            attempt.protocol,
            attempt.tls,
            sent_method(request, attempt, method),
            version,
            asked,
            _is_reused(attempt) if phase == UPSTREAM_EXCHANGE else None,
            answered,
            error,
        )

    def url_fields(self, attempt: Attempt, target: str | None, version: str | None, asked: str | None) -> tuple[F, ...]:
        """Returns the URL that the peer was sent, if it is known."""
        # An HTTP/2 request without :authority may have its host in another field.
        if target is None or (asked is None and version == "2"):
            return ()
        url = full_url(target, attempt.sent_host, attempt.peer, attempt.tls, self._query)
        return () if url is None else (self._url(url),)


def _number_if(
    name: str, chosen: frozenset[str], number: Callable[[str], Callable[[int], F]]
) -> Callable[[int], F] | None:
    return number(name) if name in chosen else None


def _trust(proxies: tuple[str, ...]) -> Callable[[bytes], bool] | None:
    """Returns a function that tells whether a socket's peer is a trusted proxy. `None`: no peer is."""
    if not proxies:
        return None
    from otel_nginx_ebpf.traces.trusted_proxies import TrustedProxies  # brings ipaddress, which few users need

    return TrustedProxies(proxies).has


def _host_of(target: str, host: str | None) -> str | None:
    """Returns the authority of a request target in absolute form, which wins over Host (RFC 9112, 3.2.2)."""
    absolute = of_absolute_form(target)
    return absolute[1] if absolute else host


@lru_cache
def _readable(choices: SpanChoices) -> SpanBuilder[SpanFields]:
    def attribute(name: str) -> Callable[[AttributeValue], SpanFields]:
        return lambda value: SpanFields({name: value})

    return SpanBuilder(lambda fields: fields, attribute, attribute, choices)


def build_trace(
    request: Request,
    unix_offset_ns: int,
    ids: IdGenerator,
    *,
    choices: SpanChoices = DEFAULT_CHOICES,
    resource: Mapping[str, AttributeValue] | None = None,
) -> Trace:
    """Returns the trace of one request in the readable model.

    Args:
        request: The decoded record.
        unix_offset_ns: Unix time minus monotonic time, for all times of this request.
        ids: Makes the spans' ids.
        choices: What the spans have.
        resource: Resource attributes of the nginx that served the request.
    """
    built = _readable(choices).build(request, ids.generate_span_id)
    events = events_of(request.log_lines, [phase for phase, _, _ in built], unix_offset_ns, choices.query)

    def span(index: int, parent_span_id: int | None) -> Span:
        (start_mono_ns, end_mono_ns, _, _, error), span_id, fields = built[index]
        return Span(
            name=fields[0].name or "",
            kind=fields[0].kind,
            span_id=span_id,
            parent_span_id=parent_span_id,
            start_unix_ns=start_mono_ns + unix_offset_ns,
            end_unix_ns=end_mono_ns + unix_offset_ns,
            attributes={name: value for each in fields for name, value in each.attributes.items()},
            error=error,
            events=events.get(index, ()),
        )

    return Trace(
        trace_id=request.trace_id,
        spans=(span(0, request.parent_span_id), *(span(index, built[0][1]) for index in range(1, len(built)))),
        request=request,
        unix_offset_ns=unix_offset_ns,
        resource=resource or {},
        trace_flags=request.trace_flags,
        trace_state=canonical(request.trace_state),
    )


def told_id(attempts: tuple[Attempt, ...], number: int) -> int | None:
    """Returns the span id that the peer of an exchange received, if this exchange keeps the id; else `None`.

    nginx sends one text in all attempts of a request and, with proxy_set_header, of its subrequests. If attempts share
    an id, the last one keeps it, because the client got its peer's answer. A subrequest's attempt keeps the id only if
    no attempt of the main request has it.
    """
    own = attempts[number - 1]
    if own.span_id is None or len(attempts) == 1:
        return own.span_id
    told = [attempt for attempt in attempts if attempt.span_id == own.span_id and has_exchange(attempt)]
    last = ([attempt for attempt in told if not attempt.subrequest] or told)[-1]
    return own.span_id if last is own else None


def _is_reused(attempt: Attempt) -> bool | None:
    """Tells whether the connection was open already.

    `None`: not known (`--detail request`). Either nginx's clock was too coarse to show that it connected, or it was
    open.
    """
    if attempt.connect_start_mono_ns is None and attempt.connected_mono_ns is not None:
        return None
    return attempt.connect_start_mono_ns is None

"""The attributes of the spans of upstream attempts. Pure."""

from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
)
from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.traces.attributes import (
    NGINX_SUBREQUEST_URI,
    NGINX_UPSTREAM_ATTEMPT,
    NGINX_UPSTREAM_NAME,
    NGINX_UPSTREAM_PEER,
    NGINX_UPSTREAM_REUSED,
    NGINX_UPSTREAM_STATUS,
    SpanFields,
    add_address,
    method_name,
    transport,
)
from otel_nginx_ebpf.traces.authority import DEFAULT_PORTS, split
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.methods import known_method
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.phases import UPSTREAM_CONNECT
from otel_nginx_ebpf.traces.record import http_status
from otel_nginx_ebpf.traces.sockaddr import Address, parse_peer

# The protocols that are not HTTP. Attempt.protocol and network.protocol.name have the same values.
_NOT_HTTP = frozenset({"fastcgi", "uwsgi", "scgi", "memcached"})
_HTTP_2 = "http_2"


def _attempt_attributes(
    number: int, peer: str | None, upstream: str | None, status: int | None, subrequest_uri: str | None
) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {NGINX_UPSTREAM_ATTEMPT: number}
    if peer is not None:
        attributes[NGINX_UPSTREAM_PEER] = peer
        add_address(
            attributes,
            parse_peer(peer),
            network_attributes.NETWORK_PEER_ADDRESS,
            network_attributes.NETWORK_PEER_PORT,
        )
    if upstream is not None:
        attributes[NGINX_UPSTREAM_NAME] = upstream
    if status is not None:
        attributes[NGINX_UPSTREAM_STATUS] = status
    if subrequest_uri is not None:
        attributes[NGINX_SUBREQUEST_URI] = subrequest_uri
    return attributes


def connect_fields(
    number: int,
    peer: str | None,
    upstream: str | None,
    status: int | None,
    subrequest_uri: str | None,
    error: str | None,
) -> SpanFields:
    """Makes the fields of a connect after which nginx could send its request, or gave it up by itself."""
    attributes = _attempt_attributes(number, peer, upstream, status, subrequest_uri)
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    return SpanFields(attributes, UPSTREAM_CONNECT, error=error)


def request_fields(
    choices: SpanChoices,
    phase: str,
    number: int,
    peer: str | None,
    upstream: str | None,
    status: int | None,
    subrequest_uri: str | None,
    protocol: str | None,
    tls: bool,
    method: str | None,
    version: str | None,
    asked: str | None,
    reused: bool | None,
    answered: bool,
    error: str | None,
) -> SpanFields:
    """Makes the fields of a CLIENT span: of an exchange, or of a connect that failed (`phase`).

    `asked`: the authority that the peer was asked for. `method` and `version`: as sent. `None`: not known.
    """
    attributes = _attempt_attributes(number, peer, upstream, status, subrequest_uri)
    address = parse_peer(peer) if peer is not None else None
    known = known_method(method, choices.known_methods)
    attributes[http_attributes.HTTP_REQUEST_METHOD] = known
    if method is not None and method != known:
        attributes[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = method
    scheme = "https" if tls else "http"
    _add_server(attributes, asked, upstream, address, scheme)
    if protocol in _NOT_HTTP:
        attributes[network_attributes.NETWORK_PROTOCOL_NAME] = protocol
    elif version is not None:
        attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = version
    elif protocol == _HTTP_2:
        attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = "2"
    if network_attributes.NETWORK_TRANSPORT in choices.opt_in and address is not None:
        attributes[network_attributes.NETWORK_TRANSPORT] = transport(address)
    if url_attributes.URL_SCHEME in choices.opt_in and protocol not in _NOT_HTTP:
        attributes[url_attributes.URL_SCHEME] = scheme
    if reused is not None:
        attributes[NGINX_UPSTREAM_REUSED] = reused
    if answered and (code := http_status(status)) is not None:
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = code
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    name = method_name(known) if choices.clients_by_method else phase
    return SpanFields(attributes, name, SpanKind.CLIENT, error)


def _add_server(
    attributes: dict[str, AttributeValue], asked: str | None, upstream: str | None, peer: Address | None, scheme: str
) -> None:
    """Adds server.address and server.port: the host that the peer was asked for, else the upstream's name."""
    if asked is not None:
        attributes[server_attributes.SERVER_ADDRESS], port = split(asked)
        attributes[server_attributes.SERVER_PORT] = DEFAULT_PORTS[scheme] if port is None else port
        return
    add_address(attributes, peer, server_attributes.SERVER_ADDRESS, server_attributes.SERVER_PORT)
    if upstream is not None:
        attributes[server_attributes.SERVER_ADDRESS] = server_name(upstream)


def server_name(upstream: str) -> str:
    """Returns the upstream's name as server.address: an IPv6 address without brackets, a unix socket by its path."""
    return upstream.removeprefix("unix:").removeprefix("[").removesuffix("]")

"""The attributes of spans: their names, and their values from the facts of a request. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

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

from otel_nginx_ebpf.traces.authority import DEFAULT_PORTS, split
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.forwarded import Origin
from otel_nginx_ebpf.traces.methods import OTHER_METHOD, known_method
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.record import HTTP_VERSIONS, http_status
from otel_nginx_ebpf.traces.sockaddr import Address, parse

ANY_CAPTURED_HEADER = "http.*.header.*"
"""Stands in `nginx.truncated_attributes` for headers that are missing and whose names are not known."""
NGINX_ATTEMPTS = "nginx.upstream.attempts"
NGINX_ATTEMPTS_LOST = "nginx.upstream.attempts_lost"
NGINX_CACHE_LOCK_WAITED = "nginx.cache.lock_waited"
NGINX_CACHE_STATUS = "nginx.cache.status"
NGINX_CONNECTION_ID = "nginx.connection.id"
NGINX_CONNECTION_REQUESTS = "nginx.connection.requests"
NGINX_LIMIT_CONN_STATUS = "nginx.limit_conn.status"
NGINX_LIMIT_REQ_STATUS = "nginx.limit_req.status"
NGINX_NO_LIVE_PEERS = "nginx.upstream.no_live_peers"
NGINX_SAMPLING_KEPT_FOR = "nginx.sampling.kept_for"
NGINX_SERVER_NAME = "nginx.server_name"
NGINX_TERMINATION = "nginx.termination"
NGINX_TRUNCATED = "nginx.truncated_attributes"
NGINX_TLS_HANDSHAKE = "nginx.tls.handshake.duration_ns"
NGINX_UPSTREAM_ATTEMPT = "nginx.upstream.attempt"
NGINX_UPSTREAM_NAME = "nginx.upstream.name"
NGINX_UPSTREAM_PEER = "nginx.upstream.peer"
NGINX_UPSTREAM_REUSED = "nginx.upstream.connection.reused"
NGINX_UPSTREAM_STATUS = "nginx.upstream.status"
NGINX_UPSTREAM_TTFB = "nginx.upstream.time_to_first_byte_ns"
NGINX_SUBREQUEST_URI = "nginx.subrequest.uri"
NGINX_WORKER_LONGEST_TURN = "nginx.worker.longest_turn_ns"
NGINX_WORKER_PID = "nginx.worker.pid"

_HTTP_3 = next(number for number, version in HTTP_VERSIONS.items() if version == "3")

# The attribute that is incomplete if the kernel program cut the string.
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
    "STRING_REQUEST_TARGET": server_attributes.SERVER_ADDRESS,
    "STRING_PEER_SOCKADDR": network_attributes.NETWORK_PEER_ADDRESS,
    "STRING_SENT_LINE": url_attributes.URL_FULL,
    "STRING_SENT_HOST": server_attributes.SERVER_ADDRESS,
    "STRING_SENT_PATH": url_attributes.URL_FULL,
    "STRING_SENT_AUTHORITY": server_attributes.SERVER_ADDRESS,
    "STRING_FORWARDED": server_attributes.SERVER_ADDRESS,
    "STRING_X_FORWARDED_PROTO": url_attributes.URL_SCHEME,
    "STRING_X_FORWARDED_HOST": server_attributes.SERVER_ADDRESS,
}


@dataclass(slots=True)
class SpanFields:
    """A part of a span's fields. A span has several parts. The first part has the span's name, kind and error."""

    attributes: Mapping[str, AttributeValue]
    name: str | None = None
    kind: SpanKind = SpanKind.INTERNAL
    error: str | None = None


def add_address(attributes: dict[str, AttributeValue], address: Address | None, host_key: str, port_key: str) -> None:
    """Adds a socket's address as the semantic conventions write it: a unix socket by its path, if it has one."""
    if address is None:
        return
    if host := address.host.removeprefix("unix:"):
        attributes[host_key] = host
    if address.port:
        attributes[port_key] = address.port


def method_name(known: str) -> str:
    """Returns how a span's name says its method (semantic conventions, HTTP spans, Name)."""
    return "HTTP" if known == OTHER_METHOD else known


def server_fields(
    choices: SpanChoices,
    method: str | None,
    location: str | None,
    host: str | None,
    told: Origin | None,
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
    cache_status: str | None,
    limit_req_status: str | None,
    limit_conn_status: str | None,
    waited_for_cache: bool,
    kept: str | None,
    rule_number: int,
    error: str | None,
) -> SpanFields:
    """Makes the fields that the SERVER spans of many requests share.

    `told`: what a trusted proxy says about the client's request. `None`: no such proxy is the socket's peer.
    """
    local = parse(local_sockaddr) if local_sockaddr else None
    scheme = (told and told.scheme) or ("https" if tls else "http")
    known = known_method(method, choices.known_methods)
    attributes: dict[str, AttributeValue] = {
        http_attributes.HTTP_REQUEST_METHOD: known,
        url_attributes.URL_SCHEME: scheme,
        NGINX_WORKER_PID: worker_pid,
    }
    if (code := http_status(status)) is not None:
        attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] = code
    name = method_name(known)
    if method is not None:
        if method != known:
            attributes[http_attributes.HTTP_REQUEST_METHOD_ORIGINAL] = method
        # If there is no method, nginx could not parse the request line, and the version is only nginx's default.
        if http_version in HTTP_VERSIONS:
            attributes[network_attributes.NETWORK_PROTOCOL_VERSION] = HTTP_VERSIONS[http_version]
    if location:
        attributes[http_attributes.HTTP_ROUTE] = location
        name = f"{name} {location}"
    if server_name:
        attributes[NGINX_SERVER_NAME] = server_name
    if error is not None:
        attributes[error_attributes.ERROR_TYPE] = error
    if ending is not None:
        attributes[NGINX_TERMINATION] = ending
    if cache_status is not None:
        attributes[NGINX_CACHE_STATUS] = cache_status
    if waited_for_cache:
        attributes[NGINX_CACHE_LOCK_WAITED] = True
    if limit_req_status is not None:
        attributes[NGINX_LIMIT_REQ_STATUS] = limit_req_status
    if limit_conn_status is not None:
        attributes[NGINX_LIMIT_CONN_STATUS] = limit_conn_status
    if kept is not None:
        attributes[NGINX_SAMPLING_KEPT_FOR] = kept

    _add_server(attributes, host, told, local, scheme)
    if network_attributes.NETWORK_TRANSPORT in choices.opt_in:
        attributes[network_attributes.NETWORK_TRANSPORT] = transport(local, http_version)
    if local is not None:
        own: dict[str, AttributeValue] = {}
        add_address(own, local, network_attributes.NETWORK_LOCAL_ADDRESS, network_attributes.NETWORK_LOCAL_PORT)
        attributes |= {name: value for name, value in own.items() if name in choices.opt_in}
    if attempts:
        attributes[NGINX_ATTEMPTS] = attempts
    if attempts_lost:
        attributes[NGINX_ATTEMPTS_LOST] = attempts_lost
    if no_live_peers > 0:
        attributes[NGINX_NO_LIVE_PEERS] = no_live_peers
    if (rule := choices.rule(rule_number)) is not None:
        attributes |= dict(rule.attributes)
        if rule.span_name is not None:
            name = rule.span_name.replace("{method}", method_name(known))
    return SpanFields(attributes, name, SpanKind.SERVER, error)


def _add_server(
    attributes: dict[str, AttributeValue], host: str | None, told: Origin | None, local: Address | None, scheme: str
) -> None:
    """Adds server.address and server.port: the server that the client asked for, else the listening socket.

    If a proxy changed the scheme or the host, the listening socket's port is not the port that the client asked for.
    """
    port = local.port if local else None
    if told is not None and (told.scheme or told.authority):
        host = told.authority or host
        port = DEFAULT_PORTS[scheme] if host is not None else port
    if host is None:
        add_address(attributes, local, server_attributes.SERVER_ADDRESS, server_attributes.SERVER_PORT)
        return
    attributes[server_attributes.SERVER_ADDRESS], named = split(host)
    if named is not None:
        port = named
    if port is not None:
        attributes[server_attributes.SERVER_PORT] = port


def transport(socket: Address | None, http_version: int | None = None) -> str:
    if socket is not None and socket.port is None:
        return network_attributes.NetworkTransportValues.UNIX.value
    if http_version == _HTTP_3:
        return network_attributes.NetworkTransportValues.UDP.value
    return network_attributes.NetworkTransportValues.TCP.value


def client_fields(choices: SpanChoices, sockaddr: bytes | None, peer_sockaddr: bytes | None) -> SpanFields:
    """Makes the client as nginx sees it, perhaps from a header (realip), and the peer of the socket."""
    attributes: dict[str, AttributeValue] = {}
    client = parse(sockaddr) if sockaddr else None
    if client is not None:
        attributes[client_attributes.CLIENT_ADDRESS] = client.host
        # 0: realip took the client's address from a header, and nginx prints no port
        if client.port and client_attributes.CLIENT_PORT in choices.opt_in:
            attributes[client_attributes.CLIENT_PORT] = client.port
    peer = parse(peer_sockaddr) if peer_sockaddr else None
    add_address(attributes, peer, network_attributes.NETWORK_PEER_ADDRESS, network_attributes.NETWORK_PEER_PORT)
    return SpanFields(attributes)


def user_agent_fields(user_agent: str) -> SpanFields:
    return SpanFields({user_agent_attributes.USER_AGENT_ORIGINAL: user_agent})


def header_fields(name: str, values: tuple[str, ...]) -> SpanFields:
    """Makes a captured header. `name`: of the attribute."""
    return SpanFields({name: values})


def cut_fields(
    cut: tuple[str, ...], has_query: bool, cut_headers: tuple[str, ...], headers_missing: bool
) -> SpanFields:
    """Names the attributes that are incomplete. `cut`: the strings that were cut."""
    attribute_of = _ATTRIBUTE_OF | ({"STRING_URI": url_attributes.URL_QUERY} if has_query else {})
    names = dict.fromkeys(attribute_of[string] for string in cut if string in attribute_of)
    missing = (ANY_CAPTURED_HEADER,) if headers_missing else ()
    return SpanFields({NGINX_TRUNCATED: (*names, *cut_headers, *missing)})

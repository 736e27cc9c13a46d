"""Which series of http.server.request.duration and http.client.request.duration a request and its exchanges count in.

What the kernel counts under pointers and numbers (probes/metrics.c) gets the attributes that spans of the same requests
have (`spans`), as far as the conventions have them on these metrics: those whose values clients do not choose.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from importlib.resources import files

from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
)
from opentelemetry.semconv.metrics.http_metrics import HTTP_CLIENT_REQUEST_DURATION, HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf.metrics.totals import OVERFLOW, Series
from otel_nginx_ebpf.traces.abi import CStruct, c_enum
from otel_nginx_ebpf.traces.record import ENDINGS, HTTP_VERSIONS, METHODS, OUTCOMES, Request, http_status
from otel_nginx_ebpf.traces.sockaddr import parse_peer
from otel_nginx_ebpf.traces.spans import (
    NGINX_SERVER_NAME,
    NGINX_UPSTREAM_NAME,
    exchange_error,
    exchange_times,
    is_answered,
    known_method,
    server_error,
)

_HEADER_TEXT = (files("otel_nginx_ebpf.probes") / "metrics.h").read_text(encoding="utf-8")

SERVER_KEY = CStruct("server_series", _HEADER_TEXT)
CLIENT_KEY = CStruct("client_series", _HEADER_TEXT)
NAME_KEY = CStruct("duration_name_key", _HEADER_TEXT)
LIMITS = c_enum("metrics_limit", _HEADER_TEXT)

_BOUNDS_NS = [bound * 1_000_000 for bound in c_enum("duration_bound_ms", _HEADER_TEXT).values()]
BOUNDS_S = tuple(bound / 1e9 for bound in _BOUNDS_NS)
"""Upper bounds of the buckets but the last."""
COUNTS = struct.Struct(f"<{len(_BOUNDS_NS) + 2}Q")

_OTHER_METHOD = "_OTHER"

NameOf = Callable[[int, int], str | None]
"""The name of a configuration of a worker's, by its pid and the configuration's address; None: it has none."""


def bucket(duration_ns: int) -> int:
    return bisect_left(_BOUNDS_NS, duration_ns)


def _series(metric: str, attributes: dict[str, str | int | None]) -> Series:
    return Series(metric, tuple((name, value) for name, value in attributes.items() if value is not None))


def _server(
    method: str | None,
    route: str | None,
    server_name: str | None,
    status: int,
    ending: str | None,
    http_version: int,
    tls: bool,
) -> Series:
    return _series(
        HTTP_SERVER_REQUEST_DURATION,
        {
            http_attributes.HTTP_REQUEST_METHOD: known_method(method) if method is not None else None,
            http_attributes.HTTP_RESPONSE_STATUS_CODE: http_status(status),
            http_attributes.HTTP_ROUTE: route or None,
            url_attributes.URL_SCHEME: "https" if tls else "http",
            network_attributes.NETWORK_PROTOCOL_VERSION: HTTP_VERSIONS.get(http_version)
            if method is not None
            else None,
            error_attributes.ERROR_TYPE: server_error(status, ending),
            NGINX_SERVER_NAME: server_name or None,
        },
    )


def _client(
    method: str | None,
    upstream: str | None,
    peer: str | None,
    answered: bool,
    status: int | None,
    connect_errno: int,
    outcome: str | None,
) -> Series:
    address = parse_peer(peer) if peer else None
    return _series(
        HTTP_CLIENT_REQUEST_DURATION,
        {
            http_attributes.HTTP_REQUEST_METHOD: known_method(method) if method is not None else None,
            http_attributes.HTTP_RESPONSE_STATUS_CODE: http_status(status) if answered else None,
            server_attributes.SERVER_ADDRESS: address.host if address else None,
            server_attributes.SERVER_PORT: (address.port or None) if address else None,
            NGINX_UPSTREAM_NAME: upstream or None,
            error_attributes.ERROR_TYPE: exchange_error(answered, connect_errno, status, outcome),
        },
    )


def _method(bit: int) -> str | None:
    return METHODS.get(bit, _OTHER_METHOD) if bit else None


def of_server_key(key: bytes, name_of: NameOf) -> Series:
    """Of a key of the kernel's map `server_durations`."""
    tgid, method, location, server, http_version, ending, _, status, tls, overflow = SERVER_KEY.struct.unpack(key)
    if overflow:
        return Series(HTTP_SERVER_REQUEST_DURATION, OVERFLOW)
    names = name_of(tgid, location), name_of(tgid, server)
    return _server(_method(method), *names, status, ENDINGS.get(ending), http_version, tls != 0)


def of_client_key(key: bytes, name_of: NameOf) -> Series:
    """Of a key of the kernel's map `client_durations`."""
    head = CLIENT_KEY.size
    tgid, method, upstream, status, connect_errno, no_header, overflow, peer_bytes, outcome = CLIENT_KEY.struct.unpack(
        key[:head]
    )
    if overflow:
        return Series(HTTP_CLIENT_REQUEST_DURATION, OVERFLOW)
    peer = key[head : head + peer_bytes].decode("utf-8", "backslashreplace")
    return _client(
        _method(method),
        name_of(tgid, upstream),
        peer,
        not no_header and status != 0,
        status or None,
        connect_errno,
        OUTCOMES.get(outcome),
    )


def of_request(request: Request) -> Series:
    """That its SERVER span's duration counts in."""
    return _server(
        request.method,
        request.location,
        request.server_name,
        request.status,
        request.ending,
        request.http_version,
        request.tls,
    )


def of_exchanges(request: Request) -> Iterator[tuple[Series, int, int]]:
    """Those that its CLIENT spans' durations count in; their starts and ends, CLOCK_MONOTONIC nanoseconds."""
    for attempt, start_mono_ns, end_mono_ns in exchange_times(request):
        series = _client(
            None if attempt.subrequest else request.method,
            attempt.upstream,
            attempt.peer,
            is_answered(attempt),
            attempt.status,
            attempt.connect_errno,
            attempt.outcome,
        )
        yield series, start_mono_ns, end_mono_ns

"""The series of http.server.request.duration and http.client.request.duration that count a request and its attempts.

The kernel counts durations under pointers and numbers (probes/metrics.c). This module replaces them with the attributes
that the spans of the same requests have. As in the conventions for these metrics, it leaves out attributes whose values
clients choose. The Host header that a peer was sent may be such a value, so the upstream's name stands for it here.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE
from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    url_attributes,
)
from opentelemetry.semconv.metrics.http_metrics import HTTP_CLIENT_REQUEST_DURATION, HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf.metrics.choices import MetricChoices
from otel_nginx_ebpf.metrics.totals import OVERFLOW, Series
from otel_nginx_ebpf.traces.abi import CStruct, c_enum
from otel_nginx_ebpf.traces.attributes import NGINX_CACHE_STATUS, NGINX_SERVER_NAME, NGINX_UPSTREAM_NAME
from otel_nginx_ebpf.traces.methods import counted_method, method_of_bit
from otel_nginx_ebpf.traces.phases import (
    REQUEST,
    UPSTREAM_EXCHANGE,
    Phase,
    exchange_error,
    is_answered,
    is_failed_connect,
    request_error,
)
from otel_nginx_ebpf.traces.record import (
    CACHE_STATUSES,
    ENDINGS,
    HTTP_VERSIONS,
    OUTCOMES,
    Attempt,
    Request,
    http_status,
)
from otel_nginx_ebpf.traces.sockaddr import parse_peer
from otel_nginx_ebpf.traces.upstream_attributes import server_name

_HEADER_TEXT = (files("otel_nginx_ebpf.probes") / "metrics.h").read_text(encoding="utf-8")

SERVER_KEY = CStruct("server_series", _HEADER_TEXT)
CLIENT_KEY = CStruct("client_series", _HEADER_TEXT)
LOOP_KEY = CStruct("worker_loop", _HEADER_TEXT)
NAME_KEY = CStruct("duration_name_key", _HEADER_TEXT)
LIMITS = c_enum("metrics_limit", _HEADER_TEXT)

BUCKETS = 15
COUNTS = struct.Struct(f"<{1 + BUCKETS}Q")
PLACE = CStruct("place", _HEADER_TEXT)
PLACE_COUNTS = struct.Struct("<2Q")
EXPONENTIAL = c_enum("exponential_histogram", _HEADER_TEXT)

NGINX_WORKER_LOOP = "nginx.worker.loop"


class Metric(NamedTuple):
    """A histogram of amounts that the kernel counts."""

    description: str
    unit: str
    bounds: tuple[float, ...]
    """Upper bounds of all buckets except the last."""
    in_unit: int = 1_000_000_000
    """How many of the kernel's units are one of the metric's."""


def _bounds(enum: str, of_second: int) -> tuple[float, ...]:
    return tuple(bound / of_second for bound in c_enum(enum, _HEADER_TEXT).values())


_BOUNDS_NS = [bound * 1_000_000 for bound in c_enum("duration_bound_ms", _HEADER_TEXT).values()]
BOUNDS_S = _bounds("duration_bound_ms", 1000)
METRICS = {
    HTTP_SERVER_REQUEST_DURATION: Metric("Duration of HTTP server requests.", "s", BOUNDS_S),
    HTTP_CLIENT_REQUEST_DURATION: Metric("Duration of HTTP client requests.", "s", BOUNDS_S),
    HTTP_SERVER_RESPONSE_BODY_SIZE: Metric(
        "Size of HTTP server response bodies.", "By", _bounds("size_bound_bytes", 1), in_unit=1
    ),
    NGINX_WORKER_LOOP: Metric(
        "Duration of the turns of the workers' event loops.", "s", _bounds("loop_bound_us", 1_000_000)
    ),
}

NameOf = Callable[[int, int], str | None]
"""Returns the name of a worker's configuration, by the pid and the configuration's address. `None`: no name."""


def bucket(duration_ns: int) -> int:
    return bisect_left(_BOUNDS_NS, duration_ns)


def _series(metric: str, choices: MetricChoices, attributes: dict[str, str | int | None]) -> Series:
    chosen = choices.attributes
    return Series(
        metric, tuple((name, value) for name, value in attributes.items() if value is not None and name in chosen)
    )


def _server(
    choices: MetricChoices,
    method: str | None,
    route: str | None,
    server_name: str | None,
    status: int,
    http_version: int,
    tls: bool,
    error: str | None,
    cache_status: str | None,
) -> Series:
    return _series(
        HTTP_SERVER_REQUEST_DURATION,
        choices,
        {
            http_attributes.HTTP_REQUEST_METHOD: counted_method(method, choices.known_methods),
            http_attributes.HTTP_RESPONSE_STATUS_CODE: http_status(status),
            http_attributes.HTTP_ROUTE: route or None,
            url_attributes.URL_SCHEME: "https" if tls else "http",
            network_attributes.NETWORK_PROTOCOL_VERSION: HTTP_VERSIONS.get(http_version),
            error_attributes.ERROR_TYPE: error,
            NGINX_SERVER_NAME: server_name or None,
            NGINX_CACHE_STATUS: cache_status,
        },
    )


def _client(
    choices: MetricChoices,
    method: str | None,
    upstream: str | None,
    peer: str | None,
    answered: bool,
    status: int | None,
    error: str | None,
) -> Series:
    address = parse_peer(peer) if peer else None
    host = (address.host.removeprefix("unix:") or None) if address else None
    port = (address.port or None) if address else None
    return _series(
        HTTP_CLIENT_REQUEST_DURATION,
        choices,
        {
            http_attributes.HTTP_REQUEST_METHOD: counted_method(method, choices.known_methods),
            http_attributes.HTTP_RESPONSE_STATUS_CODE: http_status(status) if answered else None,
            server_attributes.SERVER_ADDRESS: server_name(upstream) if upstream else host,
            server_attributes.SERVER_PORT: port,
            network_attributes.NETWORK_PEER_ADDRESS: host,
            network_attributes.NETWORK_PEER_PORT: port,
            NGINX_UPSTREAM_NAME: upstream or None,
            error_attributes.ERROR_TYPE: error,
        },
    )


def of_server_key(key: bytes, name_of: NameOf, choices: MetricChoices) -> Series:
    """Returns the series of a key of the kernel's map `server_durations`."""
    tgid, method, location, server, http_version, ending, cache, status, tls, overflow = SERVER_KEY.struct.unpack(key)
    if overflow:
        return Series(HTTP_SERVER_REQUEST_DURATION, OVERFLOW)
    names = name_of(tgid, location), name_of(tgid, server)
    error = request_error(status, ENDINGS.get(ending))
    cached = CACHE_STATUSES.get(cache)
    return _server(choices, method_of_bit(method), *names, status, http_version, tls != 0, error, cached)


def of_client_key(key: bytes, name_of: NameOf, choices: MetricChoices) -> Series:
    """Returns the series of a key of the kernel's map `client_durations`."""
    head = CLIENT_KEY.size
    tgid, method, upstream, status, connect_errno, no_header, overflow, peer_bytes, outcome = CLIENT_KEY.struct.unpack(
        key[:head]
    )
    if overflow:
        return Series(HTTP_CLIENT_REQUEST_DURATION, OVERFLOW)
    peer = key[head : head + peer_bytes].decode("utf-8", "backslashreplace")
    answered = not no_header and status != 0
    error = exchange_error(answered, connect_errno, status or None, OUTCOMES.get(outcome))
    return _client(choices, method_of_bit(method), name_of(tgid, upstream), peer, answered, status or None, error)


def _sent_method(request: Request, attempt: Attempt) -> str | None:
    """Returns the method that the peer was sent, by nginx's number. `None`: the number stands for no method."""
    if attempt.method_bit:
        return method_of_bit(attempt.method_bit)
    return None if attempt.subrequest else request.method


def of_phase(request: Request, phase: Phase, choices: MetricChoices) -> Series | None:
    """Returns the series that counts the duration of a request, an exchange or a failed connect.

    `None`: no series counts the phase.
    """
    _, _, kind, number, error = phase
    if kind == REQUEST:
        return _server(
            choices,
            request.method,
            request.location,
            request.server_name,
            request.status,
            0 if request.method is None else request.http_version,
            request.tls,
            error,
            request.cache_status,
        )
    attempt = request.attempts[number - 1] if number else None
    exchange = kind == UPSTREAM_EXCHANGE
    if attempt is None or not (exchange or is_failed_connect(attempt, error)):
        return None
    return _client(
        choices,
        _sent_method(request, attempt),
        attempt.upstream,
        attempt.peer,
        exchange and is_answered(attempt),
        attempt.status,
        error,
    )

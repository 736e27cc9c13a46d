"""What the kernel's keys mean, and that exemplars find the series of their phases."""

from dataclasses import replace

from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf.metrics.choices import DEFAULT_CHOICES, MetricChoices
from otel_nginx_ebpf.metrics.series import CLIENT_KEY, LIMITS, SERVER_KEY, of_client_key, of_phase, of_server_key
from otel_nginx_ebpf.metrics.totals import Series
from otel_nginx_ebpf.traces.phases import UPSTREAM_CONNECT, UPSTREAM_EXCHANGE, phases_of
from otel_nginx_ebpf.traces.record import CACHE_STATUSES, Request, decode
from unit.sample_traces import RETRIED, STATIC

NAMES = {1: "/api/", 2: "example.com", 3: "backend"}


def name_of(pid: int, configuration: int) -> str | None:
    return NAMES.get(configuration)


def server_key(**values: int) -> bytes:
    return SERVER_KEY.struct.pack(*(values.get(name, 0) for _, name in SERVER_KEY.fields))


def test_a_request_whose_line_was_not_parsed_is_other() -> None:
    series = of_server_key(server_key(status=400), name_of, DEFAULT_CHOICES)
    assert series.metric == HTTP_SERVER_REQUEST_DURATION
    assert dict(series.attributes) == {
        "http.request.method": "_OTHER",
        "http.response.status_code": 400,
        "url.scheme": "http",
    }
    request = replace(decode(STATIC), method=None, status=400, http_version=9)
    assert of_phase(request, phases_of(request)[0], DEFAULT_CHOICES) == series


def test_a_method_of_webdav_that_the_user_knows() -> None:
    known = MetricChoices(frozenset({"PROPFIND", "BREW"}))
    values = {"location": 1, "server": 2, "status": 207, "http_version": 1001, "tls": 1}
    request = replace(decode(STATIC), location="/api/", server_name="example.com", status=207, tls=True)
    for bit, method, expected in ((0x400, "PROPFIND", "PROPFIND"), (1, "BREW", "_OTHER"), (2, "GET", "_OTHER")):
        series = of_server_key(server_key(method=bit, **values), name_of, known)
        assert dict(series.attributes)["http.request.method"] == expected
        own = replace(request, method=method, method_bit=bit)
        assert of_phase(own, phases_of(own)[0], known) == series


def test_what_the_cache_said() -> None:
    for number, said in {0: None, **CACHE_STATUSES}.items():
        series = of_server_key(server_key(cache_status=number, method=2, status=200), name_of, DEFAULT_CHOICES)
        assert dict(series.attributes).get("nginx.cache.status") == said
        request = replace(decode(STATIC), cache_status=said)
        of_request = of_phase(request, phases_of(request)[0], DEFAULT_CHOICES)
        assert of_request
        assert dict(of_request.attributes).get("nginx.cache.status") == said


def client_key(peer: str, **values: int) -> bytes:
    raw = peer.encode()
    fields = values | {"peer_bytes": len(raw)}
    head = CLIENT_KEY.struct.pack(*(fields.get(name, 0) for _, name in CLIENT_KEY.fields))
    return head + raw.ljust(LIMITS["PEER_BYTES_MAX"], b"\0")


def series_of(request: Request, kind: str, number: int) -> Series | None:
    (phase,) = [phase for phase in phases_of(request) if (phase[2], phase[3]) == (kind, number)]
    return of_phase(request, phase, DEFAULT_CHOICES)


def test_a_dead_peer_has_a_series() -> None:
    series = of_client_key(
        client_key("127.0.0.1:9", method=8, upstream=3, status=502, connect_errno=111, no_header=1),
        name_of,
        DEFAULT_CHOICES,
    )
    assert dict(series.attributes) == {
        "http.request.method": "POST",
        "server.address": "backend",
        "server.port": 9,
        "network.peer.address": "127.0.0.1",
        "network.peer.port": 9,
        "nginx.upstream.name": "backend",
        "error.type": "ECONNREFUSED",
    }
    request = decode(RETRIED)
    refused = replace(
        request.attempts[0], method_bit=8, upstream="backend", status=502, connect_ms=None, header_ms=None
    )
    assert series_of(replace(request, attempts=(refused,)), UPSTREAM_CONNECT, 1) == series


def test_an_exchange_has_the_method_that_the_peer_was_sent() -> None:
    """The kernel knows nginx's number of the method, not the request line."""
    request = decode(RETRIED)
    live = replace(
        request.attempts[1],
        peer="unix:/run/app.sock",
        sent_line="GET / HTTP/1.0",
        sent_host="any.example",
        connect_ms=0,
    )
    for values, subrequest, method in (
        ({"method": 4}, False, "HEAD"),
        ({"method": 2}, True, "GET"),
        ({"method": 1}, False, "_OTHER"),
        ({}, True, "_OTHER"),
    ):
        series = of_client_key(client_key("unix:/run/app.sock", status=200, **values), name_of, DEFAULT_CHOICES)
        assert dict(series.attributes) == {
            "http.request.method": method,
            "http.response.status_code": 200,
            "server.address": "/run/app.sock",
            "network.peer.address": "/run/app.sock",
        }
        request = replace(request, method_bit=1, method="BREW") if values.get("method") == 1 else request
        own = replace(live, method_bit=values.get("method", 0), subrequest=subrequest)
        assert series_of(replace(request, attempts=(own,)), UPSTREAM_EXCHANGE, 1) == series


def test_a_connect_that_succeeded_is_not_counted() -> None:
    request = decode(RETRIED)
    live = replace(request.attempts[1], connect_ms=0)
    assert series_of(replace(request, attempts=(live,)), UPSTREAM_CONNECT, 1) is None

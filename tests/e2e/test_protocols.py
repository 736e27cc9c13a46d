"""Upstreams that speak another protocol than HTTP/1: gRPC, FastCGI, uwsgi, SCGI, memcached."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.gateways import Fcgiwrap, Memcached, UwsgiServer
from e2e.grpc_server import SERVICE, GrpcServer, call
from e2e.stage import Stage
from e2e.timing import LAG_MAX_MS, Slack

NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
REUSED = ["downstream read", "upstream exchange", "downstream write"]
READ_WRITE = ["downstream read", "downstream write"]

GATEWAYS = ("uwsgi", "fastcgi", "scgi")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("uwsgi", "fcgiwrap", "memcached"))),
    reason="needs uwsgi, fcgiwrap and memcached; `make setup-test` installs them",
)


@pytest.fixture(scope="module")
def memcached(public_directory: Path) -> Iterator[Memcached]:
    server = Memcached(public_directory)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def upstream_addresses(
    upstream_addresses: dict[str, str], public_directory: Path, memcached: Memcached
) -> Iterator[dict[str, str]]:
    uwsgi, fcgiwrap = UwsgiServer(public_directory), Fcgiwrap(public_directory)
    grpc_server = GrpcServer(public_directory)
    yield {
        **upstream_addresses,
        **uwsgi.addresses,
        "fcgiwrap": fcgiwrap.address,
        "script": str(fcgiwrap.script),
        "memcached": memcached.address,
        **grpc_server.addresses,
    }
    grpc_server.stop()
    uwsgi.stop()
    fcgiwrap.stop()


# --- FastCGI, uwsgi, SCGI

PARAMETERS = ("QUERY_STRING $query_string", "REQUEST_METHOD $request_method", "CONTENT_LENGTH $content_length")


def _to_gateways(more: str = "") -> str:
    """A location for each protocol; @P@ in `more` is its name."""
    locations = ""
    for protocol in GATEWAYS:
        parameters = [
            *PARAMETERS,
            "REQUEST_URI $request_uri",
            "PATH_INFO $uri",
            "SERVER_NAME $server_name",
            "SERVER_PORT $server_port",
            "SERVER_PROTOCOL $server_protocol",
        ]
        lines = " ".join(f"{protocol}_param {parameter};" for parameter in parameters)
        location = f"location /@P@/ {{ @P@_pass @{protocol.upper()}@; {lines} {more} }}\n"
        locations += location.replace("@P@", protocol)
    return locations


gateway = pytest.mark.parametrize("protocol", GATEWAYS)


@gateway
@pytest.mark.nginx(server=_to_gateways())
def test_gateway(stage: Stage, protocol: str) -> None:
    """Answers of several kinds, each on a new connection, as these protocols have it."""
    with stage.connect() as connection:
        for query, status, size in (
            ("", 200, 5),
            ("?bytes=300000", 200, 300_000),
            ("?delay_ms=150", 200, 5),
            ("?status=404", 404, 5),
            ("?status=503", 503, 5),
        ):
            response = connection.request(f"/{protocol}/{query}")
            assert (response.status, response.body_bytes) == (status, size)
    exchanges = stage.exchanges(5)
    assert [each.trace.outline() for each in exchanges] == [NEW] * 5
    slow = exchanges[2].trace.named("upstream exchange")[0]
    assert slow.attributes["nginx.upstream.time_to_first_byte_ns"] > 0.149e9
    assert slow.attributes["nginx.upstream.connection.reused"] is False
    assert [each.trace.named("upstream exchange")[0].error for each in exchanges] == [None, None, None, "404", "503"]


@gateway
@pytest.mark.nginx(server=_to_gateways() + "client_body_buffer_size 8k; client_max_body_size 5m;")
def test_gateway_takes_a_body(stage: Stage, protocol: str) -> None:
    for size in (1, 5000, 3_000_000):
        response = stage.get(f"/{protocol}/", "POST", body=b"b" * size)
        assert (response.status, response.headers["x-received"]) == (200, str(size))
    assert [each.trace.outline() for each in stage.exchanges(3)] == [NEW] * 3


@gateway
@pytest.mark.nginx(server=_to_gateways("@P@_buffering off;"))
def test_gateway_drips_its_answer(stage: Stage, protocol: str) -> None:
    assert stage.get(f"/{protocol}/?bytes=4000&parts=4&part_ms=80").body_bytes == 4000
    trace = stage.exchange(Slack(header_early=True)).trace
    assert trace.outline() == NEW
    assert trace.named("upstream exchange")[0].seconds > 0.31
    assert trace.named("downstream write")[0].seconds > 0.23


@gateway
@pytest.mark.nginx(server=_to_gateways("@P@_read_timeout 200ms;"))
def test_gateway_is_too_slow(stage: Stage, protocol: str) -> None:
    assert stage.get(f"/{protocol}/?delay_ms=600").status == 504
    trace = stage.exchange().trace
    exchange = trace.named("upstream exchange")[0]
    assert trace.outline() == NEW
    assert exchange.error == "timeout"
    assert 0.19 < exchange.seconds < 0.4


@gateway
@pytest.mark.nginx(
    http="upstream @NAME@_uwsgi { server @DEAD1@; server @UWSGI@; }"
    "upstream @NAME@_fastcgi { server @DEAD1@; server @FASTCGI@; }"
    "upstream @NAME@_scgi { server @DEAD1@; server @SCGI@; }",
    server="".join(
        f"location /{name}/ {{ {name}_pass @NAME@_{name}; {' '.join(f'{name}_param {each};' for each in PARAMETERS)} }}"
        for name in GATEWAYS
    ),
)
def test_dead_gateway_then_a_live_one(stage: Stage, protocol: str) -> None:
    assert stage.get(f"/{protocol}/").status == 200
    each = stage.exchange()
    assert each.trace.outline() == ["downstream read", "upstream connect", *NEW[1:]]
    assert each.trace.named("upstream connect")[0].error == "ECONNREFUSED"


@pytest.mark.nginx(
    http="upstream @NAME@ { server @FCGIWRAP@; keepalive 2; }",
    server="location / { fastcgi_pass @NAME@; fastcgi_keep_conn on; fastcgi_param SCRIPT_FILENAME @SCRIPT@;"
    + " ".join(f"fastcgi_param {each};" for each in PARAMETERS)
    + "}",
)
def test_kept_alive_gateway(stage: Stage) -> None:
    """FastCGI marks an answer's end itself, and nginx may keep the connection."""
    for _ in range(3):
        assert stage.get("/").body == b"xxxxx"
    traces = [each.trace for each in stage.exchanges(3)]
    assert [trace.outline() for trace in traces] == [NEW, REUSED, REUSED]
    for trace in traces:
        assert trace.named("upstream exchange")[0].attributes["nginx.upstream.time_to_first_byte_ns"] > 0.02e9


# --- memcached

MEMCACHED = """
    location /cache/ {
        default_type text/plain;
        set $memcached_key $uri;
        memcached_pass @NAME@;
        error_page 404 = @origin;
    }
    location /bare/ { set $memcached_key $uri; memcached_pass @MEMCACHED@; }
    location @origin { proxy_pass http://@UP@; }
"""


@pytest.mark.nginx(http="upstream @NAME@ { server @MEMCACHED@; keepalive 2; }", server=MEMCACHED)
def test_memcached(stage: Stage, memcached: Memcached) -> None:
    """Found, found again on the same connection, not found and so asked of the origin."""
    memcached.store("/cache/kept", b"value")
    memcached.store("/cache/large", b"v" * 500_000)
    with stage.connect() as connection:
        assert connection.request("/cache/kept").body == b"value"
        assert connection.request("/cache/large").body_bytes == 500_000
        assert connection.request("/cache/none").status == 200
        assert connection.request("/bare/none").status == 404
    kept, large, passed_on, none = stage.exchanges(4)
    assert kept.trace.outline() == NEW
    assert large.trace.outline() == REUSED
    assert passed_on.log["upstream_status"] == "404 : 200"
    assert passed_on.trace.outline() == [*REUSED[:2], *NEW[1:]]
    assert none.trace.named("upstream exchange")[0].error == "404"


# --- gRPC

TO_GRPC = {"listen": "listen @LISTEN@ http2;"}


@pytest.fixture
def channel(stage: Stage) -> Iterator[grpc.Channel]:
    host, port = stage.addresses["ipv4"]
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        yield channel


CALLS: dict[str, list[dict[str, Any]]] = {
    "unary_unary": [{"bytes": 100}],
    "unary_stream": [{"count": 4, "bytes": 3000, "delay_ms": 50}],
    "stream_unary": [{"bytes": 1000}] * 5,
    "stream_stream": [{"bytes": 1000, "delay_ms": 20}] * 5,
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.nginx(**TO_GRPC, server="location / { grpc_pass grpc://@GRPC@; }")
def test_grpc(stage: Stage, channel: grpc.Channel, kind: str) -> None:
    messages = CALLS[kind]
    answers = call(channel, kind, messages)
    assert sum(map(len, answers)) == sum(each.get("count", 1) * each["bytes"] for each in messages)
    trace = stage.exchange().trace
    assert sorted(trace.outline()) == sorted(NEW)
    attributes = trace.server.attributes
    assert attributes["url.path"] == f"/{SERVICE}/{kind}"
    assert attributes["network.protocol.version"] == "2"
    sent = trace.named("upstream exchange")[0].attributes
    assert sent["url.full"] == f"http://{sent['nginx.upstream.peer']}/{SERVICE}/{kind}"
    assert (sent["http.request.method"], sent["network.protocol.version"]) == ("POST", "2")
    waits = sum(each.get("count", 1) * each.get("delay_ms", 0) for each in messages) / 1000
    assert trace.named("upstream exchange")[0].seconds > 0.99 * waits
    assert trace.server.seconds > 0.99 * waits


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
@pytest.mark.nginx(
    **TO_GRPC,
    http="upstream @NAME@_grpc { server @GRPC@; keepalive 4; } upstream @NAME@_grpcs { server @GRPCS@; keepalive 4; }",
    server="location /grpc/ { rewrite /grpc(/.*) $1 break; grpc_pass grpc://@NAME@_grpc; }"
    "location /grpcs/ { rewrite /grpcs(/.*) $1 break; grpc_pass grpcs://@NAME@_grpcs; }",
)
def test_kept_alive_grpc(stage: Stage, channel: grpc.Channel, scheme: str) -> None:
    """The server's settings, and on an old connection its pings, come ahead of its answer and are not part of it.

    Encrypted they cannot be told from it: there the time to the first byte agrees with nginx's clock or is absent.
    """
    delays_ms = [200, 30, 150, 0, 60]
    for delay_ms in delays_ms:
        call(channel, "unary_unary", [{"delay_ms": delay_ms}], prefix=f"/{scheme}")
    exchanges = stage.exchanges(5, Slack(first_byte_unseen=scheme == "grpcs"))
    outlines = [sorted(each.trace.outline()) for each in exchanges]
    assert outlines[0] == sorted(NEW)
    # A ping on an idle connection makes nginx close it (ngx_http_upstream_keepalive_close_handler).
    assert all(outline in (sorted(NEW), sorted(REUSED)) for outline in outlines)
    assert sorted(REUSED) in outlines
    for each, delay_ms in zip(exchanges, delays_ms, strict=True):
        exchange = each.trace.named("upstream exchange")[0]
        assert exchange.seconds > delay_ms / 1000
        # Also on an old connection, over which nginx sends no preface.
        name = exchange.attributes["nginx.upstream.name"]
        assert exchange.attributes["url.full"] == f"http{scheme[4:]}://{name}/{SERVICE}/unary_unary"
        unsure_ms = LAG_MAX_MS if scheme == "grpcs" else 0
        assert exchange.attributes.get("nginx.upstream.time_to_first_byte_ns", inf) > (delay_ms - unsure_ms) * 1e6


@pytest.mark.nginx(
    **TO_GRPC,
    http="upstream @NAME@ { server @GRPC@; keepalive 4; }",
    server="location / { grpc_pass grpc://@NAME@; }",
)
def test_concurrent_grpc(stage: Stage, channel: grpc.Channel) -> None:
    """Many calls on one client connection, of all kinds at once."""
    kinds = [*CALLS] * 10
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda kind: call(channel, kind, CALLS[kind]), kinds))
    assert len(answers) == len(kinds)
    for each in stage.exchanges(len(kinds)):
        assert sorted(each.trace.outline()) in (sorted(NEW), sorted(REUSED))


@pytest.mark.parametrize("status", ["NOT_FOUND", "INTERNAL"])
@pytest.mark.nginx(**TO_GRPC, server="location / { grpc_pass grpc://@GRPC@; }")
def test_failing_grpc(stage: Stage, channel: grpc.Channel, status: str) -> None:
    """gRPC's status is in the trailers: for HTTP, and so for the trace, the call went well."""
    with pytest.raises(grpc.RpcError) as raised:
        call(channel, "unary_unary", [{"status": status}])
    assert raised.value.code().name == status
    trace = stage.exchange().trace
    assert sorted(trace.outline()) == sorted(NEW)
    assert trace.server.attributes["http.response.status_code"] == 200
    assert {span.status for span in trace.spans} == {"UNSET"}


@pytest.mark.nginx(**TO_GRPC, server="location / { grpc_pass grpc://@DEAD1@; }")
def test_dead_grpc(stage: Stage, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        call(channel, "unary_unary", [{}])
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    trace = stage.exchange().trace
    assert trace.outline() == ["downstream read", "upstream connect", "downstream write"]
    assert trace.server.attributes["http.response.status_code"] == 502


@pytest.mark.nginx(**TO_GRPC, server="location / { grpc_pass grpc://@GRPC@; }")
def test_cancelled_grpc(stage: Stage, channel: grpc.Channel) -> None:
    """Without a deadline of gRPC's own, which the server would know and answer."""
    method = channel.unary_unary(f"/{SERVICE}/unary_unary")
    running = method.future(json.dumps({"delay_ms": 500}).encode())
    with pytest.raises(grpc.FutureTimeoutError):
        running.result(timeout=0.2)
    running.cancel()
    each = stage.exchange(Slack(response_early=True))
    assert each.log["status"] == "499"
    exchange = each.trace.named("upstream exchange")[0]
    assert "http.response.status_code" not in exchange.attributes
    assert 0.15 < exchange.seconds < 0.45

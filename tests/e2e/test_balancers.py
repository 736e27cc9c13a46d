"""How nginx chooses peers and keeps connections: with every balancer, each attempt has its spans."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2e.dns_server import SLOW_SECONDS, DnsServer
from e2e.http1_client import Http1Connection
from e2e.nginx_server import nginx_version
from e2e.stage import Exchange, Stage
from e2e.timing import CROWDED

WORKERS = 2

NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
READ_WRITE = ["downstream read", "downstream write"]

UNSCHEDULED_NS = 25_000_000
"""One worker may have read what another one's write() has not yet returned from."""

KEEP = 'proxy_http_version 1.1; proxy_set_header Connection "";'


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str]) -> Iterator[dict[str, str]]:
    names = {
        "one.test": ["127.0.0.1"],
        "two.test": ["127.0.0.1", "127.0.0.2"],
        "slow.test": ["127.0.0.1"],
        "empty.test": [],
    }
    with DnsServer(names) as dns:
        yield {**upstream_addresses, "port": upstream_addresses["ipv4"].rpartition(":")[2], "dns": dns.address}


def exchange_peers(exchanges: list[Exchange]) -> list[str]:
    return [each.trace.named("upstream exchange")[-1].attributes["nginx.upstream.peer"] for each in exchanges]


def get_all(stage: Stage, targets: list[str], clients: int = 4) -> dict[str, tuple[int, bytes]]:
    """Status and body by target, which must all differ; each client on a connection of its own."""

    def get_some(some: list[str]) -> dict[str, tuple[int, bytes]]:
        with Http1Connection(stage.addresses["ipv4"]) as connection:
            responses = {target: connection.request(target) for target in some}
        return {target: (response.status, response.body) for target, response in responses.items()}

    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(get_some, [targets[first::clients] for first in range(clients)]))
    return {target: answer for part in parts for target, answer in part.items()}


BALANCERS = {
    "least_conn": "least_conn;",
    "ip_hash": "ip_hash;",
    "hash": "hash $arg_key;",
    "consistent": "hash $arg_key consistent;",
    "random": "random;",
    "random_two": "random two least_conn;",
    "zone": "zone @NAME@ 64k;",
    "zone_least_conn": "zone @NAME@ 64k; least_conn;",
    "zone_random_two": "zone @NAME@ 64k; random two;",
    "weights": "zone @NAME@ 64k; server @DEAD1@ weight=3 max_fails=0;",
}
if nginx_version() >= (1, 27, 3):
    BALANCERS["resolve"] = "zone @NAME@ 64k; resolver @DNS@ valid=1s; server one.test:@PORT@ resolve;"
if nginx_version() >= (1, 29, 6):
    BALANCERS["sticky"] = "sticky cookie route;"


def _balanced(lines: str) -> pytest.MarkDecorator:
    return pytest.mark.nginx(
        http=f"upstream @NAME@ {{ {lines} server @UP@; server @OTHER@; keepalive 3; }}",
        server=f"location / {{ proxy_pass http://@NAME@; {KEEP} proxy_next_upstream_tries 20; }}",
    )


@pytest.mark.parametrize(
    "balancer", [pytest.param(name, marks=_balanced(lines), id=name) for name, lines in BALANCERS.items()]
)
def test_balancer(stage: Stage, balancer: str) -> None:
    """What a balancer decides is known from its peers; each attempt's spans, from nginx's own log."""
    targets = [f"/{index}?key={index % 20}&delay_ms=3" for index in range(40)]
    answers = get_all(stage, targets)
    assert [status for status, _ in answers.values()] == [200] * 40
    exchanges = stage.exchanges(40, CROWDED)
    peers = exchange_peers(exchanges)
    assert len(set(peers)) == (1 if balancer == "ip_hash" else 2)
    if "hash" in BALANCERS[balancer]:
        keys = [each.log["request_uri"].partition("key=")[2] for each in exchanges]
        assert len(set(zip(keys, peers, strict=True))) <= 20
    assert {each.trace.named("upstream exchange")[0].attributes["nginx.upstream.name"] for each in exchanges} == {
        f"test_balancer_{balancer}"
    }
    failed = sum(
        each.trace.outline().count("upstream connect") for each in exchanges if "502" in each.log["upstream_status"]
    )
    assert (failed > 0) == (balancer == "weights")


POOLS = {
    "one": "server @LISTEN@; keepalive 1;",
    "four": "server @LISTEN@; keepalive 4; keepalive_requests 7;",
    "shared": "zone @NAME@ 64k; server @LISTEN@; keepalive 64;",
}


def _pooled(lines: str) -> pytest.MarkDecorator:
    return pytest.mark.nginx(
        http=f"upstream @NAME@ {{ {lines} }}",
        server=f"""
        location /outer/ {{ proxy_pass http://@NAME@/inner/; {KEEP} }}
        location /inner/ {{ default_type text/plain; return 200 $connection_requests; }}
        """,
    )


@pytest.mark.parametrize("pool", [pytest.param(name, marks=_pooled(lines), id=name) for name, lines in POOLS.items()])
def test_pool(stage: Stage, pool: str) -> None:
    """nginx as its own upstream tells which request of a connection each one was: the first, and only the first,
    has a connect."""
    targets = [f"/outer/{pool}/{index}" for index in range(200)]
    answers = get_all(stage, targets, clients=8)
    exchanges = stage.exchanges(400, CROWDED)
    traces = {each.log["request_uri"]: each.trace for each in exchanges}
    new = {target: body == b"1" for target, (_, body) in answers.items()}
    assert {True, False} == set(new.values())
    for target in targets:
        trace = traces[target]
        assert trace.outline() == (NEW if new[target] else [NEW[0], *NEW[2:]]), target
        inner = traces[target.replace("outer", "inner")]
        exchange = trace.named("upstream exchange")[0]
        assert exchange.start_unix_ns <= inner.server.start_unix_ns < exchange.end_unix_ns
        assert inner.server.end_unix_ns <= exchange.end_unix_ns + UNSCHEDULED_NS
        assert inner.server.attributes["nginx.connection.requests"] == int(answers[target][1])


TO_NAMES = """
    resolver @DNS@ valid=1s;
    location /name/ { set $backend $arg_name; proxy_pass http://$backend:@PORT@; }
    location /address/ { set $backend @IPV4@; proxy_pass http://$backend; }
    location /block/ { set $backend @NAME@; proxy_pass http://$backend; }
    location /socket/ { set $backend @UNIX@; proxy_pass http://$backend:; }
"""


@pytest.mark.nginx(server=TO_NAMES)
def test_resolved_name(stage: Stage) -> None:
    """Asked for the first time, kept for a second, then asked again."""
    with stage.connect() as connection:
        for _ in range(3):
            assert connection.request("/name/?name=one.test").status == 200
    exchanges = stage.exchanges(3)
    assert [each.trace.outline() for each in exchanges] == [NEW] * 3
    assert {peer.rpartition(":")[0] for peer in exchange_peers(exchanges)} == {"127.0.0.1"}


@pytest.mark.nginx(server=TO_NAMES)
def test_resolved_name_with_a_dead_address(stage: Stage) -> None:
    with stage.connect() as connection:
        assert [connection.request("/name/?name=two.test").status for _ in range(10)] == [200] * 10
    exchanges = stage.exchanges(10)
    assert {peer.rpartition(":")[0] for peer in exchange_peers(exchanges)} == {"127.0.0.1"}
    assert any("ECONNREFUSED" in [span.error for span in each.trace.spans] for each in exchanges)


@pytest.mark.nginx(server=TO_NAMES)
def test_slow_name_server(stage: Stage) -> None:
    """The wait for the name is the request's, not the peer's."""
    assert stage.get("/name/?name=slow.test").status == 200
    trace = stage.exchange().trace
    assert trace.outline() == NEW
    read, connect = trace.named("downstream read")[0], trace.named("upstream connect")[0]
    assert (connect.start_unix_ns - read.end_unix_ns) / 1e9 > SLOW_SECONDS * 0.9
    assert connect.seconds < SLOW_SECONDS / 2


@pytest.mark.parametrize("name", ["unknown.test", "empty.test"])
@pytest.mark.nginx(server=TO_NAMES)
def test_name_without_an_address(stage: Stage, name: str) -> None:
    assert stage.get(f"/name/?name={name}").status == 502
    trace = stage.exchange().trace
    assert trace.outline() == READ_WRITE
    assert "nginx.upstream.attempts" not in trace.server.attributes


@pytest.mark.parametrize("kind", ["address", "block", "socket"])
@pytest.mark.nginx(http="upstream @NAME@ { server @UP@; }", server=TO_NAMES)
def test_variable_without_a_name(stage: Stage, kind: str) -> None:
    assert stage.get(f"/{kind}/").status == 200
    each = stage.exchange()
    assert each.trace.outline() == NEW
    name = each.trace.named("upstream exchange")[0].attributes.get("nginx.upstream.name")
    assert name == (stage.log.path.stem if kind == "block" else None)

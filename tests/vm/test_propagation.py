"""--propagate=memory: what upstreams are told by a header that is written into nginx's memory, in 20,000 requests.

`make vm` runs it under other kernels: it needs one that lets a program write there, as a locked down one does not.
valgrind runs nginx's code from elsewhere, where no probe is hit: what it would find has to show as a wrong header, as a
line in the error log or as a dead worker, also where freed memory is overwritten (MALLOC_PERTURB_, mallopt(3)).
"""

import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import NGINX, NginxServer, free_ports, wait_until
from e2e.upstreams import UpstreamProcess, make_certificate

REQUESTS = 10_000
AT_ONCE = 20
EACH_WAY = 250
OTHER_HEADERS_MAX = 40
ROOM = 17
"""Headers that a request may have, Host included, for one more to find room (docs/context-and-sampling.md)."""


@dataclass(frozen=True)
class Sent:
    """One request: what it comes with depends on nothing but its number."""

    number: int

    @property
    def target(self) -> str:
        return f"/{self.number}?echo=1"

    @property
    def others(self) -> list[tuple[str, str]]:
        dice = random.Random(self.number)
        return [(f"x-{i}", "v" * dice.randrange(1, 60)) for i in range(self.number % (OTHER_HEADERS_MAX + 1))]

    @property
    def context(self) -> str | None:
        """No context, a sampled one or one that is not."""
        dice = random.Random(-self.number)
        flags = dice.choice((None, "01", "00"))
        return flags and f"00-{dice.getrandbits(127) + 1:032x}-{dice.getrandbits(63) + 1:016x}-{flags}"

    @property
    def headers(self) -> list[tuple[str, str]]:
        headers = self.others
        if self.context:
            headers.insert(random.Random(self.number).randint(0, len(headers)), ("traceparent", self.context))
        return headers

    @property
    def finds_room(self) -> bool:
        return self.context is not None or 1 + len(self.others) <= ROOM


class Served:
    """nginx before an upstream that answers with the header that it got, and the program attached to nginx."""

    def __init__(self, directory: Path, environment: list[str], *flags: str) -> None:
        make_certificate(directory)
        self.upstream = UpstreamProcess(directory)
        http1, http2 = ((("127.0.0.1", port)) for port in free_ports(2))
        self.http1, self.http2 = http1, http2
        self.nginx = NginxServer(
            directory,
            f"""
            upstream application {{ server {self.upstream.addresses["ipv4"]}; keepalive 32; }}
            server {{
                listen 127.0.0.1:{http1[1]};
                listen 127.0.0.1:{http2[1]} http2;
                keepalive_requests 1000000;
                location / {{
                    proxy_pass http://application;
                    proxy_http_version 1.1;
                    proxy_set_header Connection "";
                }}
            }}""",
            workers=2,
            command=["/usr/bin/env", *environment, NGINX],
        )
        self.nginx.start([http1, http2])
        output = ["--exporter", "json", "--output", directory / "traces.jsonl"]
        self.agent = AgentProcess(self.nginx.pid, directory, ["run", "--pid", str(self.nginx.pid), *output, *flags])

    def told(self, requests: list[Sent]) -> Iterator[tuple[Sent, list[tuple[str, str]]]]:
        """Sends the requests, in turn over HTTP/1.1 and HTTP/2; each with the headers that reached the upstream."""
        connections = [Http1Connection(self.http1) for _ in range(AT_ONCE)]
        streams = Http2Connection(self.http2, tls=False)
        for first in range(0, len(requests), AT_ONCE):
            batch = requests[first : first + AT_ONCE]
            if first // AT_ONCE % 2:
                asked = [Http2Request(each.target, headers=tuple(each.headers)) for each in batch]
                answers = [(each.status, each.body) for each in streams.exchange(asked)]
            else:
                for connection, each in zip(connections, batch, strict=False):
                    connection.send(request_bytes("GET", each.target, dict(each.headers)))
                responses = [connection.read_response() for connection in connections[: len(batch)]]
                answers = [(each.status, each.body) for each in responses]
            for each, (status, body) in zip(batch, answers, strict=True):
                assert status == 200
                lines = [line.partition(":") for line in body.decode().split("\r\n") if line]
                yield each, [(name.lower(), value.strip()) for name, _, value in lines]
        for connection in (*connections, streams):
            connection.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.kill()
        self.nginx.stop()
        self.upstream.stop()

    def problems(self) -> list[str]:
        return [line for line in self.nginx.error_log.read_text().splitlines() if "[notice]" not in line]


def violations(sent: Sent, got: list[tuple[str, str]], trace: Trace | None) -> Iterator[str]:
    """What is wrong with what the upstream got, and with our trace of it."""
    if [header for header in got if header[0].startswith("x-")] != sent.others:
        yield f"other headers: {got}, not {sent.others}"
    told = [value for name, value in got if name == "traceparent"]
    if sent.context and sent.context.endswith("-00"):
        if trace:
            yield "traced, and the client said no"
        if told != [sent.context]:
            yield f"told {told}, not the client's own {sent.context}"
        return
    if trace is None:
        yield "not traced"
        return
    exchanges = trace.named("upstream exchange")
    ours = [f"00-{trace.trace_id}-{each.span_id}-{trace.trace_flags:02x}" for each in exchanges]
    if len(ours) != 1 or not re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", ours[0]):
        yield f"exchanges {ours}"
    if told != (ours if sent.finds_room else []):
        yield f"told {told}, and our exchange is {ours}"
    if sent.context and sent.context.split("-")[1:3] != [trace.trace_id, trace.server.parent_span_id]:
        yield f"does not continue {sent.context}"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Readable for nginx's unprivileged workers."""
    with tempfile.TemporaryDirectory(prefix="otel-nginx-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def check(served: Served, requests: list[Sent]) -> list[str]:
    """Sends the requests; every violation as text."""
    told = list(served.told(requests))
    traced = [each for each in requests if not (each.context or "").endswith("-00")]
    wait_until(lambda: len(served.agent.poll()) >= len(traced), f"{len(traced)} traces", 60)
    served.agent.stop()
    traces: dict[str, Trace] = {trace.server.attributes["url.path"]: trace for trace in served.agent.traces}
    assert len(served.agent.traces) == len(traces) == len(traced)
    return [
        f"{each.number}: {violation}"
        for each, got in told
        for violation in violations(each, got, traces.get(f"/{each.number}"))
    ]


@pytest.mark.parametrize("environment", [[], ["MALLOC_PERTURB_=165"]], ids=["plain", "freed memory overwritten"])
def test_propagation(directory: Path, environment: list[str]) -> None:
    """Each upstream request tells of our exchange span, once, but for those where that has no room: counted."""
    requests = [Sent(number) for number in range(REQUESTS)]
    with Served(directory, environment, "--propagate=memory") as served:
        assert "propagates in nginx's memory" in served.agent.stderr(), served.agent.stderr()
        workers = served.nginx.worker_pids()
        found = check(served, requests)
        assert not found, f"{len(found)} are wrong:\n" + "\n".join(found[:5])
        assert served.problems() == []
        assert served.nginx.worker_pids() == workers
    without_room = sum(not each.finds_room for each in requests)
    counts = Counter({cause: int(n) for cause, n in re.findall(r"(\w+) (\d+)", served.agent.stderr().splitlines()[-1])})
    assert counts["partial_propagation_no_room"] == without_room
    assert counts["partial_propagation_unsafe"] == counts["lost"] == 0
    assert counts["received"] == counts["exported"] == len(served.agent.traces)


def test_rules(directory: Path) -> None:
    """A request that a rule drops is told its trace, or the client's, and the flag 00; the others are told as ever."""
    config = directory / "rules.toml"
    config.write_text('[[rules]]\npath = "/2*"\ndrop = true\n')
    requests = [Sent(number) for number in range(400)]
    dropped = [each for each in requests if str(each.number).startswith("2")]
    with Served(directory, [], "--propagate=memory", "--config", str(config)) as served:
        got = {each.number: headers for each, headers in served.told(dropped)}
        found = check(served, [each for each in requests if each not in dropped])
        assert served.problems() == []
    assert found == []
    for each in dropped:
        told = [value.split("-") for name, value in got[each.number] if name == "traceparent"]
        assert [parts[3] for parts in told] == ["00"] * each.finds_room, each
        assert [header for header in got[each.number] if header[0].startswith("x-")] == each.others
        if each.context:
            assert told[0][1] == each.context.split("-")[1]
    assert f"not_traced_by_rule {len(dropped)}" in served.agent.stderr()


def test_without_propagation(directory: Path) -> None:
    """The same checks see it when nothing is written: of the requests that are traced and have room, each."""
    requests = [Sent(number) for number in range(200)]
    with Served(directory, []) as served:
        found = check(served, requests)
    expected = [each for each in requests if each.finds_room and not (each.context or "").endswith("-00")]
    assert {int(line.partition(":")[0]) for line in found} == {each.number for each in expected}


def test_both_ways(directory: Path) -> None:
    """--propagate alone: on the socket what a socket can carry, in memory what it cannot. Each is told once."""
    make_certificate(directory)
    upstream = UpstreamProcess(directory)
    address = ("127.0.0.1", free_ports(1)[0])
    ipv4, tls, unix = (upstream.addresses[name] for name in ("ipv4", "tls", "unix"))
    kept = 'proxy_http_version 1.1; proxy_set_header Connection "";'
    nginx = NginxServer(
        directory,
        f"""
        upstream kept {{ server {ipv4}; keepalive 4; }}
        upstream kept_tls {{ server {tls}; keepalive 4; }}
        server {{
            listen 127.0.0.1:{address[1]};
            keepalive_requests 1000000;
            location /new {{ proxy_pass http://{ipv4}; }}
            location /kept {{ proxy_pass http://kept; {kept} }}
            location /tls {{ proxy_pass https://kept_tls; {kept} }}
            location /unix {{ proxy_pass http://{unix}:; }}
        }}""",
    )
    nginx.start([address])
    output = ["--exporter", "json", "--output", directory / "traces.jsonl"]
    agent = AgentProcess(nginx.pid, directory, ["run", "--pid", str(nginx.pid), *output, "--propagate"])
    assert "propagates on the socket" in agent.stderr(), agent.stderr()
    assert "and in nginx's memory" in agent.stderr(), agent.stderr()
    told: dict[str, list[str]] = {}
    with Http1Connection(address) as connection:
        for number in range(EACH_WAY):
            context = {"traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01"} if number % 2 else {}
            for way in ("new", "kept", "tls", "unix"):
                answer = connection.request(f"/{way}/{number}?echo=1", headers=context)
                assert answer.status == 200
                told[f"/{way}/{number}"] = re.findall(r"(?im)^traceparent: *(\S+)", answer.body.decode())
    wait_until(lambda: len(agent.poll()) == len(told), "the traces", 60)
    agent.stop()
    nginx.stop()
    upstream.stop()
    assert told == {
        trace.server.attributes["url.path"]: [
            f"00-{trace.trace_id}-{each.span_id}-{trace.trace_flags:02x}" for each in trace.named("upstream exchange")
        ]
        for trace in agent.traces
    }
    assert not re.search("partial_propagation", agent.stderr().splitlines()[-1])
    assert [line for line in nginx.error_log.read_text().splitlines() if "[notice]" not in line] == []

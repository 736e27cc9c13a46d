"""--propagate=socket: what upstreams are told by a header that is written on the socket, in mixed requests.

Each upstream request is judged by its bytes: one well-formed traceparent, with the id of the exported exchange span, or
the client's own header, or none, which must be counted. Bodies and responses must arrive whole, nginx's error log must
stay clean, and the kernel must log nothing. SOCKET_REQUESTS says how many requests; `make socket` sends 100,000.
"""

import itertools
import os
import re
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NginxServer, free_ports, wait_until
from e2e.numbered_requests import SLOW, Load, Proxy, counts_of, judge, kernel_log
from e2e.raw_upstream import RawUpstream, read_head

REQUESTS = int(os.environ.get("SOCKET_REQUESTS", "4000"))
CAUSES = ("connection", "protocol", "configured", "malformed", "unsafe", "no_room")
INTERRUPTIONS = 4


@pytest.fixture
def proxy(directory: Path) -> Iterator[Proxy]:
    made = Proxy(directory)
    yield made
    made.stop()


def attach(pid: int, directory: Path, *flags: str) -> AgentProcess:
    directory.mkdir()
    output = ["--exporter", "json", "--output", directory / "traces.jsonl"]
    return AgentProcess(pid, directory, ["run", "--pid", str(pid), *output, *(flags or ["--propagate=socket"])])


def losses(agent: AgentProcess) -> dict[str, int]:
    counts = counts_of(agent)
    return {cause: counts[name] for cause in CAUSES if counts[name := f"partial_propagation_{cause}"]}


def errors(nginx: NginxServer) -> list[str]:
    return [
        line for line in nginx.error_log.read_text().splitlines() if "[notice]" not in line and "[warn]" not in line
    ]


def test_mixed_requests(proxy: Proxy, directory: Path) -> None:
    """Each exported exchange span has the id that its upstream received; nothing else changed."""
    before = kernel_log()
    agent = attach(proxy.nginx.pid, directory / "agent")
    assert "propagates on the socket" in agent.stderr(), agent.stderr()
    load = Load(proxy.address, iter(range(1, REQUESTS + 1)))
    load.run()
    agent.stop()
    wrong, counts = judge(proxy, agent.traces, range(1, REQUESTS + 1))
    print(counts, losses(agent), agent.stderr().splitlines()[-1])
    assert (load.wrong[:5], len(load.wrong)) == ([], 0)
    assert (wrong[:5], len(wrong)) == ([], 0)
    assert errors(proxy.nginx) == []
    assert counts["told"] > REQUESTS // 3
    assert counts["untold"] == sum(losses(agent).values())
    assert counts["first, no context, told"] == counts["first, no context"]
    assert kernel_log() == before


def test_interruptions(proxy: Proxy, directory: Path) -> None:
    """The program is killed or stopped, and nginx reloaded, in the middle of requests: no request suffers."""
    before = kernel_log()
    ended = threading.Event()
    # Without the slowest requests, which do not end within worker_shutdown_timeout.
    numbers = (each for each in itertools.count(1) if each % SLOW)
    numbers = itertools.takewhile(lambda _: not ended.is_set(), numbers)
    load = Load(proxy.address, numbers, pipelined=False)
    clients = threading.Thread(target=load.run)
    clients.start()
    try:
        for index in range(INTERRUPTIONS):
            agent = attach(proxy.nginx.pid, directory / f"agent{index}")
            told = len(proxy.received)
            wait_until(lambda told=told: len(proxy.received) > told + 300, "requests", 60)  # type: ignore[misc]
            if index % 2:
                agent.stop()
            else:
                agent.signal_all(signal.SIGKILL)
                agent.kill()
            if index == 1:
                proxy.nginx.reload()
    finally:
        ended.set()
        clients.join()
    assert (load.wrong[:5], len(load.wrong)) == ([], 0)
    assert [each for upstream in proxy.upstreams for each in upstream.broken] == []
    assert [each.head for each in proxy.received if not each.well_formed] == []
    assert max(len(each.contexts) for each in proxy.received) <= 2
    assert errors(proxy.nginx) == []
    assert kernel_log() == before


def test_two_programs_on_a_cgroup(proxy: Proxy, directory: Path) -> None:
    """Two of our programs are attached to one cgroup, and trace one nginx. Each socket is in one map."""
    agents = [attach(proxy.nginx.pid, directory / name) for name in ("first", "second")]
    load = Load(proxy.address, iter(range(1, 301)))
    load.run()
    for agent in agents:
        agent.stop()
    assert load.wrong == []
    told = {context.split("-")[2] for each in proxy.received for context in each.contexts if context.count("-") == 3}
    ids = [{span.span_id for trace in agent.traces for span in trace.spans} for agent in agents]
    assert told & ids[0]
    assert not ids[0] & ids[1]
    assert [each.head for each in proxy.received if not each.well_formed] == []
    assert errors(proxy.nginx) == []


def test_nothing_waits(proxy: Proxy, directory: Path) -> None:
    """A header between two parts would make TCP wait 40 ms for an acknowledgement (Nagle)."""
    agent = attach(proxy.nginx.pid, directory / "agent")
    took_ms: dict[str, list[float]] = {"new": [], "kept": []}
    with Http1Connection(proxy.address) as connection:
        for number in range(600):
            kind, body = ("new", "kept")[number % 2], b"x" * (number % 3 * 1000)
            began = time.monotonic()
            response = connection.request(f"/{kind}/{number}?size=10", "POST" if body else "GET", body=body)
            took_ms[kind].append((time.monotonic() - began) * 1000)
            assert response.status == 200
    agent.stop()
    assert sum(len(each.contexts) for each in proxy.received) >= 300
    for kind, each in took_ms.items():
        assert statistics.quantiles(each, n=20)[18] < 25, kind


class OneUpstream:
    """nginx before an upstream that keeps the heads of the requests, and the program attached."""

    def __init__(self, directory: Path, locations: str, *flags: str) -> None:
        self.heads: list[bytes] = []
        self._upstream, self._address = RawUpstream(self._answer), ("127.0.0.1", free_ports(1)[0])
        server = locations.replace("@UPSTREAM@", self._upstream.address)
        self.nginx = NginxServer(directory, f"server {{ listen 127.0.0.1:{self._address[1]}; {server} }}")
        self.nginx.start([self._address])
        self.agent = attach(self.nginx.pid, directory / "agent", *flags)

    def _answer(self, connection: socket.socket) -> None:
        self.heads.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def ask(self, target: str, *headers: tuple[str, str]) -> list[bytes]:
        """Return the upstream request's lines, without the first."""
        lines = [f"GET {target} HTTP/1.1", "Host: localhost", "Connection: close", *map(": ".join, headers), "", ""]
        with socket.create_connection(self._address, 30) as client:
            client.sendall("\r\n".join(lines).encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        return self.heads[-1].split(b"\r\n")[1:]

    def stop(self) -> list[str]:
        """Return the ids of the traces' exchanges, with those of their traces."""
        self.agent.stop()
        self.nginx.stop()
        self._upstream.stop()
        return [f"{trace.trace_id}-{trace.named('upstream exchange')[0].span_id}" for trace in self.agent.traces]


def test_b3(directory: Path) -> None:
    """B3 headers are added, or the client's are repaired in place, beside traceparent."""
    flags = [f"--propagators={name}" for name in ("tracecontext", "b3", "b3multi")]
    served = OneUpstream(directory, "location / { proxy_pass http://@UPSTREAM@; }", "--propagate=socket", *flags)
    trace, span = "0123456789abcdef0123456789abcdef", "00f067aa0ba902b7"
    several = (("X-B3-TraceId", trace), ("X-B3-SpanId", span), ("X-B3-Sampled", "1"))
    told = [
        served.ask("/", *headers)
        for headers in (
            (),
            (("traceparent", f"00-{trace}-{span}-01"),),
            (("b3", f"{trace}-{span}-1"),),
            (("B3", f"{trace[16:]}-{span}-1-{span}"),),
            several,
            several[:2],
            (("X-B3-TraceId", "malformed"),),
        )
    ]
    unsampled = served.ask("/", ("b3", "0"))
    ids = served.stop()
    assert len(ids) == len(told)
    for number, (lines, each) in enumerate(zip(told, ids, strict=True)):
        of_trace, of_span = each.split("-")
        short = of_trace[16:] if number == 3 else of_trace
        assert of_trace == trace or number in (0, 3, 6)
        contexts = [line.decode().lower() for line in lines if re.match(rb"traceparent|b3|x-b3", line, re.I)]
        single = f"b3: {short}-{of_span}-1" + f"-{span}" * (number == 3)
        multi = [f"x-b3-traceid: {of_trace}", f"x-b3-spanid: {of_span}", *["x-b3-sampled: 1"] * (number != 5)]
        expected = [f"traceparent: 00-{each}-01", single, *(["x-b3-traceid: malformed"] if number == 6 else multi)]
        assert sorted(contexts) == sorted(expected), number
    assert [line for line in unsampled if re.match(rb"traceparent|b3|x-b3", line, re.I)] == [b"b3: 0"]
    assert losses(served.agent) == {"malformed": 1}
    assert errors(served.nginx) == []


def test_another_traceparent_of_the_configuration(directory: Path) -> None:
    """nginx's own traceparent stays, also behind a client's header; a header that nginx removes is written again."""
    own = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    served = OneUpstream(
        directory,
        f"""location /own {{ proxy_pass http://@UPSTREAM@; proxy_set_header traceparent {own}; }}
        location /removed {{ proxy_pass http://@UPSTREAM@; proxy_set_header traceparent ""; }}""",
    )
    client = ("traceparent", "00-" + "c" * 32 + "-" + "d" * 16 + "-01")
    for target in ("/own", "/removed"):
        for headers in ((), (client,), (client, client)):
            served.ask(target, *headers)
    ids = served.stop()
    assert [head.count(b"traceparent: ") for head in served.heads] == [1] * 6
    assert [own.encode() in head for head in served.heads] == [True] * 3 + [False] * 3
    assert [ids[index].encode() in served.heads[index] for index in (3, 4, 5)] == [True] * 3
    assert b"c" * 32 in served.heads[4]
    assert losses(served.agent) == {"configured": 3}


def test_doubled_traceparent(directory: Path) -> None:
    """One valid header takes the place of two, if one of them has the right length."""
    served = OneUpstream(directory, "location / { proxy_pass http://@UPSTREAM@; }")
    valid, short = "00-" + "c" * 32 + "-" + "d" * 16 + "-01", "nonsense" * 8
    for values in ((valid, valid), (short, valid), (valid, short), (short, short), (valid, valid, valid)):
        served.ask("/", ("x-first", "1"), *(("Traceparent", value) for value in values), ("tracestate", "a=1"))
    ids = served.stop()
    told = [re.findall(rb"\r\ntraceparent: 00-(.{49})-01(?=\r)", head, re.I) for head in served.heads]
    assert told[:3] == [[each.encode()] for each in ids[:3]]
    assert [head.lower().count(b"\r\ntraceparent:") for head in served.heads] == [1, 1, 1, 2, 3]
    assert [
        b"\r\nx-first: 1\r\n" in head and head.endswith(b"\r\ntracestate: a=1\r\n\r\n") for head in served.heads
    ] == [True] * 5
    assert losses(served.agent) == {"malformed": 2}
    assert errors(served.nginx) == []


def test_protocols_that_stay_in_the_dark(directory: Path, upstream_addresses: dict[str, str]) -> None:
    """Over TLS and over a unix socket nothing is written; each attempt is counted, and answered in full."""
    address = ("127.0.0.1", free_ports(1)[0])
    kept = 'proxy_http_version 1.1; proxy_set_header Connection "";'
    nginx = NginxServer(
        directory,
        f"""upstream tls {{ server {upstream_addresses["tls"]}; keepalive 4; }}
        server {{ listen 127.0.0.1:{address[1]};
        location /tls {{ proxy_pass https://tls; {kept} }}
        location /unix {{ proxy_pass http://{upstream_addresses["unix"]}:/; }} }}""",
    )
    nginx.start([address])
    agent = attach(nginx.pid, directory / "agent")
    with Http1Connection(address) as connection:
        for _ in range(10):
            for target in ("/tls", "/unix"):
                assert connection.request(f"{target}?bytes=300000").body_bytes == 300_000
                assert b"traceparent" not in connection.request(f"{target}?echo=1").body.lower()
    agent.stop()
    nginx.stop()
    assert len(agent.traces) == 40
    assert losses(agent) == {"protocol": 40}
    assert errors(nginx) == []

"""--propagate=socket: what upstreams are told by a header that is written on the socket, in mixed requests.

Each upstream request is judged by its bytes: one well-formed traceparent, with the id of the exported exchange span, or
the client's own header, or none, which must be counted. Bodies and responses must arrive whole, nginx's error log must
stay clean, and the kernel must log nothing. SOCKET_REQUESTS says how many requests; `make socket` sends 100,000.
"""

import itertools
import os
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


def test_another_traceparent_of_the_configuration(directory: Path) -> None:
    """nginx's own traceparent stays, also behind a client's header; a header that nginx removes is written again."""
    heads: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    upstream, address = RawUpstream(answer), ("127.0.0.1", free_ports(1)[0])
    own = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    nginx = NginxServer(
        directory,
        f"""server {{ listen 127.0.0.1:{address[1]};
        location /own {{ proxy_pass http://{upstream.address}; proxy_set_header traceparent {own}; }}
        location /removed {{ proxy_pass http://{upstream.address}; proxy_set_header traceparent ""; }} }}""",
    )
    nginx.start([address])
    agent = attach(nginx.pid, directory / "agent")
    client = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
    with Http1Connection(address) as connection:
        for target in ("/own", "/removed"):
            for headers in ({}, {"traceparent": client}):
                assert connection.request(target, headers=headers).status == 200
    agent.stop()
    nginx.stop()
    upstream.stop()
    ids = [trace.named("upstream exchange")[0].span_id for trace in agent.traces]
    assert [head.count(b"traceparent: ") for head in heads] == [1] * 4
    assert [own.encode() in head for head in heads] == [True, True, False, False]
    assert [ids[index].encode() in heads[index] for index in (2, 3)] == [True, True]
    assert b"c" * 32 in heads[3]
    assert losses(agent) == {"configured": 2}


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

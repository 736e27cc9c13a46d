"""--propagate=socket: what upstreams are told by a header that is written on the socket, in mixed requests.

Each upstream request is judged by its bytes: one well-formed traceparent, with the id of the exported exchange span, or
the client's own header, or none, which must be counted. Bodies and responses must arrive whole, nginx's error log must
stay clean, and the kernel must log nothing. SOCKET_REQUESTS says how many requests; `make socket` sends 100,000.
"""

import fcntl
import hashlib
import itertools
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from e2e.agent_process import AgentProcess
from e2e.gateways import UwsgiServer
from e2e.grpc_server import GrpcServer, call
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NginxServer, free_ports, wait_until
from e2e.numbered_requests import SLOW, Asked, Load, Proxy, counts_of, judge, kernel_log, read_response
from e2e.raw_upstream import RawUpstream, read_head
from e2e.upstreams import make_certificate
from otel_nginx_ebpf.linux import checked, libc

REQUESTS = int(os.environ.get("SOCKET_REQUESTS", "4000"))
CAUSES = ("connection", "protocol", "configured", "malformed", "unsafe", "no_room")
INTERRUPTIONS = 4
CLONE_NEWNET = 0x40000000  # linux/sched.h
FOREIGN_SOCKETS = Path(__file__).with_name("foreign_sockets.py")


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
    check_mixed_requests(proxy, directory, REQUESTS, pipelined=True)


def check_mixed_requests(proxy: Proxy, directory: Path, requests: int, *, pipelined: bool) -> None:
    before = kernel_log()
    agent = attach(proxy.nginx.pid, directory / "agent")
    assert "propagates on the socket" in agent.stderr(), agent.stderr()
    load = Load(proxy.address, iter(range(1, requests + 1)), pipelined)
    load.run()
    agent.stop()
    wrong, counts = judge(proxy, agent.traces, range(1, requests + 1))
    print(counts, losses(agent), agent.stderr().splitlines()[-1])
    assert (load.wrong[:5], len(load.wrong)) == ([], 0)
    assert (wrong[:5], len(wrong)) == ([], 0)
    assert errors(proxy.nginx) == []
    assert counts["told"] > requests // 3
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


@pytest.fixture
def small_send_buffers() -> Iterator[None]:
    """A network namespace of this thread and of what it starts, in which a socket takes 4 KB at once."""
    with open("/proc/thread-self/ns/net") as before:
        checked(libc.unshare(CLONE_NEWNET))
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 4096 4096")
            yield
        finally:
            checked(libc.setns(before.fileno(), CLONE_NEWNET))


def test_small_send_buffers(small_send_buffers: None, proxy: Proxy, directory: Path) -> None:
    """nginx writes a head of more than 4 KB in parts. Pipelined requests fail there also without us."""
    check_mixed_requests(proxy, directory, 400, pipelined=False)


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
        """Return the trace id and the span id of each upstream exchange, in that order."""
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
            (("b3", f"{trace[16:]}-{span}-1"),),
        )
    ]
    unsampled = served.ask("/", ("b3", "0"))
    ids = served.stop()
    assert len(ids) == len(told)
    for number, (lines, each) in enumerate(zip(told, ids, strict=True)):
        of_trace, of_span = each.split("-")
        short = of_trace[16:] if number in (3, 7) else of_trace
        assert of_trace == trace or number in (0, 3, 6, 7)
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


@contextmanager
def foreign_programs(port: str, what: str) -> Iterator[None]:
    """Attach somebody else's programs for connections to a port."""
    command = [sys.executable, FOREIGN_SOCKETS, port, what]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "attached\n"
            yield
        finally:
            process.stdin.close()


def ask(proxy: Proxy, numbers: Iterable[int], size: int, seconds: float = 30) -> None:
    with socket.create_connection(proxy.address, seconds) as connection:
        buffer = b""
        for number in numbers:
            connection.sendall(f"GET /new/{number}?size={size} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            status, got, _, buffer = read_response(connection, buffer)
            assert (status, got) == (200, size)


@pytest.mark.parametrize("first", ["foreign", "ours"])
def test_beside_foreign_programs(proxy: Proxy, directory: Path, first: str) -> None:
    """A socket that is in somebody else's map is left alone, and counted; each map's sockets are its own."""
    before = kernel_log()
    with ExitStack() as stack:
        foreign = foreign_programs(proxy.ipv4.address.rpartition(":")[2], "keeps")
        if first == "foreign":
            stack.enter_context(foreign)
        agent = attach(proxy.nginx.pid, directory / "agent")
        if first == "ours":
            stack.enter_context(foreign)
        ask(proxy, range(100), 1000)
        agent.stop()
    told = sum(bool(each.contexts) for each in proxy.received)
    assert (told, losses(agent)) == ((0, {"connection": 100}) if first == "foreign" else (100, {}))
    assert [each.head for each in proxy.received if not each.well_formed] == []
    assert errors(proxy.nginx) == []
    assert kernel_log() == before


def test_the_watch_for_connections_that_stay(proxy: Proxy, directory: Path) -> None:
    """Somebody else's program takes the callback that should take connections out of the map: the telling ends."""
    agent = attach(proxy.nginx.pid, directory / "agent")
    if "FIONREAD allows the first request" not in agent.stderr():
        agent.stop()
        pytest.skip("connections stay in the map on this kernel; needs one that says 0 to FIONREAD, such as 6.18")
    with foreign_programs(proxy.ipv4.address.rpartition(":")[2], "clears"):
        ask(proxy, range(20), 1000)
        wait_until(lambda: "answers came on connections" in agent.stderr(), "the watch")
        told = sum(bool(each.contexts) for each in proxy.received)
        ask(proxy, range(20, 40), 200_000)
    agent.stop()
    assert told == sum(bool(each.contexts) for each in proxy.received) > 0
    assert errors(proxy.nginx) == []


def test_the_watch_for_stalled_answers(directory: Path) -> None:
    """An answer stalls, because the socket is in somebody else's map: the telling ends."""
    size = 20_000

    def answer(connection: socket.socket) -> None:
        """Send all before nginx reads the first byte."""
        read_head(connection)
        (worker,) = nginx.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        while any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))):  # not yet acknowledged
            time.sleep(0.01)
        os.kill(worker, signal.SIGCONT)
        connection.recv(1)

    upstream, address = RawUpstream(answer), ("127.0.0.1", free_ports(1)[0])
    location = f"location / {{ proxy_pass http://{upstream.address}; }}"
    nginx = NginxServer(directory, f"server {{ listen 127.0.0.1:{address[1]}; {location} }}")
    nginx.start([address])
    with foreign_programs(upstream.address.rpartition(":")[2], "keeps"):
        agent = attach(nginx.pid, directory / "agent")
        if "FIONREAD allows the first request" not in agent.stderr():
            pytest.skip("no answer stalls on this kernel; needs one that says 0 to FIONREAD, such as 6.18")
        with socket.create_connection(address, 3) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(TimeoutError):
                b"".join(iter(lambda: client.recv(65536), b""))
        wait_until(lambda: "waited in vain for the rest of 1 answers" in agent.stderr(), "the watch")
    agent.stop()
    nginx.stop()
    upstream.stop()


def test_protocols_of_gateways(directory: Path) -> None:
    """gRPC, FastCGI, uwsgi and SCGI pass unharmed; each attempt is counted."""
    make_certificate(directory)
    uwsgi, grpc_server = UwsgiServer(directory), GrpcServer(directory)
    http1, http2 = ((("127.0.0.1", port)) for port in free_ports(2))
    gateways = "".join(
        f"location /{name} {{ {name}_pass {uwsgi.addresses[name]}; {name}_param REQUEST_METHOD $request_method; "
        f"{name}_param CONTENT_LENGTH $content_length; {name}_param QUERY_STRING $query_string; }}"
        for name in ("uwsgi", "fastcgi", "scgi")
    )
    nginx = NginxServer(
        directory,
        f"""server {{ listen 127.0.0.1:{http1[1]}; {gateways} }}
        server {{ listen 127.0.0.1:{http2[1]} http2;
        location / {{ grpc_pass grpc://{grpc_server.addresses["grpc"]}; }} }}""",
    )
    nginx.start([http1, http2])
    agent = attach(nginx.pid, directory / "agent")
    with Http1Connection(http1) as connection, grpc.insecure_channel(f"127.0.0.1:{http2[1]}") as channel:
        for _ in range(10):
            for name in ("uwsgi", "fastcgi", "scgi"):
                assert connection.request(f"/{name}?bytes=1000", "POST", body=b"x" * 20_000).status == 200
            assert call(channel, "unary_unary", [{"count": 1, "bytes": 1000}])
    agent.stop()
    nginx.stop()
    uwsgi.stop()
    grpc_server.stop()
    assert losses(agent) == {"protocol": 40}
    assert errors(nginx) == []


def test_a_worker_dies(proxy: Proxy, directory: Path) -> None:
    """Workers are killed in the middle of requests. Their successors tell as they did, and no body gets a header."""
    before = kernel_log()
    agent = attach(proxy.nginx.pid, directory / "agent")
    load = Load(proxy.address, iter(each for each in range(1, 601) if each % SLOW), pipelined=False)
    clients = threading.Thread(target=load.run)
    clients.start()
    for killed in range(3):
        wait_until(lambda killed=killed: len(proxy.received) > 100 * (killed + 1), "requests", 30)  # type: ignore[misc]
        workers = proxy.nginx.worker_pids()
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda dead=workers[0]: dead not in proxy.nginx.worker_pids(), "another worker")  # type: ignore[misc]
    clients.join()
    ask(proxy, range(1000, 1050), 1000)
    agent.stop()
    after = [each for each in proxy.received if each.number >= 1000]
    assert [len(each.contexts) for each in after] == [1] * 50
    assert [each.head for each in proxy.received if not each.well_formed] == []
    whole = {each.number: Asked(each.number) for each in proxy.received if each.number < 1000}
    bodies = {
        number: hashlib.sha256(asked.body).hexdigest() for number, asked in whole.items() if asked.kind != "body-set"
    }
    assert {each.number for each in proxy.received if bodies.get(each.number, each.body_sha) != each.body_sha} == set()
    assert len([line for line in errors(proxy.nginx) if "exited on signal 9" in line]) == 3
    assert kernel_log() == before


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

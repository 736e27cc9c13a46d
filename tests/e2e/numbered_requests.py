"""Provides numbered requests through nginx to upstreams that record, and judges what the upstreams were told.

Everything about a request follows from its number, so that a test can send thousands at once and judge them later.
"""

import contextlib
import hashlib
import random
import re
import socket
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from e2e.agent_process import AgentProcess, Trace
from e2e.nginx_server import NginxServer, free_ports
from e2e.recording_upstream import Received, RecordingUpstream, pattern

CLIENTS = 16
SLOW = 101
"""Of as many requests, one is read slowly by its upstream."""

KINDS = ("new", "kept", "ipv6", "retry", "unbuffered", "unbuffered-kept", "streamed", "limited", "body-set")
LOOK_ALIKES = (
    b"traceparent: 00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01\r\n",
    b"\r\n\r\nGET /new/7?size=1 HTTP/1.1\r\ntraceparent: x\r\n\r\n",
    b"POST /kept/1?size=2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody",
)


@dataclass(frozen=True)
class Asked:
    """A request. Everything about it follows from its number."""

    number: int

    @cached_property
    def kind(self) -> str:
        return random.Random(self.number * 7 + 1).choice(KINDS)

    @cached_property
    def size(self) -> int:
        """The size of the answer's body in bytes."""
        if self.number % 97 == 0:
            return 10_000_000 if self.number % 10 == 0 else 2_000_000
        dice = random.Random(self.number * 7 + 2)
        return dice.choice((0, 1, 100, 4_000, 20_000, 30_000, 70_000, dice.randrange(200_000)))

    @cached_property
    def contexts(self) -> list[str]:
        """The values of the client's traceparent headers."""
        dice = random.Random(self.number * 7 + 3)
        trace, span = f"{dice.getrandbits(127) + 1:032x}", f"{dice.getrandbits(63) + 1:016x}"
        valid, unsampled = f"00-{trace}-{span}-01", f"00-{trace}-{span}-00"
        return dice.choice(
            ([], [], [], [valid], [valid], [unsampled], [f"00-{trace}-{span}-0g"], ["nonsense"], [valid, unsampled],
             [f"cc-{trace}-{span}-01-later"])
        )  # fmt: skip

    @cached_property
    def body(self) -> bytes:
        dice = random.Random(self.number * 7 + 4)
        if self.number % 3:
            return b""
        return dice.choice(LOOK_ALIKES) + pattern(dice.choice((0, 10, 1_000, 17_000, 40_000, 400_000)))

    @cached_property
    def chunked(self) -> bool:
        return bool(self.body) and random.Random(self.number * 7 + 5).random() < 0.3

    @property
    def raw(self) -> bytes:
        dice = random.Random(self.number * 7 + 6)
        slow = "&slow=1" if self.number % SLOW == 0 else ""
        lines = [
            f"{'POST' if self.body else 'GET'} /{self.kind}/{self.number}?size={self.size}{slow} HTTP/1.1",
            "Host: localhost",
        ]
        lines += [f"x-{i}: {'v' * dice.choice((1, 20, 300))}" for i in range(dice.choice((0, 1, 5, 18, 25)))]
        if self.number % 53 == 0:
            lines.append(f"x-large: {'w' * dice.choice((3_000, 7_000))}")
        for value in self.contexts:
            lines.insert(
                dice.randint(2, len(lines)), f"{dice.choice(('traceparent', 'Traceparent', 'TRACEPARENT'))}: {value}"
            )
        if dice.random() < 0.3:
            lines.append("tracestate: one=1,two=2")
        body = self.body
        if body and self.chunked:
            lines.append("Transfer-Encoding: chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif body:
            lines.append(f"Content-Length: {len(body)}")
            if dice.random() < 0.1:
                lines.append("Expect: 100-continue")
        return "\r\n".join([*lines, "", ""]).encode() + body


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send, unless nginx closes the connection meanwhile: then its reader fails, too."""
    with contextlib.suppress(OSError):
        connection.sendall(data)


def read_response(connection: socket.socket, buffer: bytes, slow: bool = False) -> tuple[int, int, str, bytes]:
    """Read a response. Return its status, the body's length and hash, and what came behind it."""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = connection.recv(1 << 16)
            if not data:
                raise ConnectionError(f"closed after {buffer[:200]!r}")
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        if status != 100:
            break
    found = re.search(rb"\r\nContent-Length: *(\d+)", head, re.I)
    assert found, head
    left = total = int(found[1])
    digest = hashlib.sha256()
    while left:
        if not buffer:
            if slow:
                time.sleep(0.001)
            buffer = connection.recv(1 << 13 if slow else 1 << 18)
            if not buffer:
                raise ConnectionError(f"closed {left} of {total} bytes before the end")
        part, buffer = buffer[:left], buffer[left:]
        left -= len(part)
        digest.update(part)
    return status, total, digest.hexdigest(), buffer


class Proxy:
    """nginx with a location for each kind, and upstreams that record."""

    def __init__(self, directory: Path, workers: int = 2) -> None:
        self.ipv4, self.ipv6, self.busy = RecordingUpstream(), RecordingUpstream("::1"), RecordingUpstream(fails=True)
        self.upstreams = (self.ipv4, self.ipv6, self.busy)
        self.address = ("127.0.0.1", free_ports(1)[0])
        new, unbuffered = f"proxy_pass http://{self.ipv4.address};", "proxy_request_buffering off;"
        kept = 'proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection "";'
        locations = {
            "new": new,
            "kept": kept,
            "ipv6": f"proxy_pass http://{self.ipv6.address}; proxy_http_version 1.1;",
            "retry": kept.replace("//kept", "//retry") + "proxy_next_upstream http_503 non_idempotent;",
            "unbuffered": f"{new} proxy_http_version 1.1; {unbuffered}",
            "unbuffered-kept": kept + unbuffered,
            "streamed": f"{new} proxy_buffering off;",
            "limited": f"{new} limit_rate 4m; proxy_buffer_size 4k;",
            "body-set": f"{new} proxy_set_body 'traceparent: $uri';",
        }
        self.nginx = NginxServer(
            directory,
            f"""
            client_body_buffer_size 16k; client_max_body_size 0; large_client_header_buffers 8 32k;
            upstream kept {{ server {self.ipv4.address}; keepalive 16; }}
            upstream retry {{
                server {self.busy.address} max_fails=0; server {self.ipv4.address} max_fails=0; keepalive 16;
            }}
            server {{ listen 127.0.0.1:{self.address[1]}; keepalive_requests 1000000;
            {"".join(f"location /{kind}/ {{ {text} }}" for kind, text in locations.items())} }}""",
            workers=workers,
        )
        self.nginx.start([self.address])

    @property
    def received(self) -> list[Received]:
        return [each for upstream in self.upstreams for each in upstream.received]

    def stop(self) -> None:
        self.nginx.stop()
        for upstream in self.upstreams:
            upstream.stop()


@dataclass
class Load:
    """Clients that send numbered requests, some of them pipelined. `wrong` has what went wrong."""

    address: tuple[str, int]
    numbers: Iterator[int]
    pipelined: bool = True
    """Some connections get several requests at once. nginx answers only the first of them when it is reloaded."""
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int) -> list[Asked]:
        with self._lock:
            return [Asked(number) for _, number in zip(range(count), self.numbers, strict=False)]

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(index,)) for index in range(CLIENTS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    def _client(self, index: int) -> None:
        dice = random.Random(index)
        while asked := self.take(dice.choice((1, 1, 1, 2, 4)) if self.pipelined else 1):
            try:
                self._ask(asked, dice)
            except OSError as error:
                self.wrong.append(f"{[(each.number, each.kind, each.size) for each in asked]}: {error!r}")

    def _ask(self, asked: list[Asked], dice: random.Random) -> None:
        with socket.create_connection(self.address, 30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sender = threading.Thread(target=send_all, args=(connection, b"".join(each.raw for each in asked)))
            sender.start()
            buffer = b""
            for each in asked:
                status, size, digest, buffer = read_response(connection, buffer, slow=each.number % 211 == 0)
                expected = pattern(each.size)
                if (status, size) != (200, each.size) or digest != hashlib.sha256(expected).hexdigest():
                    self.wrong.append(f"{each.number} {each.kind}: status {status}, {size} bytes, not {each.size}")
            sender.join()


def counts_of(agent: AgentProcess) -> Counter[str]:
    return Counter({cause: int(n) for cause, n in re.findall(r"(\w+) (\d+)", agent.stderr().splitlines()[-1])})


def violations(asked: Asked, received: list[Received], trace: Trace | None) -> Iterator[str]:
    """What is wrong with what the upstreams got for a request, and with our trace of it."""
    exchanges = {span.span_id: span for span in trace.named("upstream exchange")} if trace else {}
    told_ids: list[str] = []
    for each in received:
        if not each.well_formed:
            yield f"not well-formed: {each.head!r}"
        body = f"traceparent: /body-set/{asked.number}".encode() if asked.kind == "body-set" else asked.body
        if each.body_sha != hashlib.sha256(body).hexdigest():
            yield "another body arrived"
        if b"tracestate: one=1,two=2\r\n" in asked.raw and b"\r\ntracestate: one=1,two=2\r\n" not in each.head:
            yield "another tracestate arrived"
        if sorted(each.contexts) == sorted(asked.contexts):
            continue
        if len(each.contexts) != 1:
            yield f"{each.contexts} arrived"
            continue
        match = re.fullmatch(r"(00|cc)-([0-9a-f]{32})-([0-9a-f]{16})-0([0-3])(-later)?", each.contexts[0])
        if match is None:
            yield f"{each.contexts} arrived"
            continue
        told_ids.append(match[3])
        if trace is None:
            yield f"told {each.contexts}, and not traced"
        elif match[2] != trace.trace_id or match[3] not in exchanges:
            yield f"told {each.contexts}, and the trace is {trace.trace_id} with {list(exchanges)}"
        elif int(match[4]) != trace.trace_flags:
            yield f"told {each.contexts}, with the flags {trace.trace_flags}"
    if len(set(told_ids)) != len(told_ids):
        yield f"the same id twice: {told_ids}"
    if trace and len(exchanges) != len(received):
        yield f"{len(received)} arrived, {len(exchanges)} exchanges"


def judge(proxy: Proxy, traces: list[Trace], numbers: range) -> tuple[list[str], Counter[str]]:
    """Return what is wrong, and how many requests were told and untold."""
    arrived: dict[int, list[Received]] = defaultdict(list)
    for each in proxy.received:
        arrived[each.number].append(each)
    of_number = {int(trace.server.attributes["url.path"].rsplit("/", 1)[1]): trace for trace in traces}
    wrong: list[str] = [line for upstream in proxy.upstreams for line in upstream.broken]
    counts: Counter[str] = Counter()
    for number in numbers:
        asked = Asked(number)
        wrong += [
            f"{number} {asked.kind}: {each}" for each in violations(asked, arrived[number], of_number.get(number))
        ]
        unsampled = (
            len(asked.contexts) == 1 and asked.contexts[0].startswith("00-") and asked.contexts[0].endswith("-00")
        )
        if number not in of_number and not unsampled:
            wrong.append(f"{number} {asked.kind}: not traced")
        for each in arrived[number]:
            told = sorted(each.contexts) != sorted(asked.contexts)
            counts["told" if told else "left as it was" if unsampled else "untold"] += 1
            if each.first_of_connection and not asked.contexts:
                counts["first, no context"] += 1
                counts["first, no context, told"] += told
    return wrong, counts


def kernel_log() -> list[str]:
    lines = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        line
        for line in lines
        if not re.search(r"systemd|audit:|random:|uprobe|Lockdown|perf: interrupt|hrtimer: interrupt", line)
    ]

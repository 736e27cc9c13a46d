"""Attaching to a working nginx, and detaching from it, while clients of every kind continue.

`make attach` makes twenty attempts in each test.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from unit.otlp_receiver import GrpcReceiver

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.nginx_server import LogLine, NginxServer, free_ports, wait_until
from e2e.oracle import check_facts
from e2e.stage import Key, Stage, key_of_log, key_of_trace
from e2e.timing import Lags, Slack
from e2e.traffic import REQUESTS_A_CONNECTION, Traffic

WORKERS = 2
ATTACHES_IN_CI = 4
ATTACHES = int(os.environ.get("OTEL_NGINX_EBPF_TEST_ATTACHES", ATTACHES_IN_CI))
AT_ONCE = 2
BUSY = 10
NUMBERED_CLIENTS = 3
READY_S = 120
WHILE_S = 1.5

LISTEN = """
    listen @LISTEN@;
    listen @LISTEN_ANYTHING@ ssl http2;
    ssl_certificate @CERTIFICATE@;
    ssl_certificate_key @KEY@;
"""
HTTP = "upstream @NAME@ { server @UP@; keepalive 8; }"
SERVER = """
    location / { return 200 ok; }
    location /app { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }
"""
under_traffic = pytest.mark.nginx(listen=LISTEN, http=HTTP, server=SERVER)

# Clients, upstream, agents and attaching share the processors with nginx.
CROWDED = Slack(late_max_ms=400, median_max_ms=20)
OVERLOADED = Slack(late_max_ms=2000, median_max_ms=200)


@dataclass
class Attached:
    """What one agent saw, from its attach in the middle of traffic to its detach in the middle of traffic."""

    ready_s: float
    """Unix time, as the other."""
    asked_to_end_s: float
    traces: dict[Key, Trace]
    said: str


def attach(pid: int, directory: Path, killed: bool) -> Attached:
    """`killed`: the process that holds the probes, and has no time to remove them in order."""
    directory.mkdir()
    agent = AgentProcess(pid, directory, ready_s=READY_S)
    try:
        ready_s = time.time()
        wait_until(lambda: len(agent.poll()) >= 200 and time.time() > ready_s + WHILE_S, "traces", 60)
        asked_to_end_s = time.time()
        if killed:
            emitter = psutil.Process(agent.emitter_pid)
            agent.kill()
            emitter.wait(60)
            agent.poll()
        else:
            agent.stop()
    finally:
        agent.kill()
    traces = {key_of_trace(trace): trace for trace in agent.traces}
    assert len(traces) == len(agent.traces), "two traces of one request"
    return Attached(ready_s, asked_to_end_s, traces, agent.stderr())


def attach_again_and_again(
    stage: Stage, directory: Path, meanwhile: Callable[[], None] = lambda: None, count: int = ATTACHES
) -> list[Attached]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        attached: list[Future[Attached]] = [
            pool.submit(attach, stage.site.nginx.pid, directory / str(number), killed=number % 4 == 3)
            for number in range(count)
        ]
        while not all(each.done() for each in attached):
            meanwhile()
            time.sleep(0.1)
    return [each.result() for each in attached]


@contextmanager
def traffic(stage: Stage, reloads: bool = False) -> Iterator[Traffic]:
    made = Traffic(stage.addresses["ipv4"], stage.addresses["anything"], reloads)
    try:
        wait_until(lambda: len(stage.log.poll()) >= 200, "traffic", 30)
        yield made
    finally:
        made.close()


def began_s(line: LogLine) -> float:
    return float(line["msec"]) - float(line["request_time"])


def check(stage: Stage, attached: list[Attached], slack: Slack, losses_max: int = 0) -> None:
    """Each request between `ready` and the signal to end has a trace, and no trace is wrong."""
    lines = {key_of_log(line): line for line in stage.log.lines}
    assert len(lines) == len(stage.log.lines)
    for each in attached:
        # nginx's clock may be behind: a request that it says has ended just before has perhaps ended just after.
        wanted = {
            key
            for key, line in lines.items()
            if began_s(line) >= each.ready_s and float(line["msec"]) <= each.asked_to_end_s - 0.2
        }
        kinds = {lines[key]["request_uri"].rpartition("/")[0] for key in wanted}
        assert kinds >= {"/keep-alive", "/tls", "/app/kept", "/app/slow", "/app/h2", "/h2", "/pipelined"}, kinds
        missing = [lines[key] for key in wanted - each.traces.keys()]
        assert not missing, f"{len(missing)} of {len(wanted)} requests have no trace: {missing[0]}"
        assert each.traces.keys() <= lines.keys(), "a trace of no request"
        wrong = [
            f"{began_s(lines[key]) - each.ready_s:+.3f} s from ready: {violations}\n  {lines[key]}\n  {trace}"
            for key, trace in each.traces.items()
            if (violations := check_facts(trace, lines[key]))
        ]
        assert not wrong, f"{len(wrong)} of {len(each.traces)} are wrong:\n" + "\n".join(wrong[:5])
        stage.lags = Lags()
        stage.match([lines[key] for key in each.traces], lambda each=each: list(each.traces.values()), slack)  # type: ignore[misc]
        count = len(each.traces)
        told = re.search(rf"^otel-nginx-ebpf: received {count}, exported {count}, lost (\d+)", each.said, re.MULTILINE)
        assert told, each.said
        assert int(told[1]) <= losses_max, each.said
        assert not re.search("contradict|does not look|detached|never called|Traceback", each.said), each.said


@under_traffic
def test_attach_and_detach(stage: Stage, tmp_path: Path) -> None:
    """No request fails, and nginx has nothing to say."""
    said = stage.site.nginx.error_log.read_text()
    with traffic(stage) as clients:
        attached = attach_again_and_again(stage, tmp_path)
        answered = clients.stop()
    stage.lines(answered)
    check(stage, attached, CROWDED)
    assert stage.site.nginx.error_log.read_text() == said


@under_traffic
def test_reload_during_the_attach(stage: Stage, tmp_path: Path) -> None:
    """Old workers finish what they have, while new ones take what comes; what they take and never answer is counted."""
    stage.site.losses_max = 100
    with traffic(stage, reloads=True) as clients:
        attached = attach_again_and_again(stage, tmp_path, stage.site.nginx.reload)
        clients.stop()
    wait_for_the_log(stage)
    # Where a worker that ends has more to read it lingers, and logs after that.
    check(stage, attached, replace(CROWDED, end_early=True), stage.site.losses_max)


def wait_for_the_log(stage: Stage) -> None:
    """Until no worker that is shutting down can write a line any more."""
    count = -1

    def still() -> bool:
        nonlocal count
        before, count = count, len(stage.log.poll())
        time.sleep(0.5)
        return before == count

    wait_until(still, "the last log lines", 20)


@under_traffic
def test_on_a_busy_machine(stage: Stage, tmp_path: Path) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        with traffic(stage) as clients:
            attached = attach_again_and_again(stage, tmp_path, count=ATTACHES if ATTACHES > ATTACHES_IN_CI else 2)
            answered = clients.stop()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    stage.lines(answered)
    check(stage, attached, OVERLOADED)


ERRORS = """
    server {{
        listen 127.0.0.1:{port};
        access_log off;
        root {prefix};
        location /healthz/ {{ return 200; }}
        location /found/ {{ return 200; }}
    }}
"""
RULES = """
[[rules]]
path = "/healthz/*"
drop = true

[[rules]]
path = ["/missing/*", "/found/*"]
span_name = "numbered"
service_name = "numbers"
"""


@dataclass
class Numbered:
    """Clients whose requests have a number each, in the path and in a header, until the block ends.

    nginx logs an error for each `/missing/`.
    """

    port: int
    stop: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By path: when the request was sent and when it was answered, in Unix time."""

    def converse(self, first: int) -> None:
        number = first
        while not self.stop.is_set():
            with Http1Connection(("127.0.0.1", self.port)) as connection:
                for _ in range(REQUESTS_A_CONNECTION):
                    for kind, status in (("missing", 404), ("found", 200), ("healthz", 200)):
                        began_s = time.time()
                        path = f"/{kind}/{number}"
                        assert connection.request(path, headers={"X-Number": path}).status == status
                        self.sent[path] = began_s, time.time()
                    number += NUMBERED_CLIENTS
                    self.stop.wait(0.005)

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(NUMBERED_CLIENTS) as pool:
            clients = [pool.submit(self.converse, first) for first in range(NUMBERED_CLIENTS)]
            try:
                yield
            finally:
                self.stop.set()
        for each in clients:
            each.result()


def attach_with_options(pid: int, directory: Path) -> tuple[float, float, GrpcReceiver, str]:
    """Return when the program was ready and when it was asked to end, in Unix time; what it sent; what it said."""
    directory.mkdir()
    (directory / "rules.toml").write_text(RULES)
    with GrpcReceiver() as receiver:
        options = ["--logs", "--config", directory / "rules.toml", "--capture-request-headers", "x-number"]
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}"}
        command = ["run", "--pid", str(pid), "--batch-delay-ms", "100", *options]
        agent = AgentProcess(pid, directory, command, environment, ready_s=READY_S)
        try:
            ready_s = time.time()
            wait_until(lambda: len(receiver.log_records) >= 100 and time.time() > ready_s + WHILE_S, "log records", 60)
            asked_to_end_s = time.time()
            agent.stop()
        finally:
            agent.kill()
    return ready_s, asked_to_end_s, receiver, agent.stderr()


def test_with_log_records_rules_and_captured_headers(
    public_directory: Path, upstream_addresses: dict[str, str], tmp_path: Path
) -> None:
    """Each line that nginx logs is one log record with its request's trace. Rules and headers hold from the first."""
    prefix = public_directory / "attach"
    prefix.mkdir()
    (port,) = free_ports(1)
    nginx = NginxServer(prefix, ERRORS.format(port=port, prefix=prefix))
    nginx.start([("127.0.0.1", port)])
    try:
        clients = Numbered(port)
        with clients.running(), ThreadPoolExecutor(AT_ONCE) as pool:
            count = ATTACHES if ATTACHES > ATTACHES_IN_CI else AT_ONCE
            runs = [pool.submit(attach_with_options, nginx.pid, tmp_path / str(number)) for number in range(count)]
            attached = [each.result() for each in runs]
    finally:
        nginx.stop()
    for ready_s, asked_to_end_s, receiver, said in attached:
        wanted = {path for path, (began, ended) in clients.sent.items() if began > ready_s and ended < asked_to_end_s}
        traced = {path: server for server in receiver.spans if (path := texts(server).get("url.path"))}
        assert len(traced) == len([span for span in receiver.spans if span.name == "numbered"])
        assert traced.keys() <= clients.sent.keys()
        assert not any(path.startswith("/healthz/") for path in traced)
        assert {path for path in wanted if not path.startswith("/healthz/")} <= traced.keys()
        for path, server in traced.items():
            (header,) = (each for each in server.attributes if each.key == "http.request.header.x-number")
            assert [value.string_value for value in header.value.array_value.values] == [path]
        logged = Counter[str]()
        for record, service in records_with_service(receiver):
            found = re.search(r"(/missing/\d+)\" failed", record.body.string_value)
            assert found, record
            logged[found[1]] += 1
            if record.trace_id:
                assert (record.trace_id, service) == (traced[found[1]].trace_id, "numbers")
            else:  # the program was attached or detached in the middle of the request
                assert found[1] not in wanted
        missing = {path for path in wanted if path.startswith("/missing/")}
        assert len(missing) > 100
        assert missing <= logged.keys()
        assert set(logged.values()) == {1}
        told = f"log records: received {logged.total()}, exported {logged.total()}, lost 0"
        assert told in said, said
        assert f"otel-nginx-ebpf: received {len(traced)}, exported {len(traced)}, lost 0" in said, said
        resources = [each.resource for sent in receiver.requests for each in sent.resource_spans]
        assert {texts(resource)["service.name"] for resource in resources} == {"numbers"}


def records_with_service(receiver: GrpcReceiver) -> Iterator[tuple[LogRecord, str]]:
    for group in (group for sent in receiver.log_requests for group in sent.resource_logs):
        for record in (record for scope in group.scope_logs for record in scope.log_records):
            yield record, texts(group.resource)["service.name"]


def texts(told: Any) -> dict[str, str]:
    """Return the attributes of a span or a resource that are texts."""
    return {pair.key: pair.value.string_value for pair in told.attributes if pair.value.HasField("string_value")}

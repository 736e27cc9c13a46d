"""OTEL_TRACES_SAMPLER, decided in the kernel. The SDK's own samplers say what must happen to each request.

A request that is left out does not cross the ring buffer: `received` counts the requests that crossed, `not_sampled`
all others. Together they are all requests that nginx logged.
"""

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log, sqrt
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_ON,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    TraceIdRatioBased,
)

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.nginx_server import AccessLog, NginxServer, free_ports, wait_until

RATIO = 0.3
PARENT_ID = "b7ad6b7169203331"
NEVER_FAILS = 1e-9
"""How probable it is at most that a statistical test fails although the sampler is right."""


@dataclass(frozen=True)
class Stand:
    """nginx, whose requests many agents trace one after another."""

    nginx: NginxServer
    port: int
    log: AccessLog

    def send(self, requests: list[bytes]) -> None:
        """On one connection, a hundred at a time without waiting for answers; returns when nginx has logged them."""
        logged = len(self.log.poll()) + len(requests)
        with Http1Connection(("127.0.0.1", self.port)) as connection:
            for first in range(0, len(requests), 100):
                part = requests[first : first + 100]
                connection.send(b"".join(part))
                for _ in part:
                    connection.read_response()
        wait_until(lambda: len(self.log.poll()) == logged, "nginx's log lines")


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    directory = public_directory / "sampling"
    directory.mkdir()
    port = free_ports(1)[0]
    nginx = NginxServer(
        directory,
        f"""
        keepalive_requests 100000;
        upstream kept {{ server {upstream_addresses["ipv4"]}; keepalive 4; }}
        server {{
            listen 127.0.0.1:{port};
            access_log logs/all.log json;
            location / {{ return 204; }}
            location /app {{ proxy_pass http://{upstream_addresses["ipv4"]}; }}
            location /kept {{ proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection ""; }}
            location /mirrored {{ mirror /mirror; proxy_pass http://{upstream_addresses["ipv4"]}; }}
            location = /mirror {{ internal; proxy_pass http://{upstream_addresses["other"]}/?delay_ms=400; }}
            location /broken {{ return 503; }}
            location /missing {{ return 404; }}
            location /logged {{ root /nonexistent; }}
            location /dead {{ proxy_pass http://{upstream_addresses["dead1"]}; }}
        }}
        """,
    )
    nginx.start([("127.0.0.1", port)])
    yield Stand(nginx, port, AccessLog(directory / "logs" / "all.log"))
    nginx.stop()
    assert nginx.problems() == []


def traced(stand: Stand, directory: Path, requests: list[bytes], **environment: str) -> list[Trace]:
    """The traces of an agent that was attached while the requests were made; it has counted all the others."""
    agent = AgentProcess(stand.nginx.pid, directory, environment=environment)
    try:
        stand.send(requests)
    finally:
        agent.stop()
    counts = agent.stderr().splitlines()[-1]
    received, not_sampled = (
        int(found[1]) if (found := re.search(rf"{name} (\d+)", counts)) else 0 for name in ("received", "not_sampled")
    )
    assert received == len(agent.traces)
    assert received + not_sampled == len(requests), counts
    assert re.search(r"\blost 0\b", counts), counts
    return agent.traces


def request(trace_id: int, flags: int, target: str = "/") -> bytes:
    return request_bytes("GET", target, {"traceparent": f"00-{trace_id:032x}-{PARENT_ID}-{flags:02x}"})


def sampled(sampler: Sampler, trace_id: int, flags: int | None) -> bool:
    """The SDK's decision on a span with a remote parent of these flags; None: on a root."""
    parent = None
    if flags is not None:
        context = trace.SpanContext(trace_id, int(PARENT_ID, 16), is_remote=True, trace_flags=trace.TraceFlags(flags))
        parent = trace.set_span_in_context(trace.NonRecordingSpan(context))
    return sampler.should_sample(parent, trace_id, "GET /").decision.is_sampled()


RATIO_OF = {"OTEL_TRACES_SAMPLER_ARG": str(RATIO)}
SAMPLERS: dict[str, tuple[dict[str, str], Sampler, float]] = {
    # variables, the SDK's sampler, the part of the roots that it takes
    "default": ({}, ParentBased(ALWAYS_ON), 1),
    "traceidratio": (RATIO_OF, TraceIdRatioBased(RATIO), RATIO),
    "parentbased_traceidratio": (RATIO_OF, ParentBasedTraceIdRatio(RATIO), RATIO),
    "traceidratio of none": ({"OTEL_TRACES_SAMPLER_ARG": "0"}, TraceIdRatioBased(0), 0),
    "traceidratio of all": ({"OTEL_TRACES_SAMPLER_ARG": "1"}, TraceIdRatioBased(1), 1),
}
ROOTS = 5_000


def trace_ids() -> list[int]:
    """Random ones, and those at the edges of the ratio's rule."""
    bound = TraceIdRatioBased(RATIO).bound
    edges = [bound - 1, bound, bound + 1, 1, 2**63, 2**64 - 1]
    ids = [upper << 64 | lower for upper in (0, 1, 2**63, 2**64 - 1) for lower in edges]
    return [*ids, 1 << 64, *(secrets.randbits(128) | 1 for _ in range(400))]


@pytest.mark.parametrize("name", SAMPLERS)
def test_decisions_are_the_sdks(stand: Stand, name: str, tmp_path: Path) -> None:
    """The same trace ids, wanted and not wanted by their parents: traced are the very same. And as many roots as the
    ratio says, none of them with a trace id that the SDK's sampler would have left out. Each trace is whole."""
    arguments, sampler, ratio = SAMPLERS[name]
    if name != "default":
        arguments = {"OTEL_TRACES_SAMPLER": name.partition(" ")[0], **arguments}
    cases = [(trace_id, flags) for trace_id in trace_ids() for flags in (0, 1)]
    targets = {f"/app/{number}": case for number, case in enumerate(cases)}
    requests = [request(*case, target) for target, case in targets.items()] + [request_bytes("GET", "/")] * ROOTS
    traces = traced(stand, tmp_path, requests, **arguments)

    continued = {path: each for each in traces if (path := each.server.attributes["url.path"]) != "/"}
    assert continued.keys() == {target for target, case in targets.items() if sampled(sampler, *case)}
    for target, each in continued.items():
        assert (each.trace_id, each.server.parent_span_id) == (f"{targets[target][0]:032x}", PARENT_ID)
        assert each.trace_flags == 1
        outline = [name for name in each.outline() if name != "downstream read"]  # pipelined: it may be absent
        assert outline == ["upstream connect", "upstream exchange", "downstream write"]

    begun = [each for each in traces if each.server.attributes["url.path"] == "/"]
    # Hoeffding: a binomial count is farther than this from its mean with a probability of at most 2·exp(-2·d²/count).
    distance = ceil(sqrt(ROOTS * log(2 / NEVER_FAILS) / 2)) if 0 < ratio < 1 else 0
    assert abs(len(begun) - ratio * ROOTS) <= distance
    assert all(sampled(sampler, int(each.trace_id, 16), None) for each in begun)
    assert len({each.trace_id for each in begun}) == len(begun)
    assert {each.server.parent_span_id for each in begun} <= {None}


KEPT = 400


def test_over_a_kept_upstream_connection(stand: Stand, tmp_path: Path) -> None:
    """Roots that are left out when their attempt begins, between requests whose parent wants them, over one upstream
    connection. What is traced has its own exchange, and nothing of what was left out."""
    sampler = ParentBasedTraceIdRatio(RATIO)
    wanted = {f"/kept/{number}": secrets.randbits(128) | 1 for number in range(0, KEPT, 4)}
    paths = [f"/kept/{number}" for number in range(KEPT)]
    requests = [request(wanted[path], 1, path) if path in wanted else request_bytes("GET", path) for path in paths]
    traces = traced(stand, tmp_path, requests, OTEL_TRACES_SAMPLER="parentbased_traceidratio", **RATIO_OF)

    continued = {path: each for each in traces if (path := each.server.attributes["url.path"]) in wanted}
    assert {path: int(each.trace_id, 16) for path, each in continued.items()} == wanted
    begun = [each for each in traces if each.server.attributes["url.path"] not in wanted]
    roots = KEPT - len(wanted)
    assert abs(len(begun) - RATIO * roots) <= ceil(sqrt(roots * log(2 / NEVER_FAILS) / 2))
    assert all(sampled(sampler, int(each.trace_id, 16), None) for each in begun)
    for each in traces:
        exchange = each.named("upstream exchange")[0].attributes
        assert exchange["url.full"] == f"http://kept{each.server.attributes['url.path']}"
    outlines = [[name for name in each.outline() if name != "downstream read"] for each in traces]
    reused = ["upstream exchange", "downstream write"]
    assert all(outline in (reused, ["upstream connect", *reused]) for outline in outlines)
    assert outlines.count(reused) > len(traces) / 2


WANTED, UNWANTED, ROOT = "parent wants it", "parent does not", "no parent"
ERRORS = ("/broken", "/dead", "/app?status=503", "/logged")  # the last is a 404 for which nginx logs [error]
SLOW = "/app?delay_ms=400"
OTHERS = ("/", "/missing", "/app?status=404")


def with_parent(parent: str, target: str) -> bytes:
    if parent == ROOT:
        return request_bytes("GET", target)
    return request(secrets.randbits(128) | 1, int(parent == WANTED), target)


def kept(traces: list[Trace]) -> list[tuple[str, str | None, str | None]]:
    """Target, why it was kept, and its parent."""
    told = [each.server.attributes for each in traces]
    targets = [each["url.path"] + ("?" + each["url.query"] if "url.query" in each else "") for each in told]
    reasons = [each.get("nginx.sampling.kept_for") for each in told]
    parents = [each.server.parent_span_id for each in traces]
    return sorted(zip(targets, reasons, parents, strict=True), key=str)


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_always_off"])
def test_errors_and_slow_ones_are_kept(stand: Stand, sampler: str, tmp_path: Path) -> None:
    """Of requests that the sampler leaves out, but not of those whose parent did; what it takes needs no reason."""
    both = "/app?delay_ms=401&status=500"
    # A mirror that outlasts the response is part of its SERVER span.
    reasons = {**dict.fromkeys(ERRORS, "error"), SLOW: "slow", "/mirrored": "slow", both: "error"}
    requests = [with_parent(parent, target) for target in (*reasons, *OTHERS) for parent in (WANTED, UNWANTED, ROOT)]
    variables = {"OTEL_NGINX_EBPF_KEEP_ERRORS": "true", "OTEL_NGINX_EBPF_KEEP_SLOWER_THAN": "300ms"}
    traces = traced(stand, tmp_path, requests, OTEL_TRACES_SAMPLER=sampler, **variables)

    expected: list[tuple[str, str | None, str | None]] = [(*reason, None) for reason in reasons.items()]
    if sampler == "always_off":
        expected += [(*reason, PARENT_ID) for reason in reasons.items()]
    else:
        expected += [(target, None, PARENT_ID) for target in (*reasons, *OTHERS)]
    assert kept(traces) == sorted(expected, key=str)
    slow = [each for each in traces if "delay_ms" in each.server.attributes.get("url.query", "")]
    assert all(each.named("upstream exchange")[0].seconds > 0.39 for each in slow)

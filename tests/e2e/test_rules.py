"""Rules: the kernel's reading of them is the reading of `traces.rules`, applied to what nginx logged.

Each rule gives its requests an attribute with the rule's number, so that a trace says which rule matched.
"""

import json
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from e2e.agent_process import PROGRAM, AgentProcess, Trace
from e2e.http1_client import Http1Connection, request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until
from e2e.recording_upstream import RecordingUpstream
from e2e.test_request_metrics import scrape
from e2e.test_sampling import request, sampled, trace_ids
from otel_nginx_ebpf.settings.rules import Rule
from otel_nginx_ebpf.settings.sources import load
from otel_nginx_ebpf.traces.rules import first_match

SEED = 17
REQUESTS = 600

FACTS = ("number", "server_name", "location", "path", "method", "user_agent", "status")


@dataclass(frozen=True)
class Stand:
    nginx: NginxServer
    port: int
    h2_port: int
    log: AccessLog
    """What nginx says of the facts that rules compare."""

    def send(self, requests: Sequence[bytes]) -> None:
        """On one connection, fifty at a time without waiting for answers; returns when nginx has logged them."""
        logged = len(self.log.poll()) + len(requests)
        with Http1Connection(("127.0.0.1", self.port)) as connection:
            for first in range(0, len(requests), 50):
                part = requests[first : first + 50]
                connection.send(b"".join(part))
                for each in part:
                    connection.read_response(each.split(b" ", 1)[0].decode())
        self.wait_for(logged)

    def wait_for(self, logged: int) -> None:
        wait_until(lambda: len(self.log.poll()) == logged, "nginx's log lines")


SERVER = """
    listen 127.0.0.1:@PORT@;
    listen 127.0.0.1:@H2@ http2;
    access_log logs/facts.log facts;
    set $location "";
    location / { set $location "/"; return 204; }
    location = /healthz { set $location "/healthz"; return 200 "healthy"; }
    location /quiet { set $location "/quiet"; return 200 "hush"; }
    location /app/ { set $location "/app/"; proxy_pass http://@UP@; }
    location /app/slow { set $location "/app/slow"; proxy_pass http://@UP@/?delay_ms=120&x=; }
    location ^~ /static/ { set $location "/static/"; return 404; }
    location ~ "\\.(css|js)" { set $location "\\\\.(css|js)"; return 503; }
"""


@pytest.fixture(scope="module")
def stand(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Stand]:
    directory = public_directory / "rules"
    directory.mkdir()
    port, h2_port = free_ports(2)
    facts = {
        "number": "$arg_n",
        "server_name": "$server_name",
        "location": "$location",
        "target": "$request_uri",
        "method": "$request_method",
        "user_agent": "$http_user_agent",
        "status": "$status",
    }
    server = (
        SERVER.replace("@PORT@", str(port)).replace("@H2@", str(h2_port)).replace("@UP@", upstream_addresses["ipv4"])
    )
    nginx = NginxServer(
        directory,
        f"""
        log_format facts escape=json '{json.dumps(facts)}';
        keepalive_requests 100000;
        server {{ server_name shop.example; {server} }}
        server {{ server_name *.wild.example; {server} }}
        server {{ server_name ""; {server} }}
        """,
    )
    nginx.start([("127.0.0.1", port)])
    yield Stand(nginx, port, h2_port, AccessLog(directory / "logs" / "facts.log"))
    nginx.stop()
    assert nginx.problems() == []


LONG = "/static/" + 500 * "x"
PATHS = (
    "/",
    "/healthz",
    "/healthz/deep",
    "/quiet",
    "/app/",
    "/app/users/1",
    "/app/users/1/cart",
    "/static/a.css",
    "/a.css",
    "/js/app.js",
    LONG + "x" * (511 - len(LONG)),
    LONG + "x" * (507 - len(LONG)) + ".css",
    LONG + "x" * (508 - len(LONG)) + ".css",
    LONG + "x" * 400 + ".css",
    "/static/" + "y" * 120,
    "/static/" + "y" * 121,
    "/é/日本",
    "/%C3%A9/a*b",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "PROPFIND", "BASELINE-CONTROL")
AGENTS = (
    "",
    "kube-probe/1.29",
    "kube-probe/",
    "kube-prob",
    "ELB-HealthChecker/2.0",
    "Mozilla/5.0 " + "z" * 600,
    "z" * 511,
    "z" * 512,
)
HOSTS = ("shop.example", "a.wild.example", "b.a.wild.example", "other.example")
NAMES = ("shop.example", "*.wild.example")
LOCATIONS = ("/", "/healthz", "/app/", "/static/", r"\.(css|js)")


def some_pattern(source: random.Random, texts: Sequence[str]) -> str:
    """A text, or a text with a * for a part of it, of those that a rule can have."""
    while True:
        text = source.choice([text for text in texts if text])
        if source.random() < 0.6:
            start = source.randint(0, min(len(text), 130))
            end = source.choice([0, source.randint(0, min(len(text) - start, 130))])
            text = f"{text[:start]}*{text[len(text) - end :] if end else ''}"
        parts = text.split("*")
        if len(parts) <= 2 and any(parts) and all(len(part.encode()) <= 128 for part in parts):
            return text


def some_rule(source: random.Random, number: int) -> dict[str, object]:
    conditions = {
        "path": lambda: [some_path(source) for _ in range(source.randint(1, 3))],
        "user_agent": lambda: [some_pattern(source, AGENTS) for _ in range(source.randint(1, 2))],
        "server_name": lambda: some_pattern(source, NAMES),
        "location": lambda: some_pattern(source, LOCATIONS),
        "method": lambda: source.sample(METHODS, source.randint(1, 3)),
        "status": lambda: source.choice(["2xx", "4xx", "5xx", 404, 200, [204, "5xx"]]),
    }
    chosen = source.sample(sorted(conditions), source.choice([1, 2, 2, 3]))
    rule: dict[str, object] = {name: conditions[name]() for name in chosen}
    if source.random() < 0.3:
        return {**rule, "drop": True}
    return {**rule, "attributes": {"rule": number}, "service_name": f"service-{number % 3}"}


def some_path(source: random.Random) -> str:
    while True:
        text = some_pattern(source, PATHS)
        if text[0] in "/*":
            return text


def toml(rules: Sequence[dict[str, object]]) -> str:
    def value(each: object) -> str:
        if isinstance(each, dict):
            return "{ " + ", ".join(f"{json.dumps(name)} = {value(item)}" for name, item in each.items()) + " }"
        return json.dumps(each, ensure_ascii=False)

    return "".join(
        "[[rules]]\n" + "".join(f"{name} = {value(each)}\n" for name, each in rule.items()) for rule in rules
    )


def rules_file(directory: Path, rules: Sequence[dict[str, object]]) -> tuple[Path, tuple[Rule, ...]]:
    path = directory / "rules.toml"
    path.write_text(toml(rules))
    return path, load({}, path).rules


def facts_of(line: LogLine) -> dict[str, str | None]:
    facts: dict[str, str | None] = {
        name: line[name] or None for name in ("server_name", "location", "method", "user_agent")
    }
    return {**facts, "path": line["target"].partition("?")[0]}


def number_of(trace: Trace) -> str:
    return str(trace.server.attributes["url.query"]).removeprefix("n=")


def outcome_of(trace: Trace) -> tuple[object, object]:
    return trace.server.attributes.get("rule"), trace.resource["service.name"]


def expected(rules: Sequence[Rule], lines: Sequence[LogLine]) -> dict[str, tuple[object, object]]:
    """The requests that are traced, by their number: their rule's number, and their service."""
    found: dict[str, tuple[object, object]] = {}
    for line in lines:
        matched = first_match(rules, facts_of(line), int(line["status"]))
        rule = rules[matched - 1] if matched else None
        if rule is None:
            found[line["number"]] = None, "nginx"
        elif not rule.drop:
            found[line["number"]] = matched, rule.service_name
    return found


def counts_of(stderr: str) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", stderr.splitlines()[-1])}


def test_the_kernel_reads_rules_as_python_does(stand: Stand, tmp_path: Path) -> None:
    """32 random rules and many random requests, over HTTP/1.1 and HTTP/2. `replay` comes to the same with a capture
    that was made without rules."""
    source = random.Random(SEED)
    path, rules = rules_file(tmp_path, [some_rule(source, number) for number in range(1, 33)])
    capture = tmp_path / "all.capture"
    recorder_directory = tmp_path / "recorder"
    recorder_directory.mkdir()
    before = len(stand.log.poll())
    recorder = AgentProcess(
        stand.nginx.pid, recorder_directory, ["record", "--pid", str(stand.nginx.pid), "-o", capture]
    )
    agent = AgentProcess(stand.nginx.pid, tmp_path, environment={"OTEL_NGINX_EBPF_CONFIG": str(path)})
    requests = []
    for number in range(REQUESTS):
        headers = {"Host": source.choice(HOSTS)}
        if user_agent := source.choice(AGENTS):
            headers["User-Agent"] = user_agent
        target = f"{source.choice(PATHS)}?n={number}".encode().decode("latin-1")
        requests.append(request_bytes(source.choice(METHODS), target, headers))
    stand.send(requests)
    connection = Http2Connection(("127.0.0.1", stand.h2_port), tls=False)
    connection.exchange(
        [
            Http2Request(source.choice(PATHS[:8]) + f"?n={REQUESTS + number}", source.choice(METHODS[:5]))
            for number in range(100)
        ]
    )
    connection.close()
    stand.wait_for(before + REQUESTS + 100)
    recorder.stop()
    agent.stop()

    lines = stand.log.poll()[before:]
    wanted = expected(rules, lines)
    assert {number_of(each): outcome_of(each) for each in agent.traces} == wanted
    matched = {rule for rule, _ in wanted.values()}
    assert len(matched) > 10, "the requests exercise too few rules"
    counts = counts_of(agent.stderr())
    assert counts["received"] == counts["exported"] == len(wanted)
    assert counts["not_traced_by_rule"] == len(lines) - len(wanted) > 50

    replayed = subprocess.run(
        [PROGRAM, "replay", capture, "--exporter", "json", "--config", path],
        capture_output=True,
        check=True,
    )
    traces = [Trace.parse(line) for line in replayed.stdout.splitlines()]
    assert {number_of(each): outcome_of(each) for each in traces} == wanted
    assert counts_of(replayed.stderr.decode())["not_traced_by_rule"] == len(lines) - len(wanted)


RATIO = 0.3


def test_what_a_rule_says_holds_instead_of_the_settings(stand: Stand, tmp_path: Path) -> None:
    """A sampler of its own decides as the SDK's does. What is dropped is dropped even if the client or `--keep-errors`
    wants it. The metrics count it, unless the rule says otherwise."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    path, _ = rules_file(
        tmp_path,
        [
            {"path": ["/healthz", "/static/*.css"], "drop": True},
            {"path": "/quiet*", "drop": True, "metrics": False},
            {
                "path": "/app/slow*",
                "sampler": "always_off",
                "keep_slower_than": "100ms",
                "span_name": "{method} slowly",
            },
            {"path": "/app/fast", "sampler": "always_off", "keep_slower_than": "30s"},
            {"path": "/sampled/*", "sampler": "parentbased_traceidratio", "sampler_arg": RATIO, "span_name": "HEAD"},
        ],
    )
    cases = {
        f"/sampled/{number}": case
        for number, case in enumerate((each, flags) for each in trace_ids()[:200] for flags in (0, 1))
    }
    requests = [request(*case, target) for target, case in cases.items()]
    requests += (
        [request(7, 1, "/healthz")] * 30 + [request(7, 1, "/static/x.css")] * 10 + [request(7, 1, "/quiet")] * 20
    )
    requests += [request_bytes(method, "/app/slow") for method in ("GET", "PUT")] + [
        request_bytes("GET", "/app/fast")
    ] * 3
    requests += [request(9, 0, "/app/slow"), request_bytes("GET", "/a.css")]
    arguments = ["run", "--pid", str(stand.nginx.pid), "--exporter", "json", "--output", tmp_path / "traces.jsonl"]
    arguments += ["--keep-errors", "--metrics-listen", address, "--config", path]
    agent = AgentProcess(stand.nginx.pid, tmp_path, arguments)
    counted: dict[str, float] = {}
    try:
        stand.send(requests)
        wanted = {"/": len(cases), "/healthz": 30, "/static/": 10, "/app/slow": 3, "/app/": 3, r"\.(css|js)": 1}

        def counts() -> dict[str, float]:
            counted.clear()
            for labels, count in scrape(address, "http_server_request_duration_seconds_count").items():
                route = dict(labels)["http_route"]
                counted[route] = counted.get(route, 0) + count
            return counted

        wait_until(lambda: counts() == wanted, "the metrics")
    finally:
        agent.stop()
    assert counted == wanted
    found = sorted(
        (str(span.attributes["url.path"]), span.name, str(span.attributes.get("nginx.sampling.kept_for")))
        for span in (each.server for each in agent.traces)
    )
    sampler = ParentBasedTraceIdRatio(RATIO)
    expected_traces = [(target, "HEAD", "None") for target, case in cases.items() if sampled(sampler, *case)]
    expected_traces += [("/app/slow", f"{method} slowly", "slow") for method in ("GET", "PUT")]
    # Not the third slow request, whose client said no.
    expected_traces += [("/a.css", r"GET \.(css|js)", "None")]
    assert found == sorted(expected_traces)
    assert counts_of(agent.stderr())["not_traced_by_rule"] == 60


def test_an_upstream_is_told_what_a_rule_decides(public_directory: Path, tmp_path: Path) -> None:
    """The flag that it gets is the decision, and there is a trace if the flag says so."""
    directory = public_directory / "rules_told"
    directory.mkdir()
    upstream = RecordingUpstream()
    port = free_ports(1)[0]
    nginx = NginxServer(
        directory,
        f"""
        keepalive_requests 100000;
        server {{
            listen 127.0.0.1:{port};
            server_name shop.example;
            access_log logs/all.log json;
            location / {{ proxy_pass http://{upstream.address}; }}
        }}
        """,
    )
    nginx.start([("127.0.0.1", port)])
    path, _ = rules_file(
        tmp_path,
        [
            {"path": "/dropped/*", "method": "GET", "drop": True},
            {"server_name": "shop.example", "user_agent": "probe/*", "drop": True},
            {"path": "/off/*", "sampler": "always_off"},
            {"path": "/slow/*", "keep_slower_than": "30s"},
            {"status": "2xx", "attributes": {"rule": 4}},
        ],
    )
    agent = AgentProcess(
        nginx.pid,
        tmp_path,
        environment={"OTEL_NGINX_EBPF_CONFIG": str(path), "OTEL_NGINX_EBPF_PROPAGATE": "socket"},
    )
    try:
        kinds = ("/dropped/", "/off/", "/slow/", "/other/")
        # Before a worker's first request has ended, server names are not known.
        requests = [request_bytes("GET", "/other/0?size=5")]
        requests += [request(number << 64 | 1, 1, f"{kinds[number % 4]}{number}?size=5") for number in range(1, 200)]
        requests += [
            request_bytes("GET", f"/other/{number}?size=5", {"User-Agent": "probe/1"}) for number in range(200, 220)
        ]
        log = AccessLog(directory / "logs" / "all.log")
        with Http1Connection(("127.0.0.1", port)) as connection:
            for each in requests:
                connection.send(each)
                connection.read_response()
        wait_until(lambda: len(log.poll()) == len(requests), "nginx's log lines")
    finally:
        agent.stop()
        nginx.stop()
    told = {each.number: int(each.contexts[0][-2:], 16) & 1 for each in upstream.received if each.contexts}
    wanted = {number: int(number % 4 >= 2) for number in range(1, 200)} | {0: 1} | dict.fromkeys(range(200, 220), 0)
    assert told == wanted
    traced = {int(str(each.server.attributes["url.path"]).rpartition("/")[2]) for each in agent.traces}
    assert traced == {number for number, flag in wanted.items() if flag}
    assert {each.server.attributes.get("rule") for each in agent.traces} == {None, 4}
    assert nginx.problems() == []

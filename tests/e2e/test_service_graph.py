"""The proof of the whole: client → nginx → application make one trace, each traced by OpenTelemetry's own means.

`opentelemetry-instrument` instruments the client and the application, as users would. This program traces nginx, which
sends the header of examples/traceparent.conf, or is not configured at all (--propagate). All three export to the
official collector. The collector writes a file and forwards to Jaeger. The test reads the trace from both, and the
service graph from Jaeger.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from collector.process import collected, official

from e2e.agent_process import AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.jaeger_backend import Jaeger
from e2e.nginx_server import NginxServer, free_ports, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
INSTRUMENT = Path(sys.executable).with_name("opentelemetry-instrument")

COLLECTOR = """\
receivers:
  otlp: { protocols: { grpc: { endpoint: "127.0.0.1:%(otlp)d" } } }
exporters:
  file: { path: "%(output)s", format: proto, flush_interval: 50ms }
  otlp_grpc: { endpoint: "127.0.0.1:%(jaeger_otlp)d", tls: { insecure: true } }
service:
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [file, otlp_grpc] }
"""

NGINX = """
    %(include)s
    upstream application { server %(dead)s max_fails=0; server 127.0.0.1:%(application)d backup; keepalive 4; }
    server {
        listen 127.0.0.1:%(nginx)d;
        location /users/ { proxy_pass http://127.0.0.1:%(application)d; }
        location /retried/ { proxy_pass http://application/users/; }
    }
"""

CLIENT = "import requests, sys\nfor url in sys.argv[1:]: print(requests.get(url).text)"


def environment(service: str, endpoint: str) -> dict[str, str]:
    """OpenTelemetry's variables for one of the three."""
    return {
        "OTEL_SERVICE_NAME": service,
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_SEMCONV_STABILITY_OPT_IN": "http",
    }


class Application:
    """examples/application.py in Flask's own server, with OpenTelemetry's instrumentation."""

    def __init__(self, endpoint: str, directory: Path) -> None:
        self._log = directory / "application.log"
        command = [INSTRUMENT, "flask", "--app", EXAMPLES / "application.py", "run", "--port", "0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment("application", endpoint), "PATH": f"{INSTRUMENT.parent}:{os.defpath}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(lambda: self._port() is not None, f"the application to listen: {self._log}", 60)
        except BaseException:
            self.stop()
            raise
        self.port = int(self._port() or 0)

    def _port(self) -> str | None:
        text = self._log.read_text(errors="backslashreplace")
        if self._process.poll() is not None:
            raise RuntimeError(f"the application ended with {self._process.returncode}: {text}")
        found = re.search(r"Running on http://127\.0\.0\.1:(\d+)", text)
        return found[1] if found else None

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@dataclass(frozen=True)
class Stand:
    ports: dict[str, int]
    output: Path
    jaeger: Jaeger

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports['nginx']}{path}"

    def run_client(self, *paths: str, **variables: str) -> list[dict[str, Any]]:
        """A program that asks nginx for the paths, with `requests`, instrumented; the answers."""
        endpoint = f"http://127.0.0.1:{self.ports['otlp']}"
        result = subprocess.run(
            [INSTRUMENT, sys.executable, "-c", CLIENT, *map(self.url, paths)],
            env={**os.environ, **environment("client", endpoint), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines() if line]

    def traces(self, path: str, services: set[str]) -> dict[str, dict[str, Trace]]:
        """What was told of requests for the path, by trace id and service, once every one of `services` has told."""
        by_id: dict[str, dict[str, Trace]] = {}

        def complete() -> bool:
            by_id.clear()
            for trace in collected(self.output, lambda resource: True):
                by_id.setdefault(trace.trace_id, {})[trace.resource["service.name"]] = trace
            for trace_id in [each for each, told in by_id.items() if not concerns(told, path)]:
                del by_id[trace_id]
            return bool(by_id) and all(told.keys() >= services for told in by_id.values())

        wait_until(complete, f"{services} to tell of {path}", 20)
        return by_id


def concerns(told: dict[str, Trace], path: str) -> bool:
    return any(
        path in (span.attributes.get("url.path"), urlsplit(span.attributes.get("url.full", "")).path)
        for trace in told.values()
        for span in trace.spans
    )


WAYS = {"adopt-upstream-context": f"include {EXAMPLES}/traceparent.conf;", "propagate": ""}
"""nginx's configuration for each setting that leads the application to nginx's span."""


@pytest.fixture(scope="module", params=WAYS)
def stand(
    request: pytest.FixtureRequest, public_directory: Path, upstream_addresses: dict[str, str]
) -> Iterator[Stand]:
    directory = public_directory / f"service_graph-{request.param}"
    directory.mkdir()
    ports = {"otlp": free_ports(1)[0]}
    endpoint = f"http://127.0.0.1:{ports['otlp']}"
    with ExitStack() as stops:
        backend = Jaeger(directory)
        stops.callback(backend.stop)
        output = directory / "collected.bin"
        collector = official(
            COLLECTOR % {**ports, "jaeger_otlp": backend.otlp, "output": output}, [ports["otlp"]], directory
        )
        stops.callback(collector.stop)
        application = Application(endpoint, directory)
        stops.callback(application.stop)
        ports |= {"application": application.port, "nginx": free_ports(1)[0]}
        nginx = NginxServer(
            directory, NGINX % {**ports, "include": WAYS[request.param], "dead": upstream_addresses["dead1"]}
        )
        nginx.start([("127.0.0.1", ports["nginx"])])
        stops.callback(nginx.stop)
        command = ["run", "--pid", str(nginx.pid), f"--{request.param}"]
        agent = AgentProcess(nginx.pid, directory, command, environment("nginx", endpoint))
        stops.callback(agent.stop)
        yield Stand(ports, output, backend)
    assert nginx.problems() == []
    assert "lost 0" in agent.stderr()


NGINX_SPANS = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
EVERYONE = {"client", "nginx", "application"}


def test_one_trace(stand: Stand) -> None:
    """The client's span above nginx's, the application's below the exchange that asked it."""
    assert stand.run_client("/users/7") == [{"number": 7, "name": "User 7"}]
    ((trace_id, told),) = stand.traces("/users/7", EVERYONE).items()
    (client,), (application,), server = told["client"].spans, told["application"].spans, told["nginx"].server
    (exchange,) = told["nginx"].named("upstream exchange")
    assert (client.kind, client.parent_span_id) == ("CLIENT", None)
    assert (server.kind, server.parent_span_id) == ("SERVER", client.span_id)
    assert told["nginx"].outline() == NGINX_SPANS
    assert {span.parent_span_id for span in told["nginx"].children} == {server.span_id}
    assert (application.kind, application.parent_span_id) == ("SERVER", exchange.span_id)
    # One machine, one clock: each lies within what asked for it.
    for inner, outer in ((server, client), (exchange, server), (application, exchange)):
        assert outer.start_unix_ns <= inner.start_unix_ns <= inner.end_unix_ns <= outer.end_unix_ns
    assert {trace.trace_id for trace in told.values()} == {trace_id}


def test_client_without_tracing(stand: Stand) -> None:
    """nginx begins the trace, by the id that it sent to the application."""
    with Http1Connection(("127.0.0.1", stand.ports["nginx"])) as connection:
        assert connection.request("/users/8").status == 200
    (told,) = stand.traces("/users/8", {"nginx", "application"}).values()
    assert told.keys() == {"nginx", "application"}
    assert told["nginx"].server.parent_span_id is None
    (exchange,) = told["nginx"].named("upstream exchange")
    assert told["application"].spans[0].parent_span_id == exchange.span_id


def test_second_peer_answers(stand: Stand) -> None:
    """The application hangs below the attempt that reached it."""
    stand.run_client("/retried/9")
    (told,) = stand.traces("/retried/9", EVERYONE).values()
    failed, connect = told["nginx"].named("upstream connect")
    assert (failed.error, connect.error) == ("ECONNREFUSED", None)
    (exchange,) = told["nginx"].named("upstream exchange")
    assert told["application"].spans[0].parent_span_id == exchange.span_id


def test_client_does_not_sample(stand: Stand) -> None:
    """Its decision holds for everyone; the request after it, which is sampled, shows that nothing was merely late."""
    stand.run_client("/users/10", OTEL_TRACES_SAMPLER="always_off")
    stand.run_client("/users/11")
    stand.traces("/users/11", EVERYONE)
    told = collected(stand.output, lambda resource: True)
    assert not [trace for trace in told if concerns({"": trace}, "/users/10")]


def test_jaeger(stand: Stand) -> None:
    """Through its own API: the same tree for each trace, and the service graph client → nginx → application."""
    stand.run_client("/users/12", "/users/13")
    by_id = {
        trace_id: told for path in ("/users/12", "/users/13") for trace_id, told in stand.traces(path, EVERYONE).items()
    }
    assert len(by_id) == 2
    for trace_id, told in by_id.items():
        expected = {
            (service, span.name, span.span_id, span.parent_span_id)
            for service, trace in told.items()
            for span in trace.spans
        }
        wait_until(lambda: jaegers_tree(stand, trace_id) == expected, f"{expected} in Jaeger")  # noqa: B023

    def edges() -> dict[tuple[str, str], int]:
        found = stand.jaeger.ask("/api/dependencies", endTs=time.time_ns() // 10**6, lookback=3_600_000) or []
        between = [each for each in found if each["parent"] != each["child"]]
        return {(each["parent"], each["child"]): each["callCount"] for each in between}

    calls: Counter[tuple[str, str]] = Counter()
    services = {}
    for trace in collected(stand.output, lambda resource: True):
        services.update({span.span_id: trace.resource["service.name"] for span in trace.spans})
    for trace in collected(stand.output, lambda resource: True):
        own = trace.resource["service.name"]
        parents = (services.get(span.parent_span_id or "") for span in trace.spans)
        calls.update((parent, own) for parent in parents if parent and parent != own)
    assert calls.keys() == {("client", "nginx"), ("nginx", "application")}
    wait_until(lambda: edges() == calls, f"{calls} as Jaeger's service graph")


def jaegers_tree(stand: Stand, trace_id: str) -> set[tuple[str, str, str, str | None]]:
    """Of each span: service, name, id and parent's id; empty while Jaeger has no such trace."""
    return {
        (
            found["processes"][span["processID"]]["serviceName"],
            span["operationName"],
            span["spanID"],
            next((each["spanID"] for each in span["references"] if each["refType"] == "CHILD_OF"), None),
        )
        for found in stand.jaeger.ask(f"/api/traces/{trace_id}") or []
        for span in found["spans"]
    }

"""Runs a fleet with faults, and prints what became of each request as a table (`make fleet`).

Two sites, each with ten nginx, an agent and an edge collector; behind them Kafka, two samplers, Jaeger, Prometheus and
VictoriaLogs, with the configurations of examples/. Every second nginx has an application behind it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

import psutil
from collector.process import CollectorProcess, layered
from e2e.agent_process import AgentProcess
from e2e.jaeger_backend import Jaeger
from e2e.nginx_server import AccessLog, LogLine, NginxServer, free_ports, wait_until
from e2e.scenario import peers_that_fail
from e2e.upstreams import UpstreamProcess, make_certificate
from playwright.sync_api import sync_playwright

from fleet import checks
from fleet.engines import DECIDED, IN_KAFKA, MEASURED, Kafka, Prometheus, VictoriaLogs
from fleet.nginx import EXAMPLES, http_block

SITES, NGINX_OF_A_SITE, SAMPLERS = 2, 10, 2

# In every hundred requests of an nginx with an application.
_PROXIED = ["/"] * 97 + ["/broken?status=500", "/retried", "/slow?delay_ms=600"]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Nginx:
    def __init__(self, directory: Path, words: dict[str, str], proxied: bool) -> None:
        directory.mkdir()
        (self.port,) = free_ports(1)
        self.targets = _PROXIED if proxied else ["/static"]
        self.log = AccessLog(directory / "logs" / "fleet.log")
        self.server = NginxServer(directory, http_block(words, self.port, directory / "logs"))
        self.server.start([("127.0.0.1", self.port)])


class Site:
    """Ten nginx, their agent with its queue on disk, and the edge collector."""

    def __init__(self, name: str, fleet: "Fleet") -> None:
        self.name, self._fleet = name, fleet
        self.directory = fleet.directory / name
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.nginx = []
        for number in range(NGINX_OF_A_SITE):
            self.nginx.append(Nginx(self.directory / f"nginx{number}", fleet.words, proxied=number % 2 == 0))
            fleet.stops.callback(self.nginx[-1].server.stop)
        self.grpc, http, self.own = free_ports(3)
        self._edge_ports = [self.grpc, http, self.own]
        self._runs = 0
        self.ended: list[str] = []

    def start_edge(self) -> None:
        self.edge = layered(
            [EXAMPLES / "collector" / "otel-collector.yaml", EXAMPLES / "fleet" / "edge.yaml"],
            {
                "OTLP_GRPC_LISTEN": f"127.0.0.1:{self._edge_ports[0]}",
                "OTLP_HTTP_LISTEN": f"127.0.0.1:{self._edge_ports[1]}",
                "OWN_METRICS_HOST": "127.0.0.1",
                "OWN_METRICS_PORT": str(self.own),
                "QUEUE_DIR": str(self.directory / "edge-queue"),
                "KAFKA": f"127.0.0.1:{self._fleet.kafka.port}",
                "METRICS_ENDPOINT": f"http://127.0.0.1:{self._fleet.prometheus.port}/api/v1/otlp",
                "METRICS_INTERVAL": "1s",
            },
            self._edge_ports,
            self.directory / "edge.log",
        )

    def start_agent(self) -> None:
        self._runs += 1
        directory = self.directory / f"agent{self._runs}"
        directory.mkdir()
        command: list[str | Path] = ["run", "--adopt-upstream-context", "--queue-dir", self.directory / "agent-queue"]
        command += ["--grace-seconds", "2"]
        for each in self.nginx:
            command += ["--pid", str(each.server.pid)]
        variables = {
            "OTEL_SERVICE_NAME": "edge",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.grpc}",
            "OTEL_NGINX_EBPF_METRICS": "true",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            "OTEL_BSP_SCHEDULE_DELAY": "500",
        }
        self.agent = AgentProcess(0, directory, command, variables, ready_s=120)

    def stop_agent(self) -> None:
        self.agent.stop()
        self.ended.append(self.agent.stderr().strip().splitlines()[-1])


@dataclass
class Fleet:
    directory: Path
    stops: ExitStack
    words: dict[str, str]
    kafka: Kafka = field(init=False)
    jaeger: Jaeger = field(init=False)
    prometheus: Prometheus = field(init=False)
    logs: VictoriaLogs = field(init=False)
    sites: list[Site] = field(default_factory=list)
    samplers: list[CollectorProcess] = field(default_factory=list)
    _sampler_ports: list[list[int]] = field(default_factory=list)

    def start(self) -> None:
        self.kafka = Kafka(self.directory)
        self.stops.callback(lambda: self.kafka.stop())
        self.jaeger = Jaeger(self.directory, on_disk=True)
        self.stops.callback(lambda: self.jaeger.stop())
        self.sites = [Site(f"site{number}", self) for number in range(SITES)]
        self._sampler_ports = [free_ports(3) for _ in range(SAMPLERS)]
        own = [site.own for site in self.sites] + [ports[2] for ports in self._sampler_ports]
        targets = [f"127.0.0.1:{port}" for port in own]
        self.prometheus = Prometheus(EXAMPLES / "fleet" / "prometheus.yaml", targets, self.directory)
        self.stops.callback(self.prometheus.stop)
        self.logs = VictoriaLogs(self.directory / "site*" / "nginx*" / "logs" / "fleet.log", self.directory)
        self.stops.callback(self.logs.stop)
        for number in range(SAMPLERS):
            self.samplers.append(self.start_sampler(number))
            self.stops.callback(lambda number=number: self.samplers[number].stop())
        for site in self.sites:
            site.start_edge()
            self.stops.callback(lambda site=site: site.edge.stop())
            site.start_agent()
            self.stops.callback(lambda site=site: site.stop_agent())

    def start_sampler(self, number: int) -> CollectorProcess:
        ports = self._sampler_ports[number]
        collector = EXAMPLES / "collector"
        return layered(
            [collector / "otel-collector.yaml", collector / "tail-sampling.yaml", EXAMPLES / "fleet" / "sampler.yaml"],
            {
                "OTLP_GRPC_LISTEN": f"127.0.0.1:{ports[0]}",
                "OTLP_HTTP_LISTEN": f"127.0.0.1:{ports[1]}",
                "OWN_METRICS_HOST": "127.0.0.1",
                "OWN_METRICS_PORT": str(ports[2]),
                "QUEUE_DIR": str(self.directory / f"sampler{number}-queue"),
                "KAFKA": f"127.0.0.1:{self.kafka.port}",
                "TRACES_ENDPOINT": f"127.0.0.1:{self.jaeger.otlp}",
                "METRICS_ENDPOINT": f"http://127.0.0.1:{self.prometheus.port}/api/v1/otlp",
            },
            ports,
            self.directory / f"sampler{number}.log",
        )

    @property
    def nginx(self) -> list[Nginx]:
        return [each for site in self.sites for each in site.nginx]

    def lines(self) -> list[LogLine]:
        return [line for each in self.nginx for line in each.log.poll()]

    def load(self, requests: int, rate: int, meanwhile: Callable[[], None]) -> float:
        """Send requests over all nginx, at a rate a second; return how long that took, in seconds."""
        before = sum(len(each.log.poll()) for each in self.nginx)
        each_sends, each_rate = requests // len(self.nginx), max(1, rate // len(self.nginx))
        began = time.monotonic()
        running = [
            subprocess.Popen(
                ["h2load", "--h1", "--clients=1", f"--requests={each_sends}", f"--rps={each_rate}"]
                + [f"http://127.0.0.1:{each.port}{target}" for target in each.targets],
                stdout=subprocess.DEVNULL,
            )
            for each in self.nginx
        ]
        meanwhile()
        for process in running:
            process.wait(600)
        took = time.monotonic() - began
        offered = before + each_sends * len(self.nginx)
        wait_until(lambda: sum(len(each.log.poll()) for each in self.nginx) == offered, "nginx's log lines", 60)
        return took

    def used_s(self) -> dict[str, float]:
        """Return the processor time that each kind of process has used, in seconds."""
        pids = {
            "agent": [pid for site in self.sites for pid in site.agent.pids],
            "edge collector": [site.edge.pid for site in self.sites],
            "Kafka": [self.kafka.process.pid],
            "sampler": [each.pid for each in self.samplers],
            "Jaeger": [self.jaeger.process.pid],
            "Prometheus": [self.prometheus.process.pid],
            "vlagent": [self.logs.agent.pid],
            "VictoriaLogs": [self.logs.store.pid],
        }
        return {
            name: sum(times.user + times.system for times in (psutil.Process(pid).cpu_times() for pid in found))
            for name, found in pids.items()
        }

    def settle(self) -> None:
        """Wait until the numbers of the last backends do not change for the time of a decision."""
        last, since = (-1.0, -1.0), time.monotonic()
        deadline = since + 240
        while time.monotonic() < min(since + 25, deadline):
            now = (self.prometheus.total(MEASURED), self.prometheus.total(DECIDED))
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(1)


def nothing(fleet: Fleet) -> None:
    pass


def edge_killed(fleet: Fleet) -> None:
    time.sleep(3)
    fleet.sites[0].edge.kill()
    time.sleep(5)
    fleet.sites[0].start_edge()


def kafka_stopped(fleet: Fleet) -> None:
    time.sleep(2)
    fleet.kafka.stop()
    time.sleep(30)
    fleet.kafka.start()


def edge_stopped(fleet: Fleet) -> None:
    fleet.sites[0].edge.stop()


def agent_restarted(fleet: Fleet) -> None:
    site = fleet.sites[0]
    wait_until(lambda: bool(list((site.directory / "agent-queue").glob("*"))), "the agent's queue", 60)
    time.sleep(3)
    site.stop_agent()
    site.start_edge()
    site.start_agent()


def jaeger_refuses(fleet: Fleet) -> None:
    fleet.jaeger.stop()
    time.sleep(20)
    fleet.jaeger.start()


def sampler_killed(fleet: Fleet) -> None:
    time.sleep(8)
    fleet.samplers[0].kill()
    time.sleep(5)
    fleet.samplers[0] = fleet.start_sampler(0)


Fault = Callable[[Fleet], None]
PHASES: dict[str, tuple[Fault, Fault]] = {
    "no fault": (nothing, nothing),
    "an edge collector killed, back after 5 s": (edge_killed, nothing),
    "Kafka stopped for 30 s": (kafka_stopped, nothing),
    "an edge collector down, the agent restarted with its queue on disk": (edge_stopped, agent_restarted),
    "Jaeger down for 20 s": (jaeger_refuses, nothing),
    "a sampler killed, back after 5 s": (sampler_killed, nothing),
}


@dataclass(frozen=True)
class Outcome:
    """What became of all requests so far, by the numbers of the last backends."""

    offered: int
    """As nginx logged them."""
    measured: int
    """As Prometheus has them from the agents."""
    in_kafka: int
    """Messages in Kafka's partitions, as the samplers tell Prometheus; each is one trace."""
    left_out: int
    """Traces that the samplers left out, as Prometheus has it."""
    stored: int
    """Traces in Jaeger."""
    to_keep: int
    """Of the offered: errors and slow ones."""
    missing: int
    """Of those: not in Jaeger."""
    faults: tuple[str, ...]
    """What the traces lack of what nginx logged."""

    @classmethod
    def of(cls, fleet: Fleet) -> "Outcome":
        lines = fleet.lines()
        traces = checks.stored(fleet.jaeger, "edge")
        wanted = {line["trace_id"]: line for line in lines if checks.is_kept(line)}
        there = wanted.keys() & traces.keys()
        return cls(
            len(lines),
            round(fleet.prometheus.total(MEASURED)),
            round(fleet.prometheus.value(IN_KAFKA)),
            round(fleet.prometheus.total(f'{DECIDED}{{sampled="false"}}')),
            len(traces),
            len(wanted),
            len(wanted) - len(there),
            tuple(fault for each in there for fault in checks.faults_of(wanted[each], traces[each])),
        )

    @property
    def lost(self) -> int:
        """Return how many traces are neither stored nor left out; negative if some were decided twice."""
        return self.offered - self.left_out - self.stored

    def row(self, before: "Outcome") -> str:
        """Return a row of the table: what the phase since `before` added."""
        names = ("offered", "measured", "in_kafka", "stored", "left_out", "lost", "to_keep", "missing")
        return " | ".join(str(getattr(self, name) - getattr(before, name)) for name in names)


COLUMNS = (
    "fault | requests | in Prometheus | in Kafka | in Jaeger | left out by the samplers | the rest"
    " | errors and slow ones | of these not in Jaeger"
)
NOTHING = Outcome(0, 0, 0, 0, 0, 0, 0, ())


def idle_part(fleet: Fleet) -> dict[str, float]:
    """Return which part of a processor each kind of process takes without requests."""
    began_s, before = time.monotonic(), fleet.used_s()
    time.sleep(20)
    return {name: (used_s - before[name]) / (time.monotonic() - began_s) for name, used_s in fleet.used_s().items()}


def say_costs(fleet: Fleet, used_s: dict[str, float], idle: dict[str, float], took_s: float, requests: int) -> None:
    """Print the processor time of each kind of process for a request and without one, and what Kafka keeps."""
    for name, now_s in fleet.used_s().items():
        for_requests_s = now_s - used_s[name] - idle[name] * took_s
        say(f"{name}: {for_requests_s / requests * 1e6:.0f} µs a request, idle {idle[name]:.1%} of a processor")
    kept = sum(path.stat().st_size for path in (fleet.directory / "kafka").glob("otlp_spans-*/*.log"))
    say(f"Kafka: {kept / requests:.0f} bytes a request")


def take_screen(logs: VictoriaLogs, path: Path) -> None:
    """Take a picture of VictoriaLogs' page: the log lines of errors, with their traces' ids."""
    asked = 'status:>=500 | format "<_msg>, <request_time> s, trace <trace_id>" as _msg | fields _time, _msg'
    query = urlencode({"query": asked, "view": "table", "g0.range_input": "15m"}, quote_via=quote)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"http://127.0.0.1:{logs.port}/select/vmui/#/?{query}")
        page.get_by_text("Total:").wait_for()
        page.get_by_text("trace ").last.wait_for()
        page.screenshot(path=path)
        browser.close()


def run(directory: Path, options: argparse.Namespace) -> int:
    with ExitStack() as stops:
        make_certificate(directory)
        upstream = UpstreamProcess(directory)
        stops.callback(upstream.stop)
        sockets: list[object] = []
        words = {**upstream.addresses, **peers_that_fail(sockets)}  # type: ignore[arg-type]
        fleet = Fleet(directory, stops, words)
        fleet.start()
        idle = idle_part(fleet)
        say("started")
        print(f"| {COLUMNS} |\n|" + " --- |" * len(COLUMNS.split("|")), flush=True)
        now = NOTHING
        wrong: list[str] = []
        for name, (during, after) in PHASES.items():
            if options.only and not any(each in name for each in options.only):
                continue
            began_s, used_s, before = time.monotonic(), fleet.used_s(), now
            took_s = fleet.load(options.requests, options.rate, lambda: during(fleet))  # noqa: B023
            after(fleet)
            fleet.settle()
            now = Outcome.of(fleet)
            print(f"| {name} | {now.row(before)} |", flush=True)
            say(f"{name}: {took_s:.0f} s of load")
            wrong += [f"{name}: {fault}" for fault in now.faults]
            offered = now.offered - before.offered
            if now.in_kafka - before.in_kafka != offered and during is not edge_killed:
                wrong.append(f"{name}: Kafka has not every trace once")
            if now.measured - before.measured != offered:
                wrong.append(f"{name}: Prometheus has not every request")
            if during is not sampler_killed and (now.lost > 0 or now.missing):
                wrong.append(f"{name}: traces are missing")
            if during is nothing:
                say_costs(fleet, used_s, idle, time.monotonic() - began_s, options.requests)
        offered = len(fleet.lines())
        wait_until(lambda: fleet.logs.count() == offered, "VictoriaLogs to have every line", 60)
        say(f"VictoriaLogs has {fleet.logs.count()} lines of {offered}")
        if options.screen:
            take_screen(fleet.logs, options.screen)
    for site in fleet.sites:
        say(f"{site.name}: {site.ended}")
    for each in wrong:
        say(each)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="in each phase")
    parser.add_argument("--rate", type=int, default=600, help="requests a second over all nginx")
    parser.add_argument("--only", action="append", default=[], help="part of a fault's name")
    parser.add_argument("--screen", type=Path, help="write a picture of VictoriaLogs' page to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything that was started ends
    with tempfile.TemporaryDirectory(prefix="otel-fleet-") as name:
        os.chmod(name, 0o755)
        return run(Path(name), options)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the engines behind a fleet, each from its Go module, and asks their APIs."""

import json
import re
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

from collector.process import CollectorProcess
from e2e.nginx_server import free_ports

MEASURED = "http_server_request_duration_seconds_count"
"""All requests, as the kernel counted them."""
DECIDED = "otelcol_processor_tail_sampling_global_count_traces_sampled"
"""The traces that a sampler kept (`sampled="true"`) or left out."""

IN_KAFKA = "sum(1 + max by (partition) (max_over_time(otelcol_kafka_receiver_current_offset[2h])))"
"""The messages that samplers have read of all partitions, each once."""


def build(name: str) -> Path:
    """Build an engine of tests/fleet/build; return its program. Raise CalledProcessError if it cannot be built."""
    command = [Path(__file__).with_name("build"), name]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def ask(port: int, path: str, **parameters: Any) -> bytes:
    """Return the answer of an engine's API. Raise AssertionError unless its status is 200."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", f"{path}?{urlencode(parameters)}")
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


class Prometheus:
    """Runs Prometheus with the configuration of examples/fleet, but for the addresses and the pace."""

    def __init__(self, config: Path, targets: Sequence[str], directory: Path) -> None:
        (self.port,) = free_ports(1)
        quoted = ", ".join(f'"{target}"' for target in targets)
        text = config.read_text().replace("15s", "1s").replace("[alerts.yaml]", f"[{config.parent}/alerts.yaml]")
        path = directory / "prometheus.yaml"
        path.write_text(re.sub(r"dns_sd_configs: .*", f"static_configs: [{{ targets: [{quoted}] }}]", text))
        options = {
            "config.file": path,
            "storage.tsdb.path": directory / "prometheus",
            "web.listen-address": f"127.0.0.1:{self.port}",
            "enable-feature": "exemplar-storage",
        }
        command = [build("prometheus"), "--web.enable-otlp-receiver"]
        command += [f"--{name}={value}" for name, value in options.items()]
        self.process = CollectorProcess(command, [self.port], directory / "prometheus.log")

    def query(self, expression: str, **parameters: Any) -> dict[tuple[str, ...], float]:
        """Return the values of an instant query, by the labels' values in the order of the labels' names."""
        data = self._data("query", query=expression, **parameters)
        return {
            tuple(value for name, value in sorted(each["metric"].items()) if name != "__name__"): float(
                each["value"][1]
            )
            for each in data["result"]
        }

    def value(self, expression: str) -> float:
        """Return the one value of a query; 0 if it finds nothing."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return sum(found.values())

    def exemplars(self, selector: str, start_s: float, end_s: float) -> Iterator[dict[str, Any]]:
        for series in self._data("query_exemplars", query=selector, start=start_s, end=end_s):
            yield from series["exemplars"]

    def total(self, selector: str) -> float:
        """Return how much counters grew since they began, by their samples. A restart's first value counts whole."""
        increase = 0.0
        for series in self._data("query", query=f"{selector}[2h]")["result"]:
            before = 0.0
            for _, text in series["values"]:
                increase += float(text) - (before if float(text) >= before else 0)
                before = float(text)
        return increase

    def _data(self, path: str, **parameters: Any) -> Any:
        return json.loads(ask(self.port, f"/api/v1/{path}", **parameters))["data"]

    def stop(self) -> None:
        self.process.stop()


class VictoriaLogs:
    """Runs VictoriaLogs, and vlagent, which follows the log files of a glob pattern."""

    def __init__(self, pattern: Path, directory: Path) -> None:
        self.port, agent_port = free_ports(2)
        options = {"storageDataPath": directory / "victoria-logs", "httpListenAddr": f"127.0.0.1:{self.port}"}
        self.store = self._start("victoria-logs", options, self.port, directory)
        options = {
            "fileCollector.glob": pattern,
            "fileCollector.refreshInterval": "1s",
            "remoteWrite.url": f"http://127.0.0.1:{self.port}/insert/native",
            "tmpDataPath": directory / "vlagent",
            "httpListenAddr": f"127.0.0.1:{agent_port}",
        }
        try:
            self.agent = self._start("vlagent", options, agent_port, directory)
        except BaseException:
            self.store.stop()
            raise

    @staticmethod
    def _start(name: str, options: dict[str, Any], port: int, directory: Path) -> CollectorProcess:
        command = [build(name), *(f"-{option}={value}" for option, value in options.items())]
        return CollectorProcess(command, [port], directory / f"{name}.log")

    def query(self, expression: str, limit: int = 1_000_000) -> list[dict[str, str]]:
        """Return the lines that a LogsQL query finds."""
        answer = ask(self.port, "/select/logsql/query", query=expression, limit=limit)
        return [json.loads(line) for line in answer.splitlines()]

    def count(self) -> int:
        """Return how many lines there are."""
        (answer,) = self.query("* | count() lines")
        return int(answer["lines"])

    def stop(self) -> None:
        self.agent.stop()
        self.store.stop()


_KAFKA = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:%(controller)d
listeners=PLAINTEXT://127.0.0.1:%(broker)d,CONTROLLER://127.0.0.1:%(controller)d
controller.listener.names=CONTROLLER
log.dirs=%(directory)s/kafka
num.partitions=4
offsets.topic.replication.factor=1
group.initial.rebalance.delay.ms=0
"""


class Kafka:
    """Runs a broker, which is its own controller (KRaft), in one JVM."""

    def __init__(self, directory: Path) -> None:
        self.port, controller = free_ports(2)
        self._directory = directory
        self._properties = directory / "kafka.properties"
        self._properties.write_text(_KAFKA % {"broker": self.port, "controller": controller, "directory": directory})
        self._java = ["java", "-Xmx512m", "-cp", f"{build('kafka')}/*"]
        identity = urlsafe_b64encode(uuid4().bytes).decode().rstrip("=")
        command = [*self._java, "kafka.tools.StorageTool", "format", "-t", identity, "-c", self._properties]
        subprocess.run(command, check=True, capture_output=True)
        self.start()

    def start(self) -> None:
        command = [*self._java, "kafka.Kafka", self._properties]
        self.process = CollectorProcess(command, [self.port], self._directory / "kafka.log")

    def stop(self) -> None:
        self.process.stop()

"""Runs Jaeger, and asks its API."""

import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from collector.process import jaeger

from e2e.nginx_server import free_ports

_CONFIG = """\
extensions:
  jaeger_storage: { backends: { kept: %(storage)s } }
  jaeger_query:
    storage: { traces: kept }
    enable_tracing: false  # of itself, to a fixed port
    http: { endpoint: "127.0.0.1:%(http)d" }
    grpc: { endpoint: "127.0.0.1:%(grpc)d" }
receivers:
  otlp: { protocols: { grpc: { endpoint: "127.0.0.1:%(otlp)d" } } }
exporters:
  jaeger_storage_exporter: { trace_storage: kept }
service:
  extensions: [jaeger_storage, jaeger_query]
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [jaeger_storage_exporter] }
"""


_MEMORY = "{ memory: { max_traces: 1000 } }"
_DISK = '{ badger: { ephemeral: false, directories: { keys: "%(path)s", values: "%(path)s" } } }'


class Jaeger:
    """Accepts OTLP over gRPC at the port `otlp` when the constructor returns. Keeps `traces_max` traces."""

    def __init__(self, directory: Path, on_disk: bool = False) -> None:
        self._http, grpc, self.otlp = free_ports(3)
        storage = _DISK % {"path": directory / "jaeger"} if on_disk else _MEMORY
        self.traces_max = 1_000_000 if on_disk else 1000
        self._config = _CONFIG % {"http": self._http, "grpc": grpc, "otlp": self.otlp, "storage": storage}
        self._directory = directory
        self.start()

    def start(self) -> None:
        self.process = jaeger(self._config, [self._http, self.otlp], self._directory)

    def stop(self) -> None:
        self.process.stop()

    def ask(self, path: str, **parameters: Any) -> Any:
        """Returns the `data` of an answer of the API; `None` if it has none."""
        with closing(HTTPConnection("127.0.0.1", self._http, timeout=60)) as connection:
            connection.request("GET", f"{path}?{urlencode(parameters)}")
            return json.loads(connection.getresponse().read()).get("data")

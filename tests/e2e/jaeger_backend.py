"""Runs Jaeger with its storage in memory, and asks its API."""

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
  jaeger_storage: { backends: { memory: { memory: { max_traces: 1000 } } } }
  jaeger_query:
    storage: { traces: memory }
    enable_tracing: false  # of itself, to a fixed port
    http: { endpoint: "127.0.0.1:%(http)d" }
    grpc: { endpoint: "127.0.0.1:%(grpc)d" }
receivers:
  otlp: { protocols: { grpc: { endpoint: "127.0.0.1:%(otlp)d" } } }
exporters:
  jaeger_storage_exporter: { trace_storage: memory }
service:
  extensions: [jaeger_storage, jaeger_query]
  telemetry: { metrics: { level: none } }
  pipelines:
    traces: { receivers: [otlp], exporters: [jaeger_storage_exporter] }
"""


class Jaeger:
    """Accepts OTLP over gRPC at the port `otlp` when the constructor returns."""

    def __init__(self, directory: Path) -> None:
        self._http, grpc, self.otlp = free_ports(3)
        config = _CONFIG % {"http": self._http, "grpc": grpc, "otlp": self.otlp}
        self._process = jaeger(config, [self._http, self.otlp], directory)

    def stop(self) -> None:
        self._process.stop()

    def ask(self, path: str, **parameters: Any) -> Any:
        """Returns the `data` of an answer of the API; `None` if it has none."""
        with closing(HTTPConnection("127.0.0.1", self._http, timeout=10)) as connection:
            connection.request("GET", f"{path}?{urlencode(parameters)}")
            return json.loads(connection.getresponse().read()).get("data")

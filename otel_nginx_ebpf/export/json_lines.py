"""One JSON object per trace per line."""

import json

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.output import Output
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.trace import Trace


def to_json(trace: Trace, resource: Resource) -> str:
    """Ids are lower-case hexadecimal, times Unix nanoseconds; plain ASCII, without a line end."""
    return json.dumps(
        {
            "trace_id": f"{trace.trace_id:032x}",
            "resource": dict(resource.attributes),
            "spans": [
                {
                    "name": span.name,
                    "kind": span.kind.name,
                    "span_id": f"{span.span_id:016x}",
                    "parent_span_id": None if span.parent_span_id is None else f"{span.parent_span_id:016x}",
                    "start_unix_ns": span.start_unix_ns,
                    "end_unix_ns": span.end_unix_ns,
                    "status": "UNSET" if span.error is None else "ERROR",
                    "error": span.error,
                    "attributes": dict(span.attributes),
                }
                for span in trace.spans
            ],
        },
        separators=(",", ":"),
    )


class JsonLinesExporter:
    def __init__(self, output: Output, stats: Stats, resource: Resource) -> None:
        self._output = output
        self._stats = stats
        self._resource = resource

    def export(self, trace: Trace) -> None:
        self._output.write(to_json(trace, self._resource) + "\n")
        self._stats.exported += 1

    def flush(self) -> None:
        """Every line is written when it is exported."""

    def shutdown(self, timeout_s: float) -> None:
        self._output.close()

"""Writes traces as JSON, one object in a line for each trace."""

import json

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.traces.model import Trace


def to_json(trace: Trace, resource: Resource) -> str:
    """Returns a trace as a line of ASCII. Ids are lower-case hexadecimal, times are Unix nanoseconds."""
    text = json.dumps(
        {
            "trace_id": f"{trace.trace_id:032x}",
            "trace_flags": trace.trace_flags,
            "trace_state": trace.trace_state,
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
                    "events": [
                        {
                            "name": event.name,
                            "time_unix_ns": event.time_unix_ns,
                            "attributes": dict(event.attributes),
                        }
                        for event in span.events
                    ],
                }
                for span in trace.spans
            ],
        },
        separators=(",", ":"),
    )
    return text + "\n"

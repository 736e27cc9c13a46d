"""Encodes a trace with the SDK's own encoder, for comparison with ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.export.resource import SCHEMA_URL
from otel_nginx_ebpf.traces.model import Trace


def to_readable_spans(trace: Trace, resource: Resource) -> list[ReadableSpan]:
    """The SDK's view of a trace."""
    # The API's TraceState knows only the keys of level 1; the encoder asks for no more than `items`.
    state: Any = dict(member.split("=", 1) for member in trace.trace_state.split(",") if member)
    server = trace.spans[0]

    def context(span_id: int, remote: bool = False) -> SpanContext:
        return SpanContext(trace.trace_id, span_id, remote, TraceFlags(trace.trace_flags), state)

    return [
        ReadableSpan(
            name=span.name,
            context=context(span.span_id),
            parent=None if span.parent_span_id is None else context(span.parent_span_id, remote=span is server),
            resource=resource,
            attributes=span.attributes,
            events=[Event(event.name, event.attributes, event.time_unix_ns) for event in span.events],
            kind=span.kind,
            status=Status() if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_unix_ns,
            end_time=span.end_unix_ns,
            instrumentation_scope=InstrumentationScope("otel_nginx_ebpf", __version__, SCHEMA_URL),
        )
        for span in trace.spans
    ]


def sdk_encoding(traces: Sequence[Trace], resources: Mapping[int, Resource] | Resource) -> ExportTraceServiceRequest:
    """What the SDK sends of traces; their resources are found by the identity of the traces' attributes."""
    return encode_spans(
        [
            span
            for trace in traces
            for span in to_readable_spans(
                trace, resources if isinstance(resources, Resource) else resources[id(trace.resource)]
            )
        ]
    )

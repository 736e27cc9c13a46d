"""Turns a record's bytes into OTLP, stage by stage: with our code, and with the SDK for the same requests."""

import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context

from otel_nginx_ebpf.export.otlp.encoding import Encoder, encode_access_record, encode_for_resource
from otel_nginx_ebpf.export.otlp.records import RecordEncoder, ids_of
from otel_nginx_ebpf.traces.capture import Frame
from otel_nginx_ebpf.traces.model import AttributeValue, Trace
from otel_nginx_ebpf.traces.record import RecordError, Request, decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace

RESOURCE = Resource.create({"service.name": "nginx"})
_NO_ATTRIBUTES: dict[str, AttributeValue] = {}
_BATCH = 128
"""Requests in a message."""


def decoded(frames: Sequence[Frame]) -> list[tuple[Request, int]]:
    return [(decode(frame.raw), frame.unix_offset_ns) for frame in frames]


def taken(frames: Sequence[Frame], encoder: RecordEncoder, *, access: bool = False) -> list[bytes]:
    """Return finished messages, as the emitter makes them. `access`: also of log records, for `--logs access`."""
    messages = []
    for start in range(0, len(frames), _BATCH):
        records = [(frame.raw, frame.unix_offset_ns, _NO_ATTRIBUTES) for frame in frames[start : start + _BATCH]]
        both = [(record, each) for record, each in encoder.encode(records) if not isinstance(each, RecordError)]
        messages.append(encode_for_resource(RESOURCE, [each[0] for _, each in both]))
        if access:
            made = [encode_access_record(spans[0], ids_of(raw), offset) for (raw, offset, _), (_, spans, *_) in both]
            messages.append(encode_for_resource(RESOURCE, made))
    return messages


def encoded(requests: Sequence[tuple[Request, int]], encoder: Encoder) -> list[bytes]:
    """Return finished messages."""
    messages = []
    for start in range(0, len(requests), _BATCH):
        spans = [encoder.encode(*each)[0] for each in requests[start : start + _BATCH]]
        messages.append(encode_for_resource(RESOURCE, spans))
    return messages


def readable(requests: Sequence[tuple[Request, int]], ids: RandomIds) -> list[Trace]:
    """Return the traces that the console, line and JSON exporters use."""
    return [build_trace(request, unix_offset_ns, ids) for request, unix_offset_ns in requests]


def made_by_sdk(traces: Sequence[Trace], tracer: Tracer) -> None:
    """Start and end the spans of each trace with the SDK's `Tracer`, as an application does."""
    for trace in traces:
        server, *children = trace.spans
        parent = tracer.start_span(
            server.name,
            Context(),
            server.kind,
            server.attributes,
            start_time=server.start_unix_ns,
        )
        context = set_span_in_context(parent, Context())
        for span in children:
            child = tracer.start_span(span.name, context, span.kind, span.attributes, start_time=span.start_unix_ns)
            if span.error is not None:
                child.set_status(Status(StatusCode.ERROR, span.error))
            child.end(span.end_unix_ns)
        if server.error is not None:
            parent.set_status(Status(StatusCode.ERROR, server.error))
        parent.end(server.end_unix_ns)


def cpu_us_each(stage: Callable[[], Any], count: int) -> float:
    """Run a stage; return the processor time of this process, in microseconds for each of `count` requests."""
    start_ns = time.process_time_ns()
    stage()
    return (time.process_time_ns() - start_ns) / 1000 / count


def allocations_each(stage: Callable[[], Any], count: int) -> float:
    """Run a stage; return the calls of Python's allocators for each of `count` requests, by memray."""
    from memray import FileReader, Tracker

    with TemporaryDirectory(prefix="otel-bench-") as directory:
        with Tracker(f"{directory}/allocations", trace_python_allocators=True):
            stage()
        allocations: int = FileReader(f"{directory}/allocations").metadata.total_allocations
    return allocations / count

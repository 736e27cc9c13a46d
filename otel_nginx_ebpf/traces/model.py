"""The neutral trace model. Span building returns it, and every exporter accepts it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.traces.record import Request

AttributeValue = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened during a span."""

    name: str
    time_unix_ns: int
    attributes: Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Span:
    """One span. Times are Unix nanoseconds. Ids are integers, as in OpenTelemetry.

    `error` is the status description of a span with status ERROR; `None`: the status is unset. The parent of the SERVER
    span is in another process, which called nginx.
    """

    name: str
    kind: SpanKind
    span_id: int
    parent_span_id: int | None
    start_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, AttributeValue]
    error: str | None = None
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """One completed request. Its SERVER span comes first, then the children by start time."""

    trace_id: int
    spans: tuple[Span, ...]
    request: Request
    unix_offset_ns: int
    """Unix time minus monotonic time. All times of this trace use this value."""
    resource: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Resource attributes of the nginx that served the request. All requests of an instance share one object."""
    trace_flags: int = 0
    """W3C trace-flags: bit 0 is sampled; bit 1 is random, as in the client's context."""
    trace_state: str = ""
    """The client's `tracestate`."""

"""The neutral trace model: what span building returns and every exporter takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.traces.record import Request

AttributeValue = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """One span. Times are Unix nanoseconds; ids are the integers OpenTelemetry uses.

    `error` is the status description of a span with status ERROR, None where the status is unset. The parent of the
    SERVER span is in another process: the one that called nginx.
    """

    name: str
    kind: SpanKind
    span_id: int
    parent_span_id: int | None
    start_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, AttributeValue]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """One completed request: its SERVER span first, then its children by start time."""

    trace_id: int
    spans: tuple[Span, ...]
    request: Request
    unix_offset_ns: int
    """Unix time minus monotonic time, as used for every time of this trace."""
    resource: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Resource attributes of the nginx the request is from; one object for all requests of an instance."""
    trace_flags: int = 0
    """W3C trace-flags: bit 0, sampled, bit 1, random, as the client's context had it."""
    trace_state: str = ""
    """The client's `tracestate`."""

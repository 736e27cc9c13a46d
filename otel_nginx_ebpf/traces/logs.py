"""Log records, from the lines of nginx's error log. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from otel_nginx_ebpf.traces.error_log import LogLine
from otel_nginx_ebpf.traces.events import ERROR_LOG, LOG_SEVERITY, NGINX_ERROR_MESSAGE, event_of, events_of
from otel_nginx_ebpf.traces.model import AttributeValue, Event, Trace
from otel_nginx_ebpf.traces.phases import Phase
from otel_nginx_ebpf.traces.record import Request

SEVERITIES = {"emerg": 21, "alert": 19, "crit": 18, "error": 17, "warn": 13, "notice": 10, "info": 9, "debug": 5}
"""OTLP's severity numbers, by nginx's levels: as its data model maps those of syslog."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """A log record. Without a trace, the ids are 0."""

    time_unix_ns: int
    event_name: str
    severity: int
    """OTLP's severity number."""
    severity_text: str
    body: str
    attributes: Mapping[str, AttributeValue]
    resource: Mapping[str, AttributeValue] = field(default_factory=dict)
    """Resource attributes of the nginx that it is from."""
    trace_id: int = 0
    span_id: int = 0
    trace_flags: int = 0


def of_event(
    event: Event, resource: Mapping[str, AttributeValue], trace_id: int = 0, span_id: int = 0, trace_flags: int = 0
) -> LogRecord:
    """Returns the log record of a line that is an event of a span."""
    level = str(event.attributes[LOG_SEVERITY])
    body = str(event.attributes[NGINX_ERROR_MESSAGE])
    others = {
        name: value for name, value in event.attributes.items() if name not in (LOG_SEVERITY, NGINX_ERROR_MESSAGE)
    }
    return LogRecord(
        event.time_unix_ns, ERROR_LOG, SEVERITIES[level], level, body, others, resource, trace_id, span_id, trace_flags
    )


def of_request(
    request: Request,
    spans: Sequence[tuple[Phase, int]],
    unix_offset_ns: int,
    resource: Mapping[str, AttributeValue],
    query: bool,
) -> Iterator[LogRecord]:
    """Yields a log record for each line of the error log for a request.

    Args:
        request: The request with its lines.
        spans: The phases of the request, the request itself first, and the ids of their spans.
        unix_offset_ns: Unix time minus monotonic time.
        resource: The resource attributes of the request's nginx.
        query: Whether to keep the query strings of URIs.
    """
    found = events_of(request.log_lines, [phase for phase, _ in spans], unix_offset_ns, query)
    for index, events in found.items():
        for event in events:
            yield of_event(event, resource, request.trace_id, spans[index][1], request.trace_flags)


def of_trace(trace: Trace) -> Iterator[LogRecord]:
    """Yields a log record for each line of the error log on a trace."""
    for span in trace.spans:
        for event in span.events:
            yield of_event(event, trace.resource, trace.trace_id, span.span_id, trace.trace_flags)


def of_untraced(line: LogLine, query: bool) -> LogRecord:
    """Returns the log record of a line without a trace. Its body also has what else a span would say."""
    return of_event(event_of(line, line.message + line.added, line.unix_offset_ns, query), line.resource)

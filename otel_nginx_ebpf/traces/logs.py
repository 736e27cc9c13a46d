"""Log records: of the lines of nginx's error log, and one for each request. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_QUERY

from otel_nginx_ebpf.traces.error_log import LogLine
from otel_nginx_ebpf.traces.events import ERROR_LOG, LOG_SEVERITY, NGINX_ERROR_MESSAGE, event_of, events_of
from otel_nginx_ebpf.traces.model import AttributeValue, Event, Trace
from otel_nginx_ebpf.traces.phases import Phase
from otel_nginx_ebpf.traces.record import Request

ACCESS_LOG = "nginx.access_log"
NGINX_REQUEST_DURATION = "nginx.request.duration"
INFO = 9

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


def of_access(trace: Trace) -> LogRecord:
    """Returns the log record of a request: what its SERVER span says."""
    server = trace.spans[0]
    says = server.attributes
    duration = {NGINX_REQUEST_DURATION: (server.end_unix_ns - server.start_unix_ns) / 1e9}
    body = access_body(
        says.get(HTTP_REQUEST_METHOD), says.get(URL_PATH), says.get(URL_QUERY), says.get(HTTP_RESPONSE_STATUS_CODE)
    )
    return LogRecord(
        server.end_unix_ns,
        ACCESS_LOG,
        INFO,
        "",
        body,
        {**says, **duration},
        trace.resource,
        trace.trace_id,
        server.span_id,
        trace.trace_flags,
    )


def access_body(method: object, path: object, query: object, status: object) -> str:
    """Returns what a request's log record says in one line: `GET /users?id=1 200`. `None`: not known."""
    target = path if query is None else f"{path}?{query}"
    return " ".join(str(each) for each in (method, target, status) if each is not None)


def of_untraced(line: LogLine, query: bool) -> LogRecord:
    """Returns the log record of a line without a trace. Its body also has what else a span would say."""
    return of_event(event_of(line, line.message + line.added, line.unix_offset_ns, query), line.resource)

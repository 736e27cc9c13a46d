"""The events of spans: the lines of nginx's error log. Pure."""

from collections.abc import Mapping, Sequence

from otel_nginx_ebpf.traces.error_log import LogLine
from otel_nginx_ebpf.traces.model import AttributeValue, Event
from otel_nginx_ebpf.traces.phases import UPSTREAM_CONNECT, UPSTREAM_EXCHANGE, Phase
from otel_nginx_ebpf.traces.url import redact_text

ERROR_LOG = "nginx.error_log"
LOG_SEVERITY = "log.severity"
NGINX_ERROR_ERRNO = "nginx.error.errno"
NGINX_ERROR_MESSAGE = "nginx.error.message"


def events_of(
    lines: Sequence[LogLine], phases: Sequence[Phase], unix_offset_ns: int, query: bool
) -> Mapping[int, tuple[Event, ...]]:
    """Returns the events of a request's spans, by the index of the span's phase.

    Args:
        lines: What nginx logged for the request.
        phases: The phases of the request, the request itself first.
        unix_offset_ns: Unix time minus monotonic time.
        query: Whether to keep the query strings of URIs.
    """
    events: dict[int, tuple[Event, ...]] = {}
    for line in lines:
        index = _phase_of(line, phases)
        event = event_of(line, line.message, unix_offset_ns, query)
        events[index] = (*events.get(index, ()), event)
    return events


def event_of(line: LogLine, message: str, unix_offset_ns: int, query: bool) -> Event:
    """Returns the event of a line. `message` is what it says."""
    attributes: dict[str, AttributeValue] = {
        LOG_SEVERITY: line.level,
        NGINX_ERROR_MESSAGE: redact_text(message, query),
    }
    if line.error_number:
        attributes[NGINX_ERROR_ERRNO] = line.error_number
    return Event(ERROR_LOG, line.logged_mono_ns + unix_offset_ns, attributes)


def text_of(event: Event) -> str:
    """Returns a line of the error log as nginx would write it, without its head: `[error] connect() failed …`."""
    return f"[{event.attributes[LOG_SEVERITY]}] {event.attributes[NGINX_ERROR_MESSAGE]}"


def _phase_of(line: LogLine, phases: Sequence[Phase]) -> int:
    """Returns the index of the phase that a line is about: the last one of its attempt that had begun, or else 0."""
    found = 0
    for index, (start_mono_ns, _, kind, number, _) in enumerate(phases):
        if (
            kind in (UPSTREAM_CONNECT, UPSTREAM_EXCHANGE)
            and number == line.attempt
            and (not found or start_mono_ns <= line.logged_mono_ns)
        ):
            found = index
    return found

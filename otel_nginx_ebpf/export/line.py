"""Writes a line of text for each request, with every phase in nanoseconds since the client's connection was accepted.

    <accept_ns>, <client>=><upstream>, <uri>, <status>, request_size=…, response_size=…, <phase>_time=…, …

`<accept_ns>` is Unix nanoseconds; `client` and `upstream` are `address:port`, `[address]:port` or
`unix:/path`; `upstream_connect_time` is when a new connection was established. If the accept was not
seen (the connection is older than the probes), `<accept_ns>` is the time of the request's first byte, and
all times count from there. What did not happen is `-`. With several upstream attempts, `upstream` and the
`upstream_*` times have an element for each attempt, separated by commas without a space.
"""

from collections.abc import Iterable

from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_QUERY

from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.traces.model import Trace
from otel_nginx_ebpf.traces.record import Attempt, Request
from otel_nginx_ebpf.traces.sockaddr import parse


def _field(text: str | None) -> str:
    """Escapes a text's spaces, so that `, ` can only separate fields. Returns `-` for an empty text or None."""
    return printable(text).replace(" ", "\\x20") if text else "-"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _uri(trace: Trace) -> str:
    # Not from the request: only the span's attributes have sensitive parameters redacted.
    attributes = trace.spans[0].attributes
    path, query = attributes.get(URL_PATH), attributes.get(URL_QUERY)
    return _field(f"{path or ''}?{query}" if query else None if path is None else str(path))


def _client(request: Request) -> str:
    address = parse(request.client_sockaddr) if request.client_sockaddr else None
    return _field(str(address) if address else None)


def _connected(attempt: Attempt) -> int | None:
    return None if attempt.connect_start_mono_ns is None else attempt.connected_mono_ns


def to_line(trace: Trace) -> str:
    """Returns the line of a trace."""
    request = trace.request
    base_mono_ns = request.accepted_mono_ns or request.first_read_mono_ns or request.created_mono_ns

    def since(mono_ns: int | None) -> str:
        return "-" if mono_ns is None else str(mono_ns - base_mono_ns)

    def each(times_mono_ns: Iterable[int | None]) -> str:
        return ",".join(map(since, times_mono_ns)) or "-"

    attempts = request.attempts
    # If a request arrived in a single read, its first read is its last.
    last_read_mono_ns = request.last_read_mono_ns or request.first_read_mono_ns
    accepted_unix_ns = base_mono_ns + trace.unix_offset_ns
    upstream = ",".join(_field(attempt.peer) for attempt in attempts) or "-"
    return (
        f"{accepted_unix_ns}, {_client(request)}=>{upstream}, {_uri(trace)}, {request.status}, "
        f"request_size={_number(request.request_bytes)}, response_size={_number(request.sent_bytes)}, "
        f"downstream_request_first_byte_time={since(request.first_read_mono_ns)}, "
        f"downstream_request_last_byte_time={since(last_read_mono_ns)}, "
        f"upstream_connect_time={each(map(_connected, attempts))}, "
        f"upstream_request_first_byte_time={each(attempt.first_write_mono_ns for attempt in attempts)}, "
        f"upstream_request_last_byte_time={each(attempt.last_write_mono_ns for attempt in attempts)}, "
        f"upstream_response_first_byte_time={each(attempt.first_read_mono_ns for attempt in attempts)}, "
        f"upstream_response_last_byte_time={each(attempt.last_read_mono_ns for attempt in attempts)}, "
        f"downstream_response_first_byte_time={since(request.first_write_mono_ns)}, "
        f"downstream_response_last_byte_time={since(request.last_write_mono_ns)}\n"
    )

"""The phases of a request: when each began and ended, and why it failed. Pure.

Spans, tables, `top` and exemplars are all made from these phases. The kernel program applies the same rules
(`probes/metrics.h`) to the durations that it counts and to `--keep-slower-than`. A unit test checks that both agree.
"""

import errno
from operator import itemgetter

from otel_nginx_ebpf.traces.record import Attempt, Request, http_status

REQUEST = "request"
DOWNSTREAM_READ = "downstream read"
DOWNSTREAM_WRITE = "downstream write"
UPSTREAM_CONNECT = "upstream connect"
UPSTREAM_EXCHANGE = "upstream exchange"

_GATEWAY_TIMEOUT = 504

# Endings that are the server side's fault. An incomplete response is an error, whatever its status (semantic
# conventions, HTTP spans, Status).
_FAULTS = frozenset({"upstream_incomplete", "upstream_timeout", "shutdown", "aborted"})

# error.type, by outcome, of an exchange whose response had begun.
_INCOMPLETE = {"incomplete": "incomplete_response", "timeout": "timeout"}

# How far nginx's cached clock can be behind when nginx notes that a response's header is complete.
_HEADER_CLOCK_SLACK_NS = 10_000_000

Phase = tuple[int, int, str, int, str | None]
"""A request, or one of its phases. A plain tuple, because other types take several times as long to make:

- start and end, CLOCK_MONOTONIC nanoseconds
- kind: `REQUEST`, `DOWNSTREAM_READ`, `UPSTREAM_CONNECT`, `UPSTREAM_EXCHANGE` or `DOWNSTREAM_WRITE`
- number of the upstream attempt, from 1; 0: the phase belongs to no attempt
- error.type; `None`: the phase did not fail
"""

_by_start = itemgetter(0)


def phases_of(request: Request) -> list[Phase]:
    """Returns the request itself, then its phases by start time.

    A phase that did not happen, was not seen, or has no length is left out. Each request takes this way, so what has
    not failed calls no other function.
    """
    phases: list[Phase] = []
    start_mono_ns, end_mono_ns = request.first_read_mono_ns, request.created_mono_ns
    last_read_mono_ns = request.last_read_mono_ns
    # If one read brought the whole request, the request is complete when nginx begins to work on it. If all its bytes
    # came earlier (pipelining), it has no read.
    if last_read_mono_ns is not None:
        if start_mono_ns is None:
            start_mono_ns = end_mono_ns
        if last_read_mono_ns > end_mono_ns:
            end_mono_ns = last_read_mono_ns
    if start_mono_ns is not None and end_mono_ns > start_mono_ns:
        phases.append((start_mono_ns, end_mono_ns, DOWNSTREAM_READ, 0, None))

    for number, attempt in enumerate(request.attempts, 1):
        start_mono_ns = attempt.connect_start_mono_ns
        if start_mono_ns is not None:
            connected = attempt.connect_ms is not None and attempt.connected_mono_ns is not None
            end_mono_ns = (
                attempt.connected_mono_ns if connected else attempt.connect_failed_mono_ns
            ) or attempt.ended_mono_ns
            if end_mono_ns > start_mono_ns:
                error = None if connected else _failure(attempt.connect_errno, attempt.status, attempt.outcome)
                phases.append((start_mono_ns, end_mono_ns, UPSTREAM_CONNECT, number, error))
        start_mono_ns = attempt.first_write_mono_ns
        if start_mono_ns is not None and attempt.connect_ms is not None:
            end_mono_ns = (attempt.ends_with_read and attempt.last_read_mono_ns) or attempt.ended_mono_ns
            if end_mono_ns > start_mono_ns:
                error, status = None, attempt.status
                if attempt.header_ms is None or status is None or status >= 400 or attempt.outcome:
                    error = exchange_error(is_answered(attempt), attempt.connect_errno, status, attempt.outcome)
                phases.append((start_mono_ns, end_mono_ns, UPSTREAM_EXCHANGE, number, error))

    start_mono_ns, last_write_mono_ns = request.first_write_mono_ns, request.last_write_mono_ns
    if start_mono_ns is not None and last_write_mono_ns is not None and last_write_mono_ns > start_mono_ns:
        phases.append((start_mono_ns, last_write_mono_ns, DOWNSTREAM_WRITE, 0, None))
    phases.sort(key=_by_start)

    # Usually a request ends with its last response byte, or with a phase that ends later. In four cases it ends when
    # nginx ends it: nginx continued after the response (a mirror's exchange, post_action), abandoned the response,
    # opened a tunnel, or wrote nothing.
    if request.ends_with_write and last_write_mono_ns is not None:
        end_mono_ns = last_write_mono_ns
        for phase in phases:
            if phase[1] > end_mono_ns:
                end_mono_ns = phase[1]
    else:
        end_mono_ns = request.ended_mono_ns
    start_mono_ns = request.first_read_mono_ns or request.created_mono_ns
    error = request_error(request.status, request.ending) if request.status >= 500 or request.ending else None
    phases.insert(0, (start_mono_ns, end_mono_ns, REQUEST, 0, error))
    return phases


def has_exchange(attempt: Attempt) -> bool:
    """Tells whether a request was sent to the peer."""
    # nginx notes a connect time when it is about to send. With TLS, it does so only after a successful handshake.
    return attempt.connect_ms is not None and attempt.first_write_mono_ns is not None


def is_failed_connect(attempt: Attempt, error: str | None) -> bool:
    """Tells whether a connect with this error.type was all of its attempt: no request reached the peer."""
    return error is not None and not has_exchange(attempt)


def is_answered(attempt: Attempt) -> bool:
    """Tells whether the peer sent a response."""
    return attempt.header_ms is not None and attempt.status is not None


def time_to_first_byte_ns(attempt: Attempt) -> int | None:
    """Returns the time from the first byte sent to the first byte of the response; `None`: not known, or no response.

    With TLS, the first bytes read may not belong to the response. They may be session tickets (RFC 8446, 4.6.1), or a
    gRPC server's settings and pings. The time of their read counts only if nginx's own, coarser clock saw the header at
    the same time.
    """
    start_mono_ns, first_mono_ns = attempt.first_write_mono_ns, attempt.first_read_mono_ns
    if start_mono_ns is None or first_mono_ns is None or attempt.header_ms is None or attempt.status is None:
        return None
    if first_mono_ns < start_mono_ns:  # bytes that the peer sent before the request are no response
        return None
    if attempt.tls:
        header_mono_ns = (attempt.connect_start_mono_ns or start_mono_ns) + attempt.header_ms * 1_000_000
        if first_mono_ns < header_mono_ns - _HEADER_CLOCK_SLACK_NS:
            return None
    return first_mono_ns - start_mono_ns


def _failure(connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """Returns error.type of an attempt without a response. `None`: nginx abandoned it; the peer did nothing wrong."""
    if connect_errno:
        return errno.errorcode.get(connect_errno, "_OTHER")
    if outcome == "abandoned":
        return None
    return "timeout" if status == _GATEWAY_TIMEOUT else "_OTHER"


def exchange_error(answered: bool, connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """Returns error.type of an exchange. Errors are: no response, a status of 400 or more, an incomplete response."""
    if not answered:
        return _failure(connect_errno, status, outcome)
    code = http_status(status)
    if code is not None and code >= 400:
        return str(code)
    return _INCOMPLETE.get(outcome or "")


def request_error(status: int, ending: str | None) -> str | None:
    """Returns error.type of a request. A status of 500 or more is an error.

    A response that was cut short by the server side's fault is an error, too.
    """
    code = http_status(status)
    if code is not None and code >= 500:
        return str(code)
    return ending if ending in _FAULTS else None

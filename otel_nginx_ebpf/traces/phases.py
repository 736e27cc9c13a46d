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

    A phase that did not happen, was not seen, or has no length is left out.
    """
    phases: list[Phase] = []
    add_read(phases, request.first_read_mono_ns, request.created_mono_ns, request.last_read_mono_ns)
    for number, attempt in enumerate(request.attempts, 1):
        add_attempt(
            phases,
            number,
            attempt.connect_start_mono_ns,
            attempt.connected_mono_ns,
            attempt.connect_failed_mono_ns,
            attempt.first_write_mono_ns,
            attempt.last_read_mono_ns,
            attempt.ended_mono_ns,
            attempt.connect_ms is not None,
            attempt.ends_with_read,
            *attempt_errors(attempt),
        )
    add_write_and_request(
        phases,
        request.first_read_mono_ns or request.created_mono_ns,
        request.first_write_mono_ns,
        request.last_write_mono_ns,
        request.ended_mono_ns,
        request.ends_with_write,
        request_error(request.status, request.ending),
    )
    return phases


# The rules, for times as they are in the record or in a `Request`: 0 and None mean that it did not happen.


def add_read(
    phases: list[Phase], first_read_mono_ns: int | None, created_mono_ns: int, last_read_mono_ns: int | None
) -> None:
    start_mono_ns, end_mono_ns = first_read_mono_ns, created_mono_ns
    # If one read brought the whole request, the request is complete when nginx begins to work on it. If all its bytes
    # came earlier (pipelining), it has no read.
    if last_read_mono_ns:
        start_mono_ns = start_mono_ns or created_mono_ns
        if last_read_mono_ns > end_mono_ns:
            end_mono_ns = last_read_mono_ns
    if start_mono_ns and end_mono_ns > start_mono_ns:
        phases.append((start_mono_ns, end_mono_ns, DOWNSTREAM_READ, 0, None))


def add_attempt(
    phases: list[Phase],
    number: int,
    connect_start_mono_ns: int | None,
    connected_mono_ns: int | None,
    connect_failed_mono_ns: int | None,
    first_write_mono_ns: int | None,
    last_read_mono_ns: int | None,
    ended_mono_ns: int,
    was_ready: bool,
    ends_with_read: bool,
    connect_error: str | None,
    exchange_error: str | None,
) -> None:
    """Adds the phases of an attempt. `was_ready`: nginx noted a connect time, so it was about to send its request."""
    if connect_start_mono_ns:
        end_mono_ns = (
            connected_mono_ns if was_ready and connected_mono_ns else connect_failed_mono_ns
        ) or ended_mono_ns
        if end_mono_ns > connect_start_mono_ns:
            phases.append((connect_start_mono_ns, end_mono_ns, UPSTREAM_CONNECT, number, connect_error))
    if first_write_mono_ns and was_ready:
        end_mono_ns = (ends_with_read and last_read_mono_ns) or ended_mono_ns
        if end_mono_ns > first_write_mono_ns:
            phases.append((first_write_mono_ns, end_mono_ns, UPSTREAM_EXCHANGE, number, exchange_error))


def add_write_and_request(
    phases: list[Phase],
    start_mono_ns: int,
    first_write_mono_ns: int | None,
    last_write_mono_ns: int | None,
    ended_mono_ns: int,
    ends_with_write: bool,
    error: str | None,
) -> None:
    """Adds the last phase, sorts all, and puts the request before them."""
    if first_write_mono_ns and last_write_mono_ns and last_write_mono_ns > first_write_mono_ns:
        phases.append((first_write_mono_ns, last_write_mono_ns, DOWNSTREAM_WRITE, 0, None))
    phases.sort(key=_by_start)
    # Usually a request ends with its last response byte, or with a phase that ends later. In four cases it ends when
    # nginx ends it: nginx continued after the response (a mirror's exchange, post_action), abandoned the response,
    # opened a tunnel, or wrote nothing.
    end_mono_ns = ended_mono_ns
    if ends_with_write and last_write_mono_ns:
        end_mono_ns = last_write_mono_ns
        for phase in phases:
            if phase[1] > end_mono_ns:
                end_mono_ns = phase[1]
    phases.insert(0, (start_mono_ns, end_mono_ns, REQUEST, 0, error))


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
    """Returns the time from the first byte sent to the first byte of the response. `None`: not known, or no answer."""
    if not is_answered(attempt):
        return None
    return first_byte_ns(
        attempt.connect_start_mono_ns,
        attempt.first_write_mono_ns,
        attempt.first_read_mono_ns,
        attempt.header_ms or 0,
        attempt.tls,
    )


def first_byte_ns(
    connect_start_mono_ns: int | None,
    first_write_mono_ns: int | None,
    first_read_mono_ns: int | None,
    header_ms: int,
    tls: bool,
) -> int | None:
    """Returns the time to first byte of an attempt that was answered.

    With TLS, the first bytes read may not belong to the response. They may be session tickets (RFC 8446, 4.6.1), or a
    gRPC server's settings and pings. The time of their read counts only if nginx's own, coarser clock saw the header at
    the same time.
    """
    if not first_write_mono_ns or not first_read_mono_ns:
        return None
    if first_read_mono_ns < first_write_mono_ns:  # bytes that the peer sent before the request are no response
        return None
    if tls:
        header_mono_ns = (connect_start_mono_ns or first_write_mono_ns) + header_ms * 1_000_000
        if first_read_mono_ns < header_mono_ns - _HEADER_CLOCK_SLACK_NS:
            return None
    return first_read_mono_ns - first_write_mono_ns


def attempt_errors(attempt: Attempt) -> tuple[str | None, str | None]:
    """Returns error.type of an attempt's connect and of its exchange. `None`: it did not fail."""
    connected = attempt.connect_ms is not None and attempt.connected_mono_ns is not None
    return (
        None if connected else _failure(attempt.connect_errno, attempt.status, attempt.outcome),
        exchange_error(is_answered(attempt), attempt.connect_errno, attempt.status, attempt.outcome),
    )


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

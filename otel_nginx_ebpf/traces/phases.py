"""The phases of a request: when each began and ended, and why it failed. Pure.

Spans, tables, `top` and exemplars all begin here. The kernel program has the same rules (`probes/metrics.h`) for the
durations that it counts and for `--keep-slower-than`; a unit test holds the two to each other.
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

# Endings that are the server side's fault: a response that was not whole is an error, whatever its status (semantic
# conventions, HTTP spans, Status).
_FAULTS = frozenset({"upstream_incomplete", "upstream_timeout", "shutdown", "aborted"})

# error.type of an exchange whose response had begun.
_INCOMPLETE = {"incomplete": "incomplete_response", "timeout": "timeout"}

# How far nginx's cached clock can lie behind when it notes that a response's header is complete.
_HEADER_CLOCK_SLACK_NS = 10_000_000

Phase = tuple[int, int, str, int, str | None]
"""A request, or one of its phases; a plain tuple, as others take several times as long to make:

- start and end, CLOCK_MONOTONIC nanoseconds
- kind: `REQUEST`, `DOWNSTREAM_READ`, `UPSTREAM_CONNECT`, `UPSTREAM_EXCHANGE` or `DOWNSTREAM_WRITE`
- number of the upstream attempt, from 1; 0: the phase has none
- error.type; None: the phase did not fail
"""

_by_start = itemgetter(0)


def phases_of(request: Request) -> list[Phase]:
    """Returns the request itself, then its phases by start time.

    A phase that did not happen, was not seen, or has no length is left out.
    """
    phases: list[Phase] = []
    start_mono_ns, end_mono_ns = request.first_read_mono_ns, request.created_mono_ns
    last_read_mono_ns = request.last_read_mono_ns
    # A request that one read brought whole is complete where nginx begins to work on it. One whose bytes had all come
    # before (pipelining) has no read.
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
        if start_mono_ns is not None and has_exchange(attempt):
            end_mono_ns = (attempt.ends_with_read and attempt.last_read_mono_ns) or attempt.ended_mono_ns
            if end_mono_ns > start_mono_ns:
                error = exchange_error(is_answered(attempt), attempt.connect_errno, attempt.status, attempt.outcome)
                phases.append((start_mono_ns, end_mono_ns, UPSTREAM_EXCHANGE, number, error))

    start_mono_ns, last_write_mono_ns = request.first_write_mono_ns, request.last_write_mono_ns
    if start_mono_ns is not None and last_write_mono_ns is not None and last_write_mono_ns > start_mono_ns:
        phases.append((start_mono_ns, last_write_mono_ns, DOWNSTREAM_WRITE, 0, None))
    phases.sort(key=_by_start)

    # The request ends with its last response byte, or with a phase that ends later. It ends when nginx ends it if nginx
    # went on afterwards (a mirror's exchange, post_action), gave the response up, opened a tunnel, or wrote nothing.
    if request.ends_with_write and last_write_mono_ns is not None:
        end_mono_ns = last_write_mono_ns
        for phase in phases:
            if phase[1] > end_mono_ns:
                end_mono_ns = phase[1]
    else:
        end_mono_ns = request.ended_mono_ns
    start_mono_ns = request.first_read_mono_ns or request.created_mono_ns
    phases.insert(0, (start_mono_ns, end_mono_ns, REQUEST, 0, request_error(request.status, request.ending)))
    return phases


def has_exchange(attempt: Attempt) -> bool:
    """Returns whether a request was sent to the peer."""
    # nginx notes a connect time when it is about to send: with TLS not before the handshake has succeeded.
    return attempt.connect_ms is not None and attempt.first_write_mono_ns is not None


def is_answered(attempt: Attempt) -> bool:
    """Returns whether the peer sent a response."""
    return attempt.header_ms is not None and attempt.status is not None


def time_to_first_byte_ns(attempt: Attempt) -> int | None:
    """Returns the time from the first byte sent to the first byte of the response; None: not known, or no response.

    With TLS the first bytes read may be session tickets (RFC 8446, 4.6.1) or a gRPC server's settings and pings, and
    not the response's. They are believed only where nginx's own, coarser clock saw the header at the same time.
    """
    start_mono_ns, first_mono_ns = attempt.first_write_mono_ns, attempt.first_read_mono_ns
    if start_mono_ns is None or first_mono_ns is None or attempt.header_ms is None or attempt.status is None:
        return None
    if first_mono_ns < start_mono_ns:  # what a peer says before it is asked is no response
        return None
    if attempt.tls:
        header_mono_ns = (attempt.connect_start_mono_ns or start_mono_ns) + attempt.header_ms * 1_000_000
        if first_mono_ns < header_mono_ns - _HEADER_CLOCK_SLACK_NS:
            return None
    return first_mono_ns - start_mono_ns


def _failure(connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """Returns error.type of an attempt without a response; None: nginx gave it up for no fault of the peer."""
    if connect_errno:
        return errno.errorcode.get(connect_errno, "_OTHER")
    if outcome == "abandoned":
        return None
    return "timeout" if status == _GATEWAY_TIMEOUT else "_OTHER"


def exchange_error(answered: bool, connect_errno: int, status: int | None, outcome: str | None) -> str | None:
    """Returns error.type of an exchange: no response, a status from 400 on, or a response that did not come whole."""
    if not answered:
        return _failure(connect_errno, status, outcome)
    code = http_status(status)
    if code is not None and code >= 400:
        return str(code)
    return _INCOMPLETE.get(outcome or "")


def request_error(status: int, ending: str | None) -> str | None:
    """Returns error.type of a request: a status from 500 on, or a response cut short by the server side's fault."""
    code = http_status(status)
    if code is not None and code >= 500:
        return str(code)
    return ending if ending in _FAULTS else None

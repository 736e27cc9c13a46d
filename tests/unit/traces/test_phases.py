"""Which phases a request has, and that the kernel program applies the same rules."""

import ctypes
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.trace import SpanKind

from otel_nginx_ebpf.traces.abi import LIMITS
from otel_nginx_ebpf.traces.phases import REQUEST, UPSTREAM_CONNECT, UPSTREAM_EXCHANGE, is_failed_connect, phases_of
from otel_nginx_ebpf.traces.record import decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from unit.c_compiler import compile_library
from unit.sample_traces import RETRIED, STATIC, record

PROBES = Path(__file__).parents[3] / "probes"
NONE = 2**64 - 1

# The calls of probes/requests.c and probes/metrics.c.
_SOURCE = r"""
#include <linux/types.h>
#include "record.h"
#include "metrics.h"

u64 durations(const u8 *raw, u64 *to_peers)
{
    const struct request_record *record = (const struct request_record *)raw;
    const struct upstream_attempt *attempts = (const struct upstream_attempt *)(raw + sizeof(*record));
    u64 last_end_ns = read_end_ns(record);
    for (u32 i = 0; i < record->attempts; i++) {
        to_peers[i] = exchange_ns(&attempts[i], &last_end_ns);
        if (!to_peers[i])
            to_peers[i] = failed_connect_ns(&attempts[i]);
    }
    return request_ns(record, last_end_ns);
}
"""

_library = compile_library(_SOURCE, [PROBES / "stub_headers" / "include", PROBES])
_library.durations.restype = ctypes.c_uint64


def by_the_kernel(raw: bytes) -> tuple[int, list[int]]:
    """How long the request took, and each of its attempts' exchange or failed connect; 0: neither."""
    aligned = (ctypes.c_uint64 * (len(raw) // 8)).from_buffer_copy(raw)
    exchanges = (ctypes.c_uint64 * LIMITS["ATTEMPTS_MAX"])()
    request_ns = _library.durations(aligned, exchanges)
    return request_ns, list(exchanges[: len(decode(raw).attempts)])


def by_phases(raw: bytes) -> tuple[int, list[int]]:
    request = decode(raw)
    (start_ns, end_ns, kind, *_), *others = phases_of(request)
    assert kind == REQUEST
    exchanges = [0] * len(request.attempts)
    for start, end, kind, number, error in others:
        failed = kind == UPSTREAM_CONNECT and is_failed_connect(request.attempts[number - 1], error)
        if kind == UPSTREAM_EXCHANGE or failed:
            exchanges[number - 1] = end - start
    return max(end_ns - start_ns, 0), exchanges


moments = st.integers(10, 40)
maybe = st.just(0) | moments
attempts = st.fixed_dictionaries(
    {
        **dict.fromkeys(
            ("connect_start_ns", "connected_ns", "connect_failed_ns", "first_write_ns", "last_read_ns"), maybe
        ),
        "ended_ns": moments,
        "connect_msec": st.sampled_from([0, 3, NONE]),
        "header_msec": st.sampled_from([3, NONE]),
        "status": st.sampled_from([0, 200, 502]),
        "connect_errno": st.sampled_from([0, 0, 111]),
        "outcome": st.integers(0, 3),
        "subrequest": st.booleans(),
        "ends_with_read": st.booleans(),
    }
).map(lambda each: each | {"ends_with_read": each["ends_with_read"] and each["last_read_ns"] != 0})
requests = st.fixed_dictionaries(
    {
        "first_read_ns": st.just(0) | st.integers(1, 10),
        "created_ns": st.integers(10, 12),
        **dict.fromkeys(("last_read_ns", "first_write_ns", "last_write_ns"), st.just(0) | st.integers(12, 40)),
        "ended_ns": moments,
        "ends_with_write": st.booleans(),
    }
).map(lambda each: each | {"ends_with_write": each["ends_with_write"] and each["last_write_ns"] != 0})


@settings(max_examples=1000)
@given(requests, st.lists(attempts, max_size=3))
def test_the_kernel_measures_what_the_phases_say(own: dict[str, int], of_attempts: list[dict[str, int]]) -> None:
    raw = record({}, [("127.0.0.1:9000", each) for each in of_attempts], **own)
    assert by_the_kernel(raw) == by_phases(raw)


def test_a_mirror_that_ends_later_counts_in_the_kernel() -> None:
    mirror = {"connect_start_ns": 15, "connected_ns": 16, "first_write_ns": 17, "last_read_ns": 39, "ended_ns": 40}
    answered = {"connect_msec": 0, "header_msec": 0, "status": 200, "subrequest": 1, "ends_with_read": 1}
    raw = record(
        {},
        [("127.0.0.1:9000", mirror | answered)],
        first_read_ns=9,
        created_ns=10,
        first_write_ns=20,
        last_write_ns=21,
        ended_ns=41,
        ends_with_write=1,
    )
    assert by_the_kernel(raw) == by_phases(raw) == (30, [22])


REFUSED = {"connect_start_ns": 15, "connect_failed_ns": 18, "ended_ns": 19, "connect_msec": NONE, "header_msec": NONE}


@pytest.mark.parametrize(
    ("facts", "counted_ns"),
    [
        ({"connect_errno": 111, "status": 502}, 3),
        ({"status": 504, "connect_failed_ns": 0}, 4),
        ({"outcome": 3}, 0),
        ({"outcome": 3, "connect_errno": 110}, 3),
    ],
    ids=["refused", "timed out", "abandoned", "failed, then abandoned"],
)
def test_a_connect_counts_as_a_request_if_it_failed(facts: dict[str, int], counted_ns: int) -> None:
    raw = record({}, [("127.0.0.1:9", REFUSED | facts)], first_read_ns=9, created_ns=10, ended_ns=41)
    assert by_the_kernel(raw) == by_phases(raw) == (32, [counted_ns])
    connect = build_trace(decode(raw), 0, RandomIds()).spans[2]
    assert (connect.name, connect.kind) == ("upstream connect", SpanKind.CLIENT if counted_ns else SpanKind.INTERNAL)


def test_each_phase_has_its_span() -> None:
    for raw in (STATIC, RETRIED):
        request = decode(raw)
        (start, end, *_), *others = phases_of(request)
        server, *children = build_trace(request, 0, RandomIds()).spans
        assert (server.start_unix_ns, server.end_unix_ns) == (start, end)
        assert [(span.start_unix_ns, span.end_unix_ns, span.name, span.error) for span in children] == [
            (start, end, kind, error) for start, end, kind, _, error in others
        ]

"""The record: both sides of the kernel boundary agree on it, and no bytes make its decoder fail."""

import struct
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.emitter.pipeline import Decoding
from otel_nginx_ebpf.export.interface import Completed
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces import abi, record
from otel_nginx_ebpf.traces.losses import KERNEL_CAUSES
from otel_nginx_ebpf.traces.plausibility import LAYOUT_DOUBT
from unit.c_compiler import DebugInfo, compile_object
from unit.sample_traces import MONO_NS, RETRIED, STATIC
from unit.sample_traces import record as make_record


@pytest.fixture(scope="module")
def compiled() -> DebugInfo:
    structs = (abi.REQUEST_RECORD, abi.UPSTREAM_ATTEMPT, abi.STRING_HEADER, LAYOUT_DOUBT)
    uses = "\n".join(f"struct {layout.name} {layout.name}_used;" for layout in structs)
    return DebugInfo(compile_object(f"#include <linux/types.h>\n{abi.HEADER_TEXT}\n{uses}\n"))


@pytest.mark.parametrize(
    "layout",
    [abi.REQUEST_RECORD, abi.UPSTREAM_ATTEMPT, abi.STRING_HEADER, LAYOUT_DOUBT],
    ids=lambda layout: layout.name,
)
def test_the_compiler_lays_the_record_out_as_the_decoder_reads_it(compiled: DebugInfo, layout: abi.CStruct) -> None:
    offset, expected = 0, {}
    for kind, name in layout.fields:
        expected[name] = offset
        offset += struct.calcsize("<" + abi._FORMATS[kind])
    assert compiled.offsets(layout.name) == expected
    assert compiled.size(layout.name) == layout.size


def test_enums_are_whole() -> None:
    losses = abi.c_enum("loss")
    assert losses.pop("LOSS_CAUSES") == len(KERNEL_CAUSES)
    assert sorted(losses.values()) == list(range(len(KERNEL_CAUSES)))
    assert len(set(abi.STRING_KINDS.values())) == len(abi.STRING_KINDS)
    assert max(abi.STRING_KINDS.values()) < 256
    assert abi.LIMITS["ATTEMPTS_MAX"] * abi.UPSTREAM_ATTEMPT.size < abi.LIMITS["RECORD_BYTES_MAX"]


def test_a_record_with_attempts() -> None:
    request = record.decode(RETRIED)
    assert request.uri == "/api/users?id=1"
    assert [attempt.peer for attempt in request.attempts] == ["127.0.0.1:9", "[::1]:8080"]
    assert request.attempts[0].connect_errno == 111
    assert request.attempts[0].first_write_mono_ns is None
    assert request.attempts[1].received_bytes == 5300
    assert request.host is None


@pytest.mark.parametrize(("coarse_start", "began_ns"), [(0, MONO_NS), (1, MONO_NS - 63_000)])
def test_a_request_that_nginx_clock_puts_too_late_began_before_its_attempts(coarse_start: int, began_ns: int) -> None:
    peers = [
        ("127.0.0.1:80", {"connect_start_ns": MONO_NS - 63_000, "first_write_ns": MONO_NS + 1}),
        ("127.0.0.1:81", {"first_write_ns": MONO_NS + 9}),
    ]
    raw = make_record({}, peers, created_ns=MONO_NS, coarse_start=coarse_start)
    assert record.decode(raw).created_mono_ns == began_ns


def test_a_truncated_record_is_refused_unless_it_ends_between_strings() -> None:
    decoded = []
    for length in range(len(RETRIED)):
        with suppress(record.RecordError):
            decoded.append((length, record.decode(RETRIED[:length])))
    # The fixed parts alone, and then one more string each time.
    assert decoded[0][0] == abi.REQUEST_RECORD.size + 2 * abi.UPSTREAM_ATTEMPT.size
    assert [request.uri for _, request in decoded] == [
        None,
        "/api/users?id=1",
        "/api/users?id=1",
        "/api/users?id=1",
        "/api/users?id=1",
    ]
    assert all(request.attempts[1].received_bytes == 5300 for _, request in decoded)


@given(st.binary(max_size=600))
def test_any_bytes_give_a_request_or_a_record_error(raw: bytes) -> None:
    with suppress(record.RecordError):
        request = record.decode(raw)
        assert len(raw) >= abi.REQUEST_RECORD.size + len(request.attempts) * abi.UPSTREAM_ATTEMPT.size


@given(st.binary(max_size=200), st.integers(0, len(STATIC) - 1))
def test_damage_inside_a_record_never_raises_anything_else(damage: bytes, at: int) -> None:
    raw = (STATIC[:at] + damage + STATIC[at + len(damage) :])[: abi.LIMITS["RECORD_BYTES_MAX"]]
    try:
        request = record.decode(raw)
    except record.RecordError:
        return
    assert request.status >= 0


@pytest.mark.parametrize(
    ("rc", "err_status", "out_status", "sent_bytes", "http_version", "status"),
    [
        (0, 0, 200, 900, 1001, 200),
        (499, 0, 0, 0, 1001, 499),
        (499, 0, 200, 512, 1001, 200),
        (408, 0, 200, 0, 1001, 408),
        (0, 404, 200, 300, 1001, 404),
        (-1, 0, 502, 0, 1001, 502),
        (0, 0, 0, 0, 9, 9),
        (0, 0, 0, 0, 1001, 0),
    ],
)
def test_the_status_is_what_nginx_logs(
    rc: int, err_status: int, out_status: int, sent_bytes: int, http_version: int, status: int
) -> None:
    assert record._status(rc, err_status, out_status, sent_bytes, http_version) == status


@pytest.mark.parametrize(
    ("changes", "impossible"),
    [
        ({}, 0),
        ({"request_length": -58}, 1),
        ({"request_length": -1, "bytes_sent": -1}, 2),
        *(({"out_status": status}, 1) for status in (0, 9, 99, 600, 1234, 2**40)),
        *(({"out_status": status}, 0) for status in (100, 599)),
    ],
)
def test_a_number_that_cannot_be_is_left_out(changes: dict[str, int], impossible: int) -> None:
    request = record.decode(make_record({}, [], created_ns=MONO_NS, **{"out_status": 200, **changes}))
    assert request.impossible == impossible
    assert request.request_bytes == (None if "request_length" in changes else 0)
    assert request.sent_bytes == (None if "bytes_sent" in changes else 0)


def test_an_attempts_numbers_that_cannot_be_are_left_out() -> None:
    none, decades = 2**64 - 1, 2**40
    attempts: list[tuple[dict[str, int], int]] = [
        ({"status": 200, "connect_msec": none, "header_msec": none, "response_msec": 10_600, "bytes_sent": -1}, 0),
        ({"status": 1234, "response_msec": decades, "header_msec": none - 1}, 3),
        ({"status": 999, "bytes_sent": -2, "bytes_received": -1}, 3),
    ]
    request = record.decode(
        make_record({}, [("-", numbers) for numbers, _ in attempts], created_ns=MONO_NS, out_status=200)
    )
    assert [attempt.impossible for attempt in request.attempts] == [count for _, count in attempts]
    assert request.impossible == 6
    usual, slow, negative = request.attempts
    assert (usual.response_ms, usual.sent_bytes, usual.status) == (10_600, None, 200)
    assert (slow.response_ms, slow.header_ms, slow.connect_ms) == (None, None, 0)
    assert (negative.sent_bytes, negative.received_bytes, negative.status) == (None, None, 999)


def test_what_is_left_out_is_counted() -> None:
    taken: list[record.Request] = []

    class Keeping:
        at_once = 1

        def take(self, completed: Sequence[Completed]) -> None:
            taken.extend(request for request, _, _ in completed)

        def shutdown(self, timeout_s: float) -> None:
            pass

    stats = Stats()
    raw = make_record({}, [], created_ns=MONO_NS, request_length=-58, out_status=1234)
    Decoding(Keeping(), stats).take([(raw, 0, {}), (STATIC, 0, {})])
    assert [request.impossible for request in taken] == [2, 0]
    assert stats.lost == {"partial_impossible_value": 2}
    assert "lost 0 (partial_impossible_value 2)" in stats.summary()

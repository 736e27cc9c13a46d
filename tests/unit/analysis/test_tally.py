"""The sums agree with the spans."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.analysis.tally import (
    CONNECT,
    NGINX,
    OTHERS,
    PHASES,
    READ,
    ROWS_MAX,
    TRANSFER,
    WAIT,
    WRITE,
    Row,
    Tally,
)
from otel_nginx_ebpf.analysis.tally import _divide as divide
from otel_nginx_ebpf.traces.record import Request, decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from unit.sample_traces import MONO_NS, RETRIED, STATIC

PARTS = [0.0, 1.0]


def at(request: Request, **changes: object) -> Request:
    return replace(request, location="/api/", server_name="shop.example", **changes)


def only(tally: Tally) -> Row:
    (row,) = tally.locations.values()
    return row


def durations(row: Row) -> dict[str, list[int]]:
    found = {name: phase.percentiles(PARTS) for name, phase in zip(PHASES, row.phases, strict=True)}
    return {name: values for name, values in found.items() if values}


def about(value: int) -> object:
    return pytest.approx(value, rel=1 / 64)


def answered() -> Request:
    retried = decode(RETRIED)
    refused, live = retried.attempts
    return at(
        retried,
        attempts=(
            replace(refused, status=502, upstream="shop"),
            replace(live, upstream="shop", connect_ms=0, header_ms=9),
        ),
    )


def test_a_request_by_location() -> None:
    tally = Tally()
    assert tally.add(answered()) == 12_060_000
    assert list(tally.locations) == [("shop.example", "/api/")]
    row = only(tally)
    assert (row.count, row.refused, row.failed) == (1, 0, 0)
    assert row.length.percentiles([0.5]) == [about(12_060_000)]
    assert durations(row) == {
        "client read": [about(140_000), about(140_000)],
        "connect": [about(90_000), about(150_000)],
        "upstream wait": [about(8_540_000), about(8_540_000)],
        "upstream transfer": [about(3_000_000), about(3_000_000)],
        "client write": [about(3_050_000), about(3_050_000)],
        "nginx": [about(40_000), about(40_000)],
    }


def test_of_phases_at_once_the_earlier_one_has_the_time() -> None:
    tally = Tally()
    tally.add(answered())
    time_ns = only(tally).time_ns
    # the response is written while it comes: only what is left of it then counts as the client's
    assert time_ns[WRITE] == 100_000
    assert time_ns[TRANSFER] == 3_000_000
    assert time_ns[CONNECT] == 240_000
    assert time_ns[NGINX] == 20_000 + 10_000 + 10_000
    assert sum(time_ns) == 12_060_000


def test_its_attempts_by_peer() -> None:
    tally = Tally()
    tally.add(answered())
    refused, live = tally.peers[("shop", "127.0.0.1:9")], tally.peers[("shop", "[::1]:8080")]
    assert (refused.count, refused.failed, durations(refused)) == (1, 1, {"connect": [about(90_000)] * 2})
    assert (live.count, live.failed) == (1, 0)
    assert live.length.percentiles([0.5]) == [about(11_700_000)]
    assert set(durations(live)) == {"connect", "upstream wait", "upstream transfer"}


def test_phases_are_as_long_as_their_spans() -> None:
    for request in (answered(), at(decode(STATIC))):
        tally = Tally()
        length_ns = tally.add(request)
        spans = build_trace(request, 0, RandomIds()).spans
        assert length_ns == spans[0].end_unix_ns - spans[0].start_unix_ns
        for name, phase in (("downstream read", READ), ("upstream connect", CONNECT), ("downstream write", WRITE)):
            lengths = sorted(span.end_unix_ns - span.start_unix_ns for span in spans if span.name == name)
            assert only(tally).phases[phase].count == len(lengths)
            if lengths:
                assert only(tally).phases[phase].percentiles(PARTS) == [about(lengths[0]), about(lengths[-1])]


def test_without_a_first_byte_nginx_s_own_time_tells_it() -> None:
    request = answered()
    live = replace(request.attempts[1], first_read_mono_ns=None, header_ms=4)
    tally = Tally()
    tally.add(replace(request, attempts=(request.attempts[0], live)))
    assert durations(only(tally))["upstream wait"] == [about(4_000_000 - 160_000)] * 2


def test_without_a_response_all_of_an_attempt_is_waiting() -> None:
    request = answered()
    live = replace(
        request.attempts[1],
        first_read_mono_ns=None,
        last_read_mono_ns=None,
        header_ms=None,
        received_bytes=0,
        status=504,
    )
    tally = Tally()
    tally.add(replace(request, attempts=(request.attempts[0], live)))
    found = durations(only(tally))
    assert found["upstream wait"] == [about(12_010_000 - 460_000)] * 2
    assert "upstream transfer" not in found
    assert tally.peers[("shop", "[::1]:8080")].failed == 1


@pytest.mark.parametrize(
    ("status", "attempt", "refused", "failed"),
    [(200, None, 0, 1), (499, None, 1, 0), (404, 404, 1, 0), (500, 500, 0, 1)],
)
def test_which_attempts_failed(status: int, attempt: int | None, refused: int, failed: int) -> None:
    request = answered()
    live = replace(request.attempts[1], status=attempt)
    tally = Tally()
    tally.add(replace(request, status=status, attempts=(live,)))
    (row,) = tally.peers.values()
    assert (row.refused, row.failed) == (refused, failed)
    assert (only(tally).refused, only(tally).failed) == (400 <= status < 500, status >= 500)


def test_merged_is_as_if_all_had_come_to_one() -> None:
    requests = [answered(), at(decode(STATIC), status=404), replace(answered(), location="/other/")]
    one, some, others = Tally(), Tally(), Tally()
    for request in requests:
        one.add(request)
    some.add(requests[0])
    for request in requests[1:]:
        others.add(request)
    some.merge(others)
    assert some.locations.keys() == one.locations.keys()
    assert some.peers.keys() == one.peers.keys()
    for name, row in one.locations.items():
        same = some.locations[name]
        assert (same.count, same.refused, same.time_ns) == (row.count, row.refused, row.time_ns)
        assert durations(same) == durations(row)
    assert some.total().count == 3


def test_rows_are_bounded_and_nothing_is_left_out() -> None:
    tally, request = Tally(), at(decode(STATIC))
    for number in range(2 * ROWS_MAX):
        tally.add(replace(request, location=f"/{number}"))
    assert len(tally.locations) == ROWS_MAX + 1
    assert tally.locations[OTHERS].count == ROWS_MAX
    assert tally.total().count == 2 * ROWS_MAX


intervals = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, NGINX - 1)).map(
        lambda each: (each[0], each[0] + each[1], each[2])
    ),
    max_size=8,
)


@given(intervals)
def test_time_is_divided_moment_by_moment(found: list[tuple[int, int, int]]) -> None:
    expected = [0] * len(PHASES)
    for now in range(100):
        expected[min((phase for start, end, phase in found if start <= now < end), default=NGINX)] += 1
    assert divide(0, 100, found) == expected


def test_a_static_file_is_nginx_s_own_and_the_client_s() -> None:
    tally = Tally()
    tally.add(at(decode(STATIC)))
    assert set(durations(only(tally))) == {"client read", "client write", "nginx"}
    assert WAIT not in tally.peers
    assert only(tally).time_ns[NGINX] == 130_000 - 40_000 - 1_000 - 40_000
    assert MONO_NS  # times are since the samples' accept

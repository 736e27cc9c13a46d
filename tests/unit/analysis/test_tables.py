from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from otel_nginx_ebpf.analysis.tables import SORTS, WIDE, View, rows_of, screen, short_duration, short_number
from otel_nginx_ebpf.analysis.tally import Tally
from otel_nginx_ebpf.traces.record import decode
from unit.sample_traces import RETRIED, STATIC


def some(server: str = "", location: str = "/", **changes: object) -> Tally:
    tally = Tally()
    for _ in range(3):
        tally.add(replace(decode(STATIC), server_name=server, location=location))
    retried = decode(RETRIED)
    refused, live = retried.attempts
    attempts = replace(refused, status=502, upstream="shop"), replace(live, upstream="shop", connect_ms=0, header_ms=9)
    tally.add(replace(retried, server_name=server, location="/api/", attempts=attempts, **changes))
    return tally


def shown(tally: Tally, view: View, width: int, height: int | None = None) -> list[str]:
    return [line.plain.rstrip() for line in screen("the test", tally, 2.0, view, width, height, bar=False)]


def test_80_columns_have_one_percentile() -> None:
    assert shown(some(), View(), 80) == [
        " p95 of the test: 4 requests in 2.0 s",
        " ■ READ 1.2% ■ CONN 1.9% ■ WAIT 69% ■ XFER 24% ■ WRITE 1.8% ■ NGINX 1.5%",
        "",
        " LOCATION                 ▾REQ/S   5xx TOTAL  READ  CONN  WAIT  XFER WRITE NGINX",
        " (all)                       2.0     -  12ms 141µs 150µs 8.5ms 3.0ms 3.0ms  49µs",
        " /                           1.5     -  89µs 1.0µs     -     -     -  40µs  49µs",
        " /api/                       0.5     -  12ms 141µs 150µs 8.5ms 3.0ms 3.0ms  40µs",
        "",
        " UPSTREAM                 ▾REQ/S   5xx TOTAL  READ  CONN  WAIT  XFER WRITE NGINX",
        " shop                        1.0   50%  12ms     - 150µs 8.5ms 3.0ms     -     -",
    ]


def test_handshakes_and_blocked_workers_have_a_line() -> None:
    lines = shown(some(handshake_ns=1_200_000, longest_turn_ns=35_000_000), View(), 80)
    assert lines[2:5] == [
        " TLS handshakes: 1, p50 1.2ms, p95 1.2ms, p99 1.2ms",
        " requests in a blocked worker: 1, p50 35ms, p95 35ms, p99 35ms",
        "",
    ]


def test_a_wide_terminal_has_all() -> None:
    lines = shown(some(), View(sort=5, percentile=2), WIDE)
    assert lines[0] == " the test: 4 requests in 2.0 s"
    percentiles = ["p50", "p95", "p99"] * 7
    percentiles[3 * 3 + 2] = "▾p99"
    assert lines[4].split() == percentiles
    assert lines[6].split()[:8] == ["/api/", "1", "0.5", "-", "-", "12ms", "12ms", "12ms"]


def test_every_column_sorts() -> None:
    tally = some()
    tops = {sort: rows_of(tally, View(sort=index))[0][0][0] for index, sort in enumerate(SORTS)}
    assert tops == {sort: "/" if sort in ("rate", "errors", "nginx") else "/api/" for sort in SORTS}


def test_peers_have_rows_of_their_own() -> None:
    assert [name for name, _ in rows_of(some(), View(peers=True))[1]] == ["shop 127.0.0.1:9", "shop [::1]:8080"]
    (whole,) = rows_of(some(), View())[1]
    assert (whole[0], whole[1].count, whole[1].failed) == ("shop", 2, 1)


def test_servers_are_named_where_there_are_several() -> None:
    tally = some("a.example")
    tally.merge(some("b.example"))
    assert [name for name, _ in rows_of(tally, View())[0]] == [
        *("a.example /", "b.example /", "a.example /api/", "b.example /api/")
    ]


def test_a_filter_leaves_rows_of_its_text() -> None:
    lines = shown(some(), View(filter="api"), 80)
    assert [line.split()[0] for line in lines[4:5]] == ["/api/"]
    assert not any("(all)" in line for line in lines)


@pytest.mark.parametrize("width", [20, 80, 91, 92, 119, 120, WIDE - 1, WIDE, 250])
def test_lines_are_no_wider_than_asked(width: int) -> None:
    tally = some(location="/" + "漢" * 100)
    for line in shown(tally, View(), max(width, 80)):
        assert cell_len(line) <= max(width, 80)
    assert shown(tally, View(), width)


@pytest.mark.parametrize("height", [0, 5, 10, 12, 20])
def test_what_has_no_room_is_counted(height: int) -> None:
    tally = Tally()
    for number in range(50):
        tally.add(replace(decode(STATIC), location=f"/{number:02}"))
    lines = shown(tally, View(), 80, height)
    listed = [line for line in lines if line.startswith(" /")]
    (more,) = [line for line in lines if "more" in line]
    assert more == f" … and {50 - len(listed)} more"
    assert len(lines) <= max(height, 8)


@given(st.text(max_size=40), st.text(max_size=40))
def test_hostile_names_are_nothing_but_text(server: str, location: str) -> None:
    for line in screen("the test", some(server, location), 1.0, View(peers=True), 120, bar=True):
        assert line.plain.isprintable()


def test_nothing_came() -> None:
    assert shown(Tally(), View(), 80)[0] == " p95 of the test: 0 requests in 2.0 s"


@given(st.integers(0, 10**18))
def test_a_duration_has_five_columns(nanoseconds: int) -> None:
    assert len(short_duration(nanoseconds)) <= 5 or nanoseconds > 10**16


@given(st.floats(0, 9e8))
def test_a_number_has_five_columns(number: float) -> None:
    assert len(short_number(number)) <= 5


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        *((0, "0.0µs"), (640, "0.6µs"), (9_940, "9.9µs"), (9_960, "10µs"), (999_400, "999µs"), (999_600, "1.0ms")),
        *((640_000_000, "640ms"), (12_400_000_000, "12s"), (999_400_000_000, "999s"), (3_600_000_000_000, "1.0h")),
    ],
)
def test_duration(nanoseconds: int, text: str) -> None:
    assert short_duration(nanoseconds) == text

from dataclasses import replace

import pytest

from otel_nginx_ebpf.analysis.tables import PERCENTILES, SORTS, View
from otel_nginx_ebpf.analysis.tally import Tally
from otel_nginx_ebpf.analysis.top import _KEY, Controls, Recent
from otel_nginx_ebpf.traces.record import decode
from unit.sample_traces import STATIC

REQUEST = decode(STATIC)


def counts(found: tuple[Tally, float]) -> tuple[int, float]:
    return found[0].total().count, found[1]


def test_the_last_seconds_slide_and_all_time_does_not() -> None:
    recent = Recent(10, 100)
    for second in range(100, 130):
        recent.turn(second)
        recent.newest.add(REQUEST)
    assert counts(recent.tally(130, all_time=True)) == (30, 30)
    count, seconds = counts(recent.tally(130))
    assert count == seconds
    assert 10 <= seconds <= 11


def test_nothing_is_lost_where_nobody_looked_for_long() -> None:
    recent = Recent(10, 0)
    recent.newest.add(REQUEST)
    recent.turn(1000)
    recent.newest.add(REQUEST)
    assert counts(recent.tally(1001, all_time=True)) == (2, 1001)
    recent.turn(1020)
    recent.turn(1040)
    assert counts(recent.tally(1041))[0] == 0
    assert counts(recent.tally(1041, all_time=True)) == (2, 1041)


def press(controls: Controls, typed: str) -> Controls:
    for key in _KEY.findall(typed):
        controls.press(key)
    return controls


@pytest.mark.parametrize(
    ("typed", "sort"),
    [("\x1b[C", 1), ("\x1bOC\x1bOC", 2), (">>><", 2), ("\x1b[D", len(SORTS) - 1), ("\x1b[A\x1b[3~", 0)],
)
def test_arrows_move_the_column(typed: str, sort: int) -> None:
    controls = press(Controls(View()), typed)
    assert controls.view == View(sort=sort)
    assert not controls.ended


def test_letters() -> None:
    controls = press(Controls(View()), "pua ")
    assert (controls.view, controls.all_time, controls.paused) == (View(percentile=2, peers=True), True, True)
    press(controls, "pua ")
    assert (controls.view, controls.all_time, controls.paused) == (View(percentile=0), False, False)
    assert len(PERCENTILES) == 3


def test_a_filter_is_typed_and_a_q_in_it_does_not_quit() -> None:
    controls = press(Controls(View()), "/qux\x7f\x1b[C\r")
    assert (controls.view.filter, controls.ended, controls.typing) == ("qu", False, False)
    assert "[qu]" in controls.footer()
    assert press(controls, "q").ended


@pytest.mark.parametrize("typed", ["q", "\x03", "/abc\x03"])
def test_the_end(typed: str) -> None:
    assert press(Controls(View()), typed).ended


def test_another_filter_begins_anew() -> None:
    assert press(Controls(replace(View(), filter="old")), "/new").view.filter == "new"

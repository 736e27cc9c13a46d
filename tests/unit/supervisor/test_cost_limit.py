"""When the watchdog measures, detaches and tries again."""

import pytest

from otel_nginx_ebpf.supervisor.cost_limit import Limits, Measurement, Watchdog

LIMITS = Limits(cost_ns=10_000, loss=0.01, pause_s=60)
FINE = Measurement(requests=1000, cost_ns=10_000_000, lost=10)
DEAR = Measurement(requests=1000, cost_ns=10_001_000, lost=0)
LOSSY = Measurement(requests=1000, cost_ns=0, lost=11)


def live_watchdog(limits: Limits = LIMITS, now_s: float = 1000) -> Watchdog:
    made = Watchdog(limits)
    made.attached(now_s)
    return made


def detached_at(watchdog: Watchdog, now_s: float, measured: Measurement = DEAR) -> str:
    """Three seconds of it; what the third one led to."""
    assert [watchdog.should_detach(measured, now_s - 2), watchdog.should_detach(measured, now_s - 1)] == ["", ""]
    return watchdog.should_detach(measured, now_s)


@pytest.mark.parametrize(
    ("measured", "because"),
    [
        (DEAR, "tracing took 10.0 µs a request, more than the 10 µs allowed; detached for 60 s"),
        (LOSSY, "1.10% of the traces were lost, more than the 1.00% allowed; detached for 60 s"),
    ],
)
def test_three_bad_seconds_in_a_row(measured: Measurement, because: str) -> None:
    watchdog = live_watchdog()
    for bad_or_not in (measured, measured, FINE, measured, measured):
        assert watchdog.should_detach(bad_or_not, 1010) == ""
    assert watchdog.should_detach(measured, 1011) == because
    assert not watchdog.may_attach(1070.9)
    assert watchdog.may_attach(1071)


def test_too_few_requests_say_nothing() -> None:
    watchdog = live_watchdog()
    few = Measurement(requests=99, cost_ns=10**9, lost=99)
    assert [watchdog.should_detach(measured, 1010) for measured in (DEAR, few, few, DEAR, few)] == [""] * 5
    assert watchdog.should_detach(DEAR, 1011)
    assert live_watchdog().should_detach(Measurement(0, 0, 0), 1001) == ""


@pytest.mark.parametrize("limits", [Limits(None, 0.01, 60), Limits(10_000, None, 60), Limits(None, None, 60)])
def test_what_has_no_limit(limits: Limits) -> None:
    watchdog = live_watchdog(limits)
    allowed = DEAR if limits.cost_ns is None else LOSSY
    assert [watchdog.should_detach(allowed, 1010 + second) for second in range(5)] == [""] * 5


def test_measures_at_once_then_now_and_then_and_without_a_pause_while_in_doubt() -> None:
    watchdog = live_watchdog()
    assert watchdog.should_measure(1000)
    watchdog.should_detach(FINE, 1001)
    assert not watchdog.should_measure(1010.9)
    assert watchdog.should_measure(1011)
    watchdog.should_detach(DEAR, 1012)
    assert watchdog.should_measure(1012)
    watchdog.should_detach(FINE, 1013)
    assert not watchdog.should_measure(1022)


def test_pauses_grow_to_an_hour_and_begin_anew_after_a_good_one() -> None:
    watchdog = Watchdog(LIMITS)
    now_s, pauses = 1000.0, []
    for _ in range(8):
        watchdog.attached(now_s)
        now_s += 5
        told = detached_at(watchdog, now_s)
        pauses.append(int(told.rsplit(" ", 2)[1]))
        now_s += pauses[-1]
        assert watchdog.may_attach(now_s)
        assert not watchdog.may_attach(now_s - 1)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    watchdog.attached(now_s)
    assert detached_at(watchdog, now_s + 3601).endswith("detached for 60 s")

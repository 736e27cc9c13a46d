import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.analysis.histogram import PRECISION, Histogram

durations = st.lists(st.integers(0, 10**13) | st.integers(0, 200), min_size=1, max_size=200)


def of(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(durations)
def test_percentiles_are_as_precise_as_promised(values: list[int]) -> None:
    parts = [0.0, 0.25, 0.5, 0.95, 0.99, 1.0]
    found = of(values).percentiles(parts)
    assert found is not None
    for part, value in zip(parts, found, strict=True):
        exact = sorted(values)[max(math.ceil(part * len(values)), 1) - 1]
        assert abs(value - exact) <= PRECISION * exact


@given(durations, durations)
def test_merged_is_as_if_all_had_come_to_one(some: list[int], others: list[int]) -> None:
    merged, parts = of(some), [0.1 * step for step in range(11)]
    merged.merge(of(others))
    assert merged.count == len(some + others)
    assert merged.percentiles(parts) == of(some + others).percentiles(parts)


def test_none_where_nothing_came() -> None:
    assert Histogram().percentiles([0.5]) is None


@pytest.mark.parametrize("value", range(64))
def test_short_ones_are_exact(value: int) -> None:
    assert of([value]).percentiles([0.5]) == [value]


def test_a_clock_that_went_back_is_no_time() -> None:
    assert of([-5]).percentiles([0.5]) == [0]


def test_memory_is_bounded_by_the_spread() -> None:
    histogram = of([round(1.001**step) for step in range(30_000)])
    assert len(histogram._buckets) < 1500

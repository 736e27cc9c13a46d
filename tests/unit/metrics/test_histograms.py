"""Exponential histograms: the kernel's buckets are those of the data model, exactly."""

import ctypes
from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics._internal.exponential_histogram.mapping.logarithm_mapping import LogarithmMapping
from opentelemetry.semconv._incubating.metrics.http_metrics import HTTP_SERVER_RESPONSE_BODY_SIZE
from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf.metrics.histograms import SCALE, Histogram, histograms_of
from otel_nginx_ebpf.metrics.series import BUCKETS, EXPONENTIAL, METRICS, NGINX_WORKER_LOOP
from otel_nginx_ebpf.metrics.totals import Measured, Place, Series
from unit.c_compiler import compile_library

PROBES = Path(__file__).parents[3] / "probes"
_SOURCE = r"""
#include <linux/types.h>
#include "record.h"
#include "metrics.h"

s32 place(u64 amount, u32 kind, u32 *bucket)
{
    struct place place =
        kind == 0 ? place_of_duration(amount) : kind == 1 ? place_of_turn(amount) : place_of_size(amount);
    *bucket = place.bucket;
    return place.index;
}
"""
_library = compile_library(_SOURCE, [PROBES / "stub_headers" / "include", PROBES])
_library.place.argtypes = ctypes.c_uint64, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32)
DURATION, TURN, SIZE = HTTP_SERVER_REQUEST_DURATION, NGINX_WORKER_LOOP, HTTP_SERVER_RESPONSE_BODY_SIZE
KINDS = (DURATION, TURN, SIZE)

SECOND = 10**9
LONGEST = SECOND << 33
PARTS = 2**SCALE


def kernels_place(amount: int, kind: str) -> Place:
    bucket = ctypes.c_uint32()
    return Place(_library.place(amount, KINDS.index(kind), ctypes.byref(bucket)), bucket.value)


def is_above(amount: int, index: int, unit: int) -> bool:
    """Tells whether an amount is above the lower bound of a bucket, 2^(index/4) units. Whole numbers, without error."""
    left, right = amount**PARTS, unit**PARTS
    return left << -index > right if index < 0 else left > right << index


def at_a_bound(index: int, unit: int) -> int:
    """Returns the highest amount that is not above the bucket's lower bound."""
    low, high = 0, 2**63
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if is_above(middle, index, unit) else (middle, high)
    return low


def amounts(unit: int, highest: int) -> st.SearchStrategy[int]:
    near = st.builds(lambda index, more: at_a_bound(index, unit) + more, st.integers(-119, 130), st.integers(0, 1))
    any_of = st.integers(0, highest) | st.integers(0, 10**10) | st.integers(0, 3000)
    return any_of | near | st.sampled_from([0, 1, unit, unit + 1, highest])


@pytest.mark.parametrize(("kind", "highest"), [(DURATION, LONGEST), (TURN, LONGEST), (SIZE, 2**62)])
def test_every_amount_is_within_the_bounds_of_its_bucket(kind: str, highest: int) -> None:
    unit = METRICS[kind].in_unit
    bounds = [round(bound * unit) for bound in METRICS[kind].bounds]
    assert len(bounds) == BUCKETS - 1

    @given(amounts(unit, highest) | st.sampled_from(bounds) | st.sampled_from(bounds).map(lambda bound: bound + 1))
    def within(amount: int) -> None:
        index, bucket = kernels_place(amount, kind)
        assert bucket == bisect_left(bounds, amount)
        if amount == 0:
            assert index == EXPONENTIAL["EXPONENTIAL_ZERO"]
        else:
            assert is_above(amount, index, unit)
            assert not is_above(amount, index + 1, unit)

    within()


@given(st.integers(1, LONGEST))
def test_the_sdk_has_the_same_buckets(ns: int) -> None:
    """The SDK computes with logarithms of floats, so that close to a bound it may differ."""
    index = LogarithmMapping(SCALE).map_to_index(ns / SECOND)
    assert kernels_place(ns, DURATION).exponential in {
        index,
        *(bound for bound in (index - 1, index + 1) if is_close(ns, bound, index)),
    }


def is_close(ns: int, index: int, other: int) -> bool:
    bound = 2 ** (max(index, other) / PARTS) * SECOND
    return abs(ns - bound) < bound * 1e-12


def test_places_of_a_series_become_a_histogram() -> None:
    one, other = Series("m", (("http.route", "/"),)), Series("m", ())
    nginx, edge = {"service.name": "nginx"}, {"service.name": "edge"}
    zero = EXPONENTIAL["EXPONENTIAL_ZERO"]
    measured = [
        Measured(nginx, one._replace(place=Place(-30, 0)), (12, 2)),
        Measured(nginx, one._replace(place=Place(-27, 1)), (30, 3)),
        Measured(nginx, one._replace(place=Place(-27, 2)), (40, 1)),
        Measured(nginx, one._replace(place=Place(zero, 0)), (0, 5)),
        Measured(edge, other, (7, 1, *[0] * (BUCKETS - 1))),
    ]
    exponential, classic = histograms_of(measured)
    assert exponential == Histogram(nginx, one, 82, [7, 3, 1, *[0] * (BUCKETS - 3)], {-30: 2, -27: 4}, 5)
    assert exponential.dense() == (-30, [2, 0, 0, 4])
    assert classic == Histogram(edge, other, 7, [1, *[0] * (BUCKETS - 1)])
    assert classic.exponential is None

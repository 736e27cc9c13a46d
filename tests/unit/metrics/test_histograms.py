"""Exponential histograms: the kernel's buckets are those of the data model, exactly."""

import ctypes
from bisect import bisect_left
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics._internal.exponential_histogram.mapping.logarithm_mapping import LogarithmMapping

from otel_nginx_ebpf.metrics.histograms import SCALE, Histogram, histograms_of
from otel_nginx_ebpf.metrics.series import BOUNDS_S, BUCKETS, EXPONENTIAL
from otel_nginx_ebpf.metrics.totals import Measured, Place, Series
from unit.c_compiler import compile_library

PROBES = Path(__file__).parents[3] / "probes"
_SOURCE = r"""
#include <linux/types.h>
#include "record.h"
#include "metrics.h"

s32 place(u64 ns, u32 *bucket)
{
    struct duration_place place = place_of(ns);
    *bucket = place.bucket;
    return place.index;
}
"""
_library = compile_library(_SOURCE, [PROBES / "stub_headers" / "include", PROBES])
_library.place.argtypes = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32)

SECOND = 10**9
LONGEST = SECOND << 33
PARTS = 2**SCALE


def kernels_place(ns: int) -> Place:
    bucket = ctypes.c_uint32()
    return Place(_library.place(ns, ctypes.byref(bucket)), bucket.value)


def is_above(ns: int, index: int) -> bool:
    """Tells whether a duration is above the lower bound of a bucket, 2^(index/4) s. In whole numbers: without error."""
    left, right = ns**PARTS, SECOND**PARTS
    return left << -index > right if index < 0 else left > right << index


def at_a_bound(index: int) -> int:
    """Returns the longest duration that is not above the bucket's lower bound."""
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if is_above(middle, index) else (middle, high)
    return low


durations = st.integers(0, LONGEST) | st.integers(0, 10**10) | st.integers(0, 3000)
near_bounds = st.builds(lambda index, more: at_a_bound(index) + more, st.integers(-119, 130), st.integers(0, 1))


@given(durations | near_bounds)
@example(0)
@example(1)
@example(SECOND)
@example(SECOND + 1)
@example(LONGEST)
def test_every_duration_is_within_the_bounds_of_its_bucket(ns: int) -> None:
    index, bucket = kernels_place(ns)
    assert bucket == bisect_left(BOUNDS_S, ns / SECOND)
    if ns == 0:
        assert index == EXPONENTIAL["EXPONENTIAL_ZERO"]
    else:
        assert is_above(ns, index)
        assert not is_above(ns, index + 1)


@given(st.integers(1, LONGEST))
def test_the_sdk_has_the_same_buckets(ns: int) -> None:
    """The SDK computes with logarithms of floats, so that close to a bound it may differ."""
    index = LogarithmMapping(SCALE).map_to_index(ns / SECOND)
    assert kernels_place(ns).exponential in {
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

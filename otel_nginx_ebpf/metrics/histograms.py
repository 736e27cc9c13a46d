"""Makes histograms of the counts of all requests: with the conventions' buckets, and with exponential buckets."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from otel_nginx_ebpf.metrics.series import BUCKETS, EXPONENTIAL
from otel_nginx_ebpf.metrics.totals import Measured, Resource, Series

SCALE = EXPONENTIAL["EXPONENTIAL_SCALE"]
_ZERO = EXPONENTIAL["EXPONENTIAL_ZERO"]


@dataclass(slots=True)
class Histogram:
    """The amounts of one series."""

    resource: Resource
    series: Series
    """Without a place."""
    total: int = 0
    """The sum of the amounts, in the kernel's unit."""
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    """A count for each bucket of the metric's bounds."""
    exponential: Counter[int] | None = None
    """Counts by the index of the exponential bucket, without amounts of 0. `None`: the kernel did not count so."""
    zero_count: int = 0

    def dense(self) -> tuple[int, list[int]]:
        """Returns the index of the first exponential bucket with a count, and the counts from there to the last."""
        if not self.exponential:
            return 0, []
        first, last = min(self.exponential), max(self.exponential)
        return first, [self.exponential[index] for index in range(first, last + 1)]


def histograms_of(measured: Iterable[Measured]) -> list[Histogram]:
    made: dict[tuple[int, Series], Histogram] = {}
    for resource, series, (total, *counts) in measured:
        place, series = series.place, series._replace(place=None)
        found = made.get((id(resource), series))
        if found is None:
            found = made[id(resource), series] = Histogram(resource, series)
        found.total += total
        if place is None:
            found.buckets = counts
            continue
        (count,) = counts
        found.buckets[place.bucket] += count
        found.exponential = Counter() if found.exponential is None else found.exponential
        if place.exponential == _ZERO:
            found.zero_count += count
        else:
            found.exponential[place.exponential] += count
    return list(made.values())

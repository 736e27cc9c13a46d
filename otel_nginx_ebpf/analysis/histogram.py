"""Histograms of durations that can be merged. Their memory depends on the durations' range, not on their number."""

from collections.abc import Iterable

# Each power of two is divided into 2**_BITS buckets. Below twice that number, buckets are exact.
_BITS = 5
_PARTS = 1 << _BITS

PRECISION = 1 / (2 * _PARTS)
"""The largest error of a percentile, as a fraction of its value."""


class Histogram:
    """Counts durations, in nanoseconds."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self.count = 0
        self._buckets: dict[int, int] = {}

    def add(self, value_ns: int) -> None:
        """Counts a duration. A negative duration counts as 0."""
        shift = max(value_ns, 0).bit_length() - _BITS - 1
        bucket = (shift << _BITS) + (value_ns >> shift) if shift > 0 else max(value_ns, 0)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1

    def merge(self, other: "Histogram") -> None:
        """Adds all counts of `other`."""
        self.count += other.count
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def percentiles(self, parts: Iterable[float]) -> list[int] | None:
        """Returns percentiles in nanoseconds, or None if nothing was counted.

        Args:
            parts: The percentiles as fractions in ascending order, such as 0.5 and 0.99.
        """
        if not self.count:
            return None
        found: list[int] = []
        buckets = iter(sorted(self._buckets.items()))
        bucket, seen = 0, 0
        for part in parts:
            while seen < part * self.count or not seen:
                bucket, count = next(buckets)
                seen += count
            found.append(_middle(bucket))
        return found


def _middle(bucket: int) -> int:
    shift = (bucket >> _BITS) - 1
    return ((bucket - (shift << _BITS)) << shift) + (1 << shift >> 1) if shift > 0 else bucket

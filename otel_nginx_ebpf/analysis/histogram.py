"""Distributions of durations, in memory that their spread bounds and not their number; several add up to one."""

from collections.abc import Iterable

# A power of two is divided into so many buckets, which are exact below twice that.
_BITS = 5
_PARTS = 1 << _BITS

PRECISION = 1 / (2 * _PARTS)
"""How far from the truth a percentile can be, as a part of it."""


class Histogram:
    """How often which duration came, nanoseconds."""

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self.count = 0
        self._buckets: dict[int, int] = {}

    def add(self, value_ns: int) -> None:
        """Counts one; below 0 is 0."""
        shift = max(value_ns, 0).bit_length() - _BITS - 1
        bucket = (shift << _BITS) + (value_ns >> shift) if shift > 0 else max(value_ns, 0)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1

    def merge(self, other: "Histogram") -> None:
        """Adds all that `other` has."""
        self.count += other.count
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def percentiles(self, parts: Iterable[float]) -> list[int] | None:
        """The durations that so many parts of all, ascending, are at most as long as; None where there are none."""
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

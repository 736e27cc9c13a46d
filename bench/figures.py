"""Reduces many measurements to a few numbers. Pure functions."""

import statistics
from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the sorted values do not exceed (nearest rank). Raise ValueError if empty."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the figures of a series, for the JSON file and the tables."""
    low, middle, high = quartiles(values)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "least": min(values)}


def ratios(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """Return each round's value divided by the other value of that round."""
    return [value / other for value, other in zip(values, against, strict=True)]


def paired(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """Return each round's value minus the other value of that round. This removes what both share, such as load."""
    return [value - other for value, other in zip(values, against, strict=True)]

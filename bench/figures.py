"""Many measurements of one thing, in few numbers: pure."""

import statistics
from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of the sorted values do not exceed (nearest rank). Raises ValueError for none."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float]) -> dict[str, float]:
    """The figures that the JSON file and the tables have of each series."""
    low, middle, high = quartiles(values)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "least": min(values)}


def paired(values: Sequence[float], against: Sequence[float]) -> list[float]:
    """What each round's value is above the same round's other one: what both share, such as load, drops out."""
    return [value - other for value, other in zip(values, against, strict=True)]

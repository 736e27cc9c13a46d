"""Measures latency at a fixed rate below saturation, with tracing off and on in turn."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.figures import percentile, summary
from bench.load import at_rate
from bench.site import SCENARIOS, Site
from bench.variants import Variant, turns

PERCENTS = (50.0, 99.0, 99.9)
SECONDS = 3


def measure(
    site: Site,
    names: Iterable[str],
    variants: Sequence[Variant],
    rounds: int,
    requests_a_second: int,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Return microseconds in each round, and their figures, by scenario, variant and percentile."""
    names = list(names)
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in names}
    for number, label, name, _ in turns(variants, names, site.nginx.pid, rounds):
        advance(f"round {number}, {label}: latency of {name}")
        latencies_us = at_rate(site.url(SCENARIOS[name]), SCENARIOS[name], requests_a_second, SECONDS)
        series = found[name].setdefault(label, {f"p{percent:g}": [] for percent in PERCENTS})
        for percent in PERCENTS:
            series[f"p{percent:g}"].append(percentile(latencies_us, percent))
    return {
        name: {
            label: {each: {**summary(values), "rounds": values} for each, values in series.items()}
            for label, series in by_label.items()
        }
        for name, by_label in found.items()
    }

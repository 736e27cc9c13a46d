"""Compares the metrics of all requests with the spans of these requests."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from e2e.agent_process import Span, Trace

# https://opentelemetry.io/docs/specs/semconv/http/http-metrics/
BOUNDS_S = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
# https://opentelemetry.io/docs/specs/otel/metrics/data-model/#exponentialhistogram, scale 2: up to 16 s
LOWEST = -120
EXPONENTIAL_BOUNDS_S = [2 ** (index / 4) for index in range(LOWEST, 17)]
METRICS = {"SERVER": "http.server.request.duration", "CLIENT": "http.client.request.duration"}
ATTRIBUTES = {
    "SERVER": (
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "url.scheme",
        "network.protocol.version",
        "error.type",
        "nginx.server_name",
        "nginx.cache.status",
    ),
    "CLIENT": (
        "http.request.method",
        "http.response.status_code",
        "network.peer.address",
        "network.peer.port",
        "nginx.upstream.name",
        "error.type",
    ),
}

ALL = frozenset({"server.address", "server.port"}.union(*ATTRIBUTES.values()))

Series = tuple[str, frozenset[tuple[str, Any]]]
Histogram = tuple[int, float, list[int]]
"""Count, sum in seconds, buckets."""


def measured_spans(traces: Iterable[Trace]) -> Iterable[Span]:
    return (span for trace in traces for span in trace.spans if span.kind in METRICS)


def series_of(span: Span, chosen: Collection[str] = ALL) -> Series:
    names = ATTRIBUTES[span.kind]
    attributes = {name: span.attributes[name] for name in names if name in span.attributes}
    if span.kind == "CLIENT":  # the span has the host that was asked for, which a client may choose
        server = {"server.address": attributes.get("nginx.upstream.name", attributes.get("network.peer.address"))}
        server["server.port"] = attributes.get("network.peer.port")
        attributes |= {name: value for name, value in server.items() if value is not None}
    return METRICS[span.kind], frozenset((name, value) for name, value in attributes.items() if name in chosen)


def expected(
    traces: Iterable[Trace], chosen: Collection[str] = ALL, bounds_s: Sequence[float] = BOUNDS_S
) -> dict[Series, Histogram]:
    """Return the histograms that follow from the spans' durations, by series."""
    durations_ns: dict[Series, list[int]] = {}
    for span in measured_spans(traces):
        durations_ns.setdefault(series_of(span, chosen), []).append(span.end_unix_ns - span.start_unix_ns)
    histograms = {}
    for series, each in durations_ns.items():
        buckets = [0] * (len(bounds_s) + 1)
        for duration_ns in each:
            buckets[bisect_left(bounds_s, duration_ns / 1e9)] += 1
        histograms[series] = len(each), sum(each) / 1e9, buckets
    return histograms


def told(metrics: Iterable[Metric], attributes_of: Any) -> dict[Series, Histogram]:
    """Return the histograms that a collector received, by series."""
    histograms = {}
    for metric in metrics:
        for point in metric.histogram.data_points:
            assert list(point.explicit_bounds) == BOUNDS_S
            series = metric.name, frozenset(attributes_of(point.attributes).items())
            assert series not in histograms, "a series told twice"
            histograms[series] = point.count, point.sum, list(point.bucket_counts)
    return histograms


def exponential(metrics: Iterable[Metric], attributes_of: Any) -> dict[Series, Histogram]:
    """Return the exponential histograms that a collector received, by series."""
    histograms = {}
    for metric in metrics:
        for point in metric.exponential_histogram.data_points:
            assert (point.scale, point.zero_count) == (2, 0)
            series = metric.name, frozenset(attributes_of(point.attributes).items())
            buckets = [0] * (len(EXPONENTIAL_BOUNDS_S) + 1)
            for index, count in enumerate(point.positive.bucket_counts, point.positive.offset):
                buckets[index - LOWEST + 1] = count
            histograms[series] = point.count, point.sum, buckets
    return histograms


def differences(told: dict[Series, Histogram], expected: dict[Series, Histogram]) -> list[str]:
    """Return the series that differ, as text. Empty if they agree."""
    return [
        f"{metric} {sorted(attributes)}: told {told.get((metric, attributes))}, of the spans "
        f"{expected.get((metric, attributes))}"
        for metric, attributes in told.keys() | expected.keys()
        if told.get((metric, attributes)) != expected.get((metric, attributes))
    ]

"""Turns the durations of all requests into OpenTelemetry histograms, with exemplars that point to traces."""

import time
from typing import Any, NamedTuple

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Buckets,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.export.resource import SCHEMA_URL, Resources
from otel_nginx_ebpf.metrics import histograms
from otel_nginx_ebpf.metrics.connections import CONNECTIONS, ConnectionCounts, Total
from otel_nginx_ebpf.metrics.exemplars import Example, Exemplars
from otel_nginx_ebpf.metrics.series import METRICS
from otel_nginx_ebpf.metrics.totals import RequestDurations

_Point = HistogramDataPoint | ExponentialHistogramDataPoint
_SCOPE = InstrumentationScope("otel_nginx_ebpf", __version__, SCHEMA_URL)


class RequestSources(NamedTuple):
    """What the metrics of requests are made from."""

    durations: RequestDurations
    connections: ConnectionCounts
    exemplars: Exemplars
    resources: Resources


class OtlpRequestMetrics:
    """Builds the messages with the requests' metrics."""

    def __init__(self, sources: RequestSources) -> None:
        self._durations, self._connections, self._exemplars, self._resources = sources
        self._sent: set[Example] = set()

    def collect(self) -> list[ResourceMetrics]:
        """Returns all counts, and the exemplars that the last call did not return."""
        now_unix_ns = time.time_ns()
        # Not by time: a request's record may arrive long after the request ended.
        before, self._sent = self._sent, set()
        by_instance: dict[int, dict[str, list[_Point]]] = {}
        resources = {}
        for each in histograms.histograms_of(self._durations.collect()):
            resources[id(each.resource)] = each.resource
            by_metric = by_instance.setdefault(id(each.resource), {})
            examples = [example for _, example in sorted(self._exemplars.of(each).items())]
            self._sent.update(examples)
            exemplars = [
                Exemplar({}, example.duration_ns / 1e9, example.end_unix_ns, example.span_id, example.trace_id)
                for example in examples
                if example not in before
            ]
            by_metric.setdefault(each.series.metric, []).append(
                _point(each, exemplars, self._durations.start_unix_ns, now_unix_ns)
            )
        metrics = {key: [_metric(*each) for each in by_metric.items()] for key, by_metric in by_instance.items()}
        for nginx, total in self._connections.collect():
            resources[id(nginx)] = nginx
            counts = _counts(total, self._durations.start_unix_ns, now_unix_ns)
            metrics.setdefault(id(nginx), []).extend(counts)
        return [
            ResourceMetrics(
                resource=resource,
                scope_metrics=[ScopeMetrics(_SCOPE, of_instance, SCHEMA_URL)],
                schema_url=resource.schema_url,
            )
            for instance, of_instance in metrics.items()
            for resource in (self._resources.of(resources[instance]),)
        ]


def _counts(total: Total, start_unix_ns: int, now_unix_ns: int) -> list[Metric]:
    return [
        Metric(
            name,
            metric.description,
            metric.unit,
            Sum(
                [NumberDataPoint({}, start_unix_ns, now_unix_ns, value)],
                AggregationTemporality.CUMULATIVE,
                metric.monotonic,
            ),
        )
        for (name, metric), value in zip(CONNECTIONS.items(), total, strict=True)
    ]


def _metric(name: str, points: list[_Point]) -> Metric:
    kind: Any = Histogram if isinstance(points[0], HistogramDataPoint) else ExponentialHistogram
    return Metric(name, METRICS[name].description, METRICS[name].unit, kind(points, AggregationTemporality.CUMULATIVE))


def _point(histogram: histograms.Histogram, exemplars: list[Exemplar], start_unix_ns: int, now_unix_ns: int) -> _Point:
    metric = METRICS[histogram.series.metric]
    common: dict[str, Any] = {
        "attributes": dict(histogram.series.attributes),
        "start_time_unix_nano": start_unix_ns,
        "time_unix_nano": now_unix_ns,
        "count": sum(histogram.buckets),
        "sum": histogram.total / metric.in_unit,
        "min": None,  # not known; optional in the protocol and for the encoder
        "max": None,
        "exemplars": exemplars,
    }
    if histogram.exponential is None:
        return HistogramDataPoint(bucket_counts=histogram.buckets, explicit_bounds=metric.bounds, **common)
    return ExponentialHistogramDataPoint(
        scale=histograms.SCALE,
        zero_count=histogram.zero_count,
        positive=Buckets(*histogram.dense()),
        negative=Buckets(0, []),
        flags=0,
        **common,
    )

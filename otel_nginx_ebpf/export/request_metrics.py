"""Durations of all requests as OpenTelemetry histograms, with exemplars that lead to traces."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv.metrics.http_metrics import HTTP_CLIENT_REQUEST_DURATION, HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.durations import Counts, Measured, RequestDurations, Series
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.record import Request
from otel_nginx_ebpf.series import BOUNDS_S, bucket, of_exchanges, of_request
from otel_nginx_ebpf.trace import AttributeValue

DESCRIPTIONS = {
    HTTP_SERVER_REQUEST_DURATION: "Duration of HTTP server requests.",
    HTTP_CLIENT_REQUEST_DURATION: "Duration of HTTP client requests.",
}
_SCOPE = InstrumentationScope("otel_nginx_ebpf", __version__)

# Of requests of one kind one is an example, once in so many seconds.
_EVERY_S = 1.0
_KEPT = 4096


class Example(NamedTuple):
    """One of a bucket's durations, and the span whose it is."""

    duration_ns: int
    end_unix_ns: int
    trace_id: int
    span_id: int


Spans = Sequence[tuple[int, int, int, Any]]
"""The SERVER span first: start and end in CLOCK_MONOTONIC nanoseconds, id; what follows is not looked at."""


class Exemplars:
    """Of each series and bucket a trace that was kept, not older than need be. One thread offers, any reads."""

    def __init__(self) -> None:
        self._examples: dict[tuple[int, Series], dict[int, Example]] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._since_s = 0.0

    def offer(
        self, request: Request, unix_offset_ns: int, resource: Mapping[str, AttributeValue], spans: Spans
    ) -> None:
        """Takes note of a trace that is on its way to the collector."""
        start, end, span_id, _ = spans[0]
        peer = request.attempts[-1].peer if request.attempts else None
        kind = (id(resource), request.location, request.status, request.method, peer, bucket(end - start))
        if kind in self._seen or len(self._seen) > _KEPT:
            now_s = time.monotonic()
            if now_s - self._since_s < _EVERY_S:
                return
            self._seen.clear()
            self._since_s = now_s
        self._seen.add(kind)
        if len(self._examples) > _KEPT:
            self._examples = {}
        id_of = {(start, end): span_id for start, end, span_id, _ in spans[1:]}
        found = [(of_request(request), start, end, span_id)]
        for series, start, end in of_exchanges(request):
            if (start, end) in id_of:
                found.append((series, start, end, id_of[start, end]))
        for series, start, end, span_id in found:
            examples = self._examples.setdefault((id(resource), series), {})
            examples[bucket(end - start)] = Example(end - start, end + unix_offset_ns, request.trace_id, span_id)

    def of(self, measured: Measured) -> Mapping[int, Example]:
        """By bucket."""
        return self._examples.get((id(measured.resource), measured.series), {}).copy()


class OtlpRequestMetrics:
    """What to send of the requests' metrics."""

    def __init__(self, durations: RequestDurations, exemplars: Exemplars, resources: Resources) -> None:
        self._durations = durations
        self._exemplars = exemplars
        self._resources = resources
        self._sent_unix_ns = 0

    def collect(self) -> list[ResourceMetrics]:
        """All that was counted, and the exemplars since the last call."""
        now_unix_ns = time.time_ns()
        since_unix_ns, self._sent_unix_ns = self._sent_unix_ns, now_unix_ns
        by_instance: dict[int, dict[str, list[HistogramDataPoint]]] = {}
        resources = {}
        for each in self._durations.collect():
            resources[id(each.resource)] = each.resource
            by_metric = by_instance.setdefault(id(each.resource), {})
            exemplars = [
                Exemplar({}, example.duration_ns / 1e9, example.end_unix_ns, example.span_id, example.trace_id)
                for _, example in sorted(self._exemplars.of(each).items())
                if example.end_unix_ns > since_unix_ns
            ]
            by_metric.setdefault(each.series.metric, []).append(
                _point(each.series, each.counts, exemplars, self._durations.start_unix_ns, now_unix_ns)
            )
        return [
            ResourceMetrics(
                resource=self._resources.of(resources[instance]),
                scope_metrics=[ScopeMetrics(_SCOPE, [_metric(*each) for each in by_metric.items()], "")],
                schema_url="",
            )
            for instance, by_metric in by_instance.items()
        ]


def _metric(name: str, points: list[HistogramDataPoint]) -> Metric:
    return Metric(name, DESCRIPTIONS[name], "s", Histogram(points, AggregationTemporality.CUMULATIVE))


def _point(
    series: Series, counts: Counts, exemplars: list[Exemplar], start_unix_ns: int, now_unix_ns: int
) -> HistogramDataPoint:
    sum_ns, *buckets = counts
    return HistogramDataPoint(
        attributes=dict(series.attributes),
        start_time_unix_nano=start_unix_ns,
        time_unix_nano=now_unix_ns,
        count=sum(buckets),
        sum=sum_ns / 1e9,
        bucket_counts=buckets,
        explicit_bounds=BOUNDS_S,
        min=None,  # type: ignore[arg-type]  # not known: optional in the protocol, and to the encoder
        max=None,  # type: ignore[arg-type]
        exemplars=exemplars,
    )

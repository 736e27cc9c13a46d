"""Shows the durations of all requests to a Prometheus server. A separate module, because few users need its imports."""

from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as PrometheusMetric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as PrometheusExemplar

from otel_nginx_ebpf.export.metrics.requests import RequestSources
from otel_nginx_ebpf.metrics.connections import CONNECTIONS
from otel_nginx_ebpf.metrics.exemplars import Example
from otel_nginx_ebpf.metrics.histograms import Histogram, histograms_of
from otel_nginx_ebpf.metrics.series import METRICS, Metric

_UNITS = {"s": "seconds", "By": "bytes"}

# The resource attributes that identify an nginx. Every series has them.
_INSTANCE = (SERVICE_NAME, SERVICE_INSTANCE_ID)


class PrometheusRequestMetrics(Collector):
    """Collects the durations at each scrape. Only servers that accept OpenMetrics get exemplars."""

    def __init__(self, sources: RequestSources) -> None:
        self._durations, self._connections, self._exemplars, self._resources = sources

    def collect(self) -> Iterator[PrometheusMetric]:
        measured = histograms_of(self._durations.collect())
        for name, metric in METRICS.items():
            rows = [(self._labels(each), each) for each in measured if each.series.metric == name]
            keys = list(dict.fromkeys(key for labels, _ in rows for key in labels))
            family = HistogramMetricFamily(
                name.replace(".", "_"),
                metric.description,
                labels=[key.replace(".", "_") for key in keys],
                unit=_UNITS[metric.unit],
            )
            for labels, each in rows:
                values = [labels.get(key, "") for key in keys]
                family.add_metric(values, self._buckets(each, metric), each.total / metric.in_unit)
            yield family
        yield from self._counts()

    def _counts(self) -> Iterator[PrometheusMetric]:
        totals = self._connections.collect()
        for index, (name, metric) in enumerate(CONNECTIONS.items()):
            kind = CounterMetricFamily if metric.monotonic else GaugeMetricFamily
            rows = [(self._instance(resource), total[index]) for resource, total in totals]
            keys = list(dict.fromkeys(key for labels, _ in rows for key in labels))
            family = kind(name.replace(".", "_"), metric.description, labels=[key.replace(".", "_") for key in keys])
            for labels, value in rows:
                family.add_metric([labels.get(key, "") for key in keys], value)
            yield family

    def _instance(self, nginx: Mapping[str, Any]) -> dict[str, str]:
        resource = self._resources.of(nginx).attributes
        return {name: str(resource[name]) for name in _INSTANCE if name in resource}

    def _labels(self, histogram: Histogram) -> dict[str, str]:
        return self._instance(histogram.resource) | {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in histogram.series.attributes
        }

    def _buckets(
        self, histogram: Histogram, metric: Metric
    ) -> list[tuple[str, float] | tuple[str, float, PrometheusExemplar]]:
        examples = self._exemplars.of(histogram)
        buckets: list[tuple[str, float] | tuple[str, float, PrometheusExemplar]] = []
        count = 0
        for index, bound in enumerate([*map(str, metric.bounds), "+Inf"]):
            count += histogram.buckets[index]
            example = examples.get(index)
            buckets.append((bound, count, _exemplar(example)) if example else (bound, count))
        return buckets


def _exemplar(example: Example) -> PrometheusExemplar:
    ids = {"trace_id": f"{example.trace_id:032x}", "span_id": f"{example.span_id:016x}"}
    return PrometheusExemplar(ids, example.duration_ns / 1e9, example.end_unix_ns / 1e9)

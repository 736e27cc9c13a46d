"""Sends metrics of all requests and of the program itself to the collector or to a Prometheus server."""

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.metrics.delivery import MetricDelivery, Ticking
from otel_nginx_ebpf.export.metrics.requests import OtlpRequestMetrics, RequestSources
from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir
from otel_nginx_ebpf.export.resource import SCHEMA_URL, Resources
from otel_nginx_ebpf.metrics.choices import metric_choices_of
from otel_nginx_ebpf.metrics.exemplars import Exemplars
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.losses import INCOMPLETE, LEFT_OUT, LOST, of_kind

# The time limit of the last transmission, at least and at most, in seconds.
_END_MIN_S, _END_MAX_S = 1.0, 5.0
_KEPT_BYTES_MAX = 16 << 20
"""What may wait for the next run, in addition to --queue-dir-mib. A run leaves some 10 KB, with many series 100 KB."""
_SECONDS = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]


class Metrics:
    """Exports metrics until `shutdown`.

    Raises:
        UserError: The listening address cannot be used, or an $OTEL_* variable has a value that the SDK refuses.
    """

    def __init__(self, settings: Settings, stats: Stats, resource: Resource) -> None:
        """Starts the export. `resource` belongs to requests whose nginx is not known."""
        readers: list[MetricReader] = []
        self._ticking: Ticking | None = None
        self.exemplars = Exemplars(metric_choices_of(settings))
        sources = RequestSources(stats.durations, stats.connections, self.exemplars, Resources(resource))
        if settings.metrics:
            self._ticking = _to_collector(settings, OtlpRequestMetrics(sources))
            readers.append(self._ticking)
        if settings.metrics_listen:
            readers.append(_to_prometheus(settings.metrics_listen, sources))
        own = Resource({SERVICE_NAME: "otel-nginx-ebpf", SERVICE_VERSION: __version__}, SCHEMA_URL)
        attributes = OTELResourceDetector().detect().attributes
        said = Resource({name: value for name, value in attributes.items() if name != SERVICE_NAME})
        self._provider = MeterProvider(readers, own.merge(said), shutdown_on_exit=False)
        _measure(self._provider, stats)

    def shutdown(self, timeout_s: float = _END_MAX_S) -> None:
        """Sends the last values. Takes a few seconds at most."""
        timeout_s = min(max(timeout_s, _END_MIN_S), _END_MAX_S)
        # In a thread: the SDK's exporter waits without limit for a collector that does not answer.
        last = threading.Thread(target=self._provider.shutdown, kwargs={"timeout_millis": timeout_s * 1e3}, daemon=True)
        last.start()
        last.join(timeout_s)
        if self._ticking:
            self._ticking.keep_the_rest()


def _to_collector(settings: Settings, requests: OtlpRequestMetrics) -> Ticking:
    kept = QueueDir(settings.queue_dir / "metrics", _KEPT_BYTES_MAX) if settings.queue_dir else None
    delivery = MetricDelivery(settings.otlp_protocol, requests, kept)
    try:
        return Ticking(delivery)
    except Exception as error:  # The SDK raises arbitrary exceptions; a variable of the user is always the cause.
        raise UserError(f"OTEL_METRIC_EXPORT_*: {error}") from error


def _to_prometheus(address: str, sources: RequestSources) -> MetricReader:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import REGISTRY, start_http_server

    from otel_nginx_ebpf.export.metrics.prometheus import PrometheusRequestMetrics

    requests = PrometheusRequestMetrics(sources)

    class WithRequests(PrometheusMetricReader):
        def shutdown(self, timeout_millis: float = 30_000, **options: Any) -> None:
            REGISTRY.unregister(requests)
            super().shutdown(timeout_millis, **options)

    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), host.removeprefix("[").removesuffix("]"))
    except (OSError, OverflowError, UnicodeError) as error:  # the last two: a port over 65535, an invalid host name
        raise UserError(f"--metrics-listen {address}: {getattr(error, 'strerror', error)}") from error
    REGISTRY.register(requests)
    return WithRequests()


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure(provider: MeterProvider, stats: Stats) -> None:
    meter = provider.get_meter("otel_nginx_ebpf", __version__, SCHEMA_URL)

    def causes(kind: tuple[str, ...]) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        return [
            lambda options: [
                Observation(count, {"cause": cause}) for cause, count in of_kind(stats.losses(), kind).items()
            ]
        ]

    def processor_time(options: CallbackOptions) -> Iterable[Observation]:
        times = os.times()
        return [Observation(times.user, {"cpu.mode": "user"}), Observation(times.system, {"cpu.mode": "system"})]

    def probe_hits(options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(hits, {"probe": probe}) for probe, hits in stats.probe_hits.items()]

    def cost(options: CallbackOptions) -> Iterable[Observation]:
        return [] if stats.cost_s is None else [Observation(stats.cost_s)]

    def observed(value: Callable[[], float]) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        return [lambda options: [Observation(value())]]

    prefix = "otel_nginx_ebpf"
    meter.create_observable_counter(f"{prefix}.requests.received", observed(lambda: stats.received), "{request}")
    meter.create_observable_counter(f"{prefix}.requests.exported", observed(lambda: stats.exported), "{request}")
    meter.create_observable_counter(f"{prefix}.requests.lost", causes(LOST), "{request}")
    meter.create_observable_counter(f"{prefix}.requests.left_out", causes(LEFT_OUT), "{request}")
    meter.create_observable_counter(f"{prefix}.requests.incomplete", causes(INCOMPLETE), "{request}")
    if logs := stats.logs:
        log_records = f"{prefix}.log_records"
        meter.create_observable_counter(f"{log_records}.received", observed(lambda: logs.received), "{record}")
        meter.create_observable_counter(f"{log_records}.exported", observed(lambda: logs.exported), "{record}")
        lost = [lambda options: [Observation(n, {"cause": cause}) for cause, n in logs.lost.copy().items()]]
        meter.create_observable_counter(f"{log_records}.lost", lost, "{record}")
        meter.create_observable_gauge(f"{prefix}.queue.log_records", observed(lambda: logs.queued.spans), "{record}")
    both = [stats, *([stats.logs] if stats.logs else [])]
    meter.create_observable_gauge(f"{prefix}.queue.spans", observed(lambda: stats.queued.spans), "{span}")
    meter.create_observable_gauge(
        f"{prefix}.queue.memory", observed(lambda: sum(each.queued.bytes for each in both)), "By"
    )
    meter.create_observable_gauge(
        f"{prefix}.queue.disk", observed(lambda: sum(each.stored_bytes for each in both)), "By"
    )
    meter.create_observable_gauge(f"{prefix}.ring_buffer.fill", observed(lambda: stats.ring_buffer_fill), "1")
    meter.create_observable_gauge(f"{prefix}.probe.hits", [probe_hits], "{hit}/s")
    meter.create_observable_gauge(f"{prefix}.request.cost", [cost], "s")
    meter.create_observable_counter(f"{prefix}.detachments", observed(lambda: stats.detachments), "{detachment}")
    duration = meter.create_histogram(f"{prefix}.export.duration", "s", explicit_bucket_boundaries_advisory=_SECONDS)
    for each in both:
        each.sent = duration.record
    meter.create_observable_counter("process.cpu.time", [processor_time], "s")
    meter.create_observable_up_down_counter("process.memory.usage", observed(_resident_bytes), "By")

"""Delivers metrics to a collector. What it has not accepted at the end waits on disk for the next run."""

import logging
import threading
from typing import Any, cast

from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)

from otel_nginx_ebpf.export.metrics.requests import OtlpRequestMetrics
from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir
from otel_nginx_ebpf.export.otlp.sender import Answer, make_sender
from otel_nginx_ebpf.printable import printable

logger = logging.getLogger(__name__)

_POINTS_MAX = 2000
"""A message of this many points has at most about 2 MiB. A collector's gRPC server accepts 4 MiB by default."""


class MetricDelivery(MetricExporter):
    """Sends the SDK's metrics together with the requests' metrics, which do not come from the SDK's instruments.

    The counts are cumulative, so the last messages have everything of a run. Those of an earlier run are sent before
    the first of this run: in the order of their times.
    """

    def __init__(self, protocol: str, requests: OtlpRequestMetrics, queue_dir: QueueDir | None) -> None:
        self._sender = cast(Any, make_sender(protocol, "metrics"))
        self._sender.report = self._note
        super().__init__(self._sender._preferred_temporality, self._sender._preferred_aggregation)
        self._requests = requests
        self.queue_dir = queue_dir
        self._kept = list(queue_dir.left_behind()) if queue_dir else []
        """What earlier runs left, oldest first."""
        self._lock = threading.Lock()
        """Held while counts are collected."""
        self._closed = self._ended = False
        self.unsent = False
        """Whether the collector has not accepted the last export."""
        self._problem = ""
        self._refused = False

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        with self._lock:
            if self._ended:
                return MetricExportResult.FAILURE
            self.unsent = True
            messages = self._messages_of(metrics_data)
        if not self._send_kept() or any(self._send(message).retry for message in messages):
            return MetricExportResult.FAILURE
        self.unsent = False
        return MetricExportResult.SUCCESS

    def _messages_of(self, metrics_data: MetricsData) -> list[bytes]:
        both = MetricsData([*metrics_data.resource_metrics, *self._requests.collect()])
        messages: list[bytes] = self._sender.messages_of(both, _POINTS_MAX)
        return messages

    def _send_kept(self) -> bool:
        """Sends what earlier runs left. Returns false if the collector does not accept it now."""
        later = []
        while self.queue_dir and self._kept:
            stored = self._kept[0]
            try:
                message = self.queue_dir.load(stored)
            except OSError:
                later.append(self._kept.pop(0))
                continue
            if message is not None:
                if self._send(message).retry:
                    self._kept += later
                    return False
                self.queue_dir.forget(stored)
            self._kept.pop(0)
        self._kept = later
        return True

    def _send(self, message: bytes) -> Answer:
        try:
            answer: Answer = self._sender.send(message)
        except ValueError:  # gRPC raises it when its channel is closed during a call.
            if not self._closed:
                raise
            return Answer(retry=True)
        if not answer.retry and not answer.delivered and not self._refused:
            self._refused = True
            logger.warning("metrics: the collector refuses them: %s", printable(self._problem))
        return answer

    def _note(self, problem: str) -> None:
        self._problem = " ".join(problem.split())

    def keep(self, metrics_data: MetricsData) -> None:
        """Stores the last values for the next run. Nothing is exported from now on."""
        with self._lock:
            self._ended = True
            messages = self._messages_of(metrics_data)
            if self.queue_dir and None in [self.queue_dir.store(message, 0, 0) for message in messages]:
                logger.error("metrics: the last counts of this run are lost: no collector and no room on disk")

    def shutdown(self, timeout_millis: float = 30_000, **options: Any) -> None:
        self._closed = True
        self._sender.shutdown()

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True


class Ticking(PeriodicExportingMetricReader):
    """Collects and exports at intervals and, if there is time, at the end."""

    def __init__(self, delivery: MetricDelivery) -> None:
        self._delivery = delivery
        super().__init__(delivery)

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> None:
        if threading.current_thread() is self._daemon_thread:
            super()._receive_metrics(metrics_data, timeout_millis, **options)
        else:
            self._delivery.keep(metrics_data)

    def keep_the_rest(self) -> None:
        """After `shutdown`: stores the last values if the collector has not accepted them.

        The thread that exports may hang: the SDK cannot interrupt it over HTTP.
        """
        if queue_dir := self._delivery.queue_dir:
            if self._delivery.unsent or (self._daemon_thread and self._daemon_thread.is_alive()):
                self.collect()
            queue_dir.close()

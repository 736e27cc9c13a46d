"""Sends finished messages with the official OTLP exporter over HTTP."""

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.exporter.http.transport._base import BaseHTTPResult, BaseHTTPTransport
from opentelemetry.exporter.otlp.common.http import _extract_retry_after
from requests.exceptions import ChunkedEncodingError

from otel_nginx_ebpf.export.otlp.sender import Answer, Sender, Signal, ignore

# `report` gets what the exporter would log.
logging.getLogger("opentelemetry.exporter.otlp.proto.http").disabled = True

# OTLP specification, "OTLP/HTTP Response". Every other status except success means: do not send the message again.
_RETRYABLE = frozenset({429, 502, 503, 504})


class _Transport(BaseHTTPTransport):
    """Wraps the exporter's own transport and gives its results to the sender."""

    def __init__(self, transport: BaseHTTPTransport, sender: "_HttpSender") -> None:
        self._transport = transport
        self._sender = sender

    def request(self, method: str, url: str, **options: Any) -> BaseHTTPResult:
        result = self._sender.result = self._transport.request(method, url, **options)
        if result.error is not None:
            self._sender.report(str(result.error))
        elif result.status_code is not None and not 200 <= result.status_code < 300:
            self._sender.report(f"HTTP {result.status_code} {result.reason} for {urlsplit(url).path}")
        return result

    def is_connection_error(self, exception: Exception | None) -> bool:
        # The second: the connection broke within the response.
        return self._transport.is_connection_error(exception) or isinstance(exception, ChunkedEncodingError)

    def close(self) -> None:
        self._transport.close()


class _HttpSender:
    """What the senders of all signals have in common. The SDK's exporter of the signal is the next base class."""

    response_type: Any
    rejected: str
    """The member of `partial_success` that counts what the collector rejected."""
    _client: Any
    shutdown: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger(type(self).__mro__[2].__module__).disabled = True
        self.report: Callable[[str], None] = ignore
        self.result: BaseHTTPResult | None = None
        self._client._transport = _Transport(self._client._transport, self)

    def hasten(self) -> None:
        self._client._shutdown_event.set()

    def send(self, message: bytes) -> Answer:
        self.result = None
        self._client.export(message)
        result = self.result
        if result is None:  # the exporter is shut down
            return Answer(retry=True)
        if result.error is not None:
            return Answer(retry=self._client._transport.is_connection_error(result.error))
        status = result.status_code or 0
        # The SDK does not follow a redirect, but treats it as success.
        if 200 <= status < 300:
            return Answer(delivered=True, rejected=self._rejected(result))
        return Answer(retry=status in _RETRYABLE, wait_s=_extract_retry_after(result) or 0)

    def _rejected(self, result: BaseHTTPResult) -> int:
        try:
            response = self.response_type.FromString(result.content())
        except DecodeError:  # the status was 200, so the message is delivered even if the body is damaged
            return 0
        return int(getattr(response.partial_success, self.rejected))


def make(signal: Signal) -> Sender:
    """Makes a `Sender` over HTTP. Imports only what the signal needs."""
    if signal == "traces":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        class TraceSender(_HttpSender, OTLPSpanExporter):
            response_type = ExportTraceServiceResponse
            rejected = "rejected_spans"

        return TraceSender()
    if signal == "metrics":
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter, _split_metrics_data
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

        class MetricSender(_HttpSender, OTLPMetricExporter):
            response_type = ExportMetricsServiceResponse
            rejected = "rejected_data_points"

            def messages_of(self, metrics: Any, points_max: int) -> list[bytes]:
                return [part.SerializeToString() for part in _split_metrics_data(encode_metrics(metrics), points_max)]

        return MetricSender()
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

    class LogSender(_HttpSender, OTLPLogExporter):
        response_type = ExportLogsServiceResponse
        rejected = "rejected_log_records"

    return LogSender()

"""Sends finished messages with the official OTLP exporter over gRPC."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.exporter import OTLPExporterMixin
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from otel_nginx_ebpf.export.otlp.sender import Answer, Sender, Signal, ignore

# OTLP specification, "OTLP/gRPC Response". The SDK's set contains RESOURCE_EXHAUSTED, even if the collector did not ask
# for a retry.
_RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

# `report` gets what the exporter would log.
logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").disabled = True


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    """Returns the delay in seconds that the collector asks for, or None.

    The delay is a RetryInfo of the google.rpc.Status in the trailing metadata.
    """
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            with suppress(DecodeError):  # a damaged Status asks for nothing
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


class _Refusal(grpc.RpcError):  # type: ignore[misc]
    """An error in the form that the SDK reads: it looks for RetryInfo under a different key."""

    def __init__(self, error: grpc.RpcError, retry_delay_s: float | None) -> None:
        self.code: Callable[[], grpc.StatusCode] = error.code
        self.details: Callable[[], str] = error.details
        self.retry_delay_s = retry_delay_s

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        if self.retry_delay_s is None:
            return ()
        info = RetryInfo()
        info.retry_delay.FromNanoseconds(int(self.retry_delay_s * 1e9))
        return (("google.rpc.retryinfo-bin", info.SerializeToString()),)


class _Stub:
    """A stub of a signal's service that takes serialized messages."""

    def __init__(self, channel: grpc.Channel, sender: "_GrpcSender") -> None:
        self._export = channel.unary_unary(
            f"/opentelemetry.proto.collector.{sender.service}/Export",
            request_serializer=None,
            response_deserializer=sender.response_type.FromString,
        )
        self._sender = sender

    def Export(self, request: bytes, metadata: Any, timeout: float) -> None:
        try:
            self._sender.response = self._export(request, metadata=metadata, timeout=timeout)
        except grpc.RpcError as error:
            self._sender.refusal = _Refusal(error, _retry_delay_s(error))
            self._sender.report(f"{error.code().name}: {error.details()}")
            raise self._sender.refusal from error


class _GrpcSender(OTLPExporterMixin[Any, Any, Any, Any]):
    """What the senders of all signals have in common. The SDK's exporter of the signal is the next base class."""

    service: str
    response_type: Any
    rejected: str
    """The member of `partial_success` that counts what the collector rejected."""

    def __init__(self) -> None:
        self.report: Callable[[str], None] = ignore
        self.response: Any = None
        self.refusal: _Refusal | None = None
        super().__init__(retryable_error_codes=_RETRYABLE)  # type: ignore[call-arg]

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        self._client = cast(Any, _Stub(cast(grpc.Channel, self._channel), self))

    def _translate_data(self, data: Any) -> Any:
        return data

    def _count_data(self, data: Any) -> int:
        return 0

    def hasten(self) -> None:
        self._shutdown_in_progress.set()

    def send(self, message: bytes) -> Answer:
        self.response = self.refusal = None
        if self._export(message) is self._result.SUCCESS:
            rejected = getattr(self.response.partial_success, self.rejected) if self.response else 0
            return Answer(delivered=True, rejected=rejected)
        if self.refusal is None:  # the exporter is shut down
            return Answer(retry=True)
        code, delay_s = self.refusal.code(), self.refusal.retry_delay_s
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not self._shutdown:
            # The collector may be gone without having closed the connection. gRPC would keep it for 15 minutes.
            self._channel.close()
            self._initialize_channel_and_stub()
        asked = code is grpc.StatusCode.RESOURCE_EXHAUSTED and delay_s is not None
        return Answer(retry=asked or code in _RETRYABLE, wait_s=delay_s or 0)


class _TraceSender(_GrpcSender, OTLPSpanExporter):
    service = "trace.v1.TraceService"
    response_type = ExportTraceServiceResponse
    rejected = "rejected_spans"


class _LogSender(_GrpcSender, OTLPLogExporter):
    service = "logs.v1.LogsService"
    response_type = ExportLogsServiceResponse
    rejected = "rejected_log_records"


def make(signal: Signal) -> Sender:
    """Makes a `Sender` over gRPC."""
    if signal == "metrics":
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

        class MetricSender(_GrpcSender, OTLPMetricExporter):
            service = "metrics.v1.MetricsService"
            response_type = ExportMetricsServiceResponse
            rejected = "rejected_data_points"

            def messages_of(self, metrics: Any, points_max: int) -> list[bytes]:
                self._max_export_batch_size = points_max
                return [encode_metrics(part).SerializeToString() for part in self._split_metrics_data(metrics)]

        return MetricSender()
    return _TraceSender() if signal == "traces" else _LogSender()

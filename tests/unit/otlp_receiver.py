"""Real OTLP receivers on loopback, over gRPC and HTTP, with the answers that a test chooses."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import (
    LogsServiceServicer,
    add_LogsServiceServicer_to_server,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Later:
    """A refusal that says when to come back: RetryInfo, or the text of Retry-After."""

    refusal: grpc.StatusCode | int
    after: float | str


class Received:
    """What a receiver took, and what it still answers with an error."""

    port: int

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.log_requests: list[ExportLogsServiceRequest] = []
        self.metric_requests: list[ExportMetricsServiceRequest] = []
        self.refusals: list[grpc.StatusCode | int | Later] = []
        """Answers to the next requests, instead of taking them."""
        self.refused_s: list[float] = []
        """When a request was refused, and in `taken_s` taken: time.monotonic()."""
        self.taken_s: list[float] = []
        self.rejected_spans = 0
        self.rejected_log_records = 0
        """What it says of the requests that it takes."""
        self.delay_s = 0.0

    def next_refusal(self) -> grpc.StatusCode | int | Later | None:
        time.sleep(self.delay_s)
        (self.refused_s if self.refusals else self.taken_s).append(time.monotonic())
        return self.refusals.pop(0) if self.refusals else None

    def response(self) -> ExportTraceServiceResponse:
        response = ExportTraceServiceResponse()
        response.partial_success.rejected_spans = self.rejected_spans
        return response

    def logs_response(self) -> ExportLogsServiceResponse:
        response = ExportLogsServiceResponse()
        response.partial_success.rejected_log_records = self.rejected_log_records
        return response

    @property
    def log_records(self) -> list[LogRecord]:
        return [
            record
            for request in self.log_requests
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def roots(self) -> list[Span]:
        return [span for span in self.spans if not span.parent_span_id]

    @property
    def attributes(self) -> list[dict[str, int | str]]:
        """Of the root spans: those that are numbers or text."""
        return [
            {pair.key: pair.value.int_value or pair.value.string_value for pair in span.attributes}
            for span in self.roots
        ]

    @property
    def trace_ids(self) -> list[int]:
        """Of the root spans, in the order in which they came."""
        return [int.from_bytes(span.trace_id, "big") for span in self.roots]


def _retry_info(after_s: float) -> tuple[tuple[str, bytes], ...]:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(int(after_s * 1e9))
    status = Status(code=8)
    status.details.add().Pack(info)
    return (("grpc-status-details-bin", status.SerializeToString()),)


class GrpcReceiver(Received, TraceServiceServicer):
    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        super().__init__()
        self._server = grpc.server(ThreadPoolExecutor(1))
        add_TraceServiceServicer_to_server(self, self._server)
        add_LogsServiceServicer_to_server(_Logs(self), self._server)
        add_MetricsServiceServicer_to_server(_Metrics(self), self._server)
        address = f"127.0.0.1:{port}"
        self.port = (
            self._server.add_secure_port(address, credentials)
            if credentials
            else self._server.add_insecure_port(address)
        )
        self._server.start()

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        self.refuse(context)
        self.requests.append(request)
        return self.response()

    def refuse(self, context: grpc.ServicerContext) -> None:
        """Answers with the next refusal, if there is one: raises an exception."""
        refusal = self.next_refusal()
        if isinstance(refusal, Later):
            context.set_trailing_metadata(_retry_info(float(refusal.after)))
            refusal = refusal.refusal
        if refusal is not None:
            context.abort(refusal, "as the test wants")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()


class _Logs(LogsServiceServicer):
    def __init__(self, receiver: GrpcReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: ExportLogsServiceRequest, context: grpc.ServicerContext) -> ExportLogsServiceResponse:
        self._receiver.refuse(context)
        self._receiver.log_requests.append(request)
        return self._receiver.logs_response()


class _Metrics(MetricsServiceServicer):
    def __init__(self, receiver: GrpcReceiver) -> None:
        self._receiver = receiver

    def Export(
        self, request: ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> ExportMetricsServiceResponse:
        self._receiver.refuse(context)
        self._receiver.metric_requests.append(request)
        return ExportMetricsServiceResponse()


class HttpReceiver(Received):
    body: bytes | None = None
    """What it says to the requests that it takes, instead of OTLP's response."""

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        received = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = self.rfile.read(int(self.headers["content-length"]))
                refusal = received.next_refusal()
                body = b""
                if refusal is None and self.path == "/v1/traces":
                    received.requests.append(ExportTraceServiceRequest.FromString(request))
                    body = received.response().SerializeToString() if received.body is None else received.body
                if refusal is None and self.path == "/v1/logs":
                    received.log_requests.append(ExportLogsServiceRequest.FromString(request))
                    body = received.logs_response().SerializeToString()
                if refusal is None and self.path == "/v1/metrics":
                    received.metric_requests.append(ExportMetricsServiceRequest.FromString(request))
                status = refusal.refusal if isinstance(refusal, Later) else refusal or 200
                assert isinstance(status, int)
                self.send_response(status)
                if isinstance(refusal, Later):
                    self.send_header("retry-after", str(refusal.after))
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

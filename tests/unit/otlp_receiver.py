"""Real OTLP receivers on loopback, over gRPC and HTTP, that answer as a test wants."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Received:
    """What a receiver took, and what it still answers with an error."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.refusals: list[grpc.StatusCode | int] = []
        """Answers to the next requests, instead of taking them."""

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
    def trace_ids(self) -> list[int]:
        """Of the root spans, in the order in which they came."""
        return [int.from_bytes(span.trace_id, "big") for span in self.spans if not span.parent_span_id]


class GrpcReceiver(Received, TraceServiceServicer):
    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self._server = grpc.server(ThreadPoolExecutor(1))
        add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        if self.refusals:
            context.abort(self.refusals.pop(0), "as the test wants")
        self.requests.append(request)
        return ExportTraceServiceResponse()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()


class HttpReceiver(Received):
    def __init__(self) -> None:
        super().__init__()
        received = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = received.refusals.pop(0) if received.refusals else 200
                if status == 200 and self.path == "/v1/traces":
                    received.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

"""Traces to a collector over OTLP, by the official exporters.

The SDK's BatchSpanProcessor drops without counting what does not fit its queue and what one failed export
held; here a batch stays queued until the collector has it.
"""

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.trace import Trace

logger = logging.getLogger(__name__)

_SCOPE = InstrumentationScope("otel_nginx_ebpf", __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_RETRY_FIRST_S = 0.5
_RETRY_MAX_S = 5.0
_SIGNAL_S = 0.1
"""How long the caller sleeps at most. The kernel may give a signal to one of gRPC's threads; Python's handler then
runs only when the main thread wakes by itself."""
_ABORT_S = 1.0
"""How long the SDK's exporter gets to notice that its shutdown interrupts an export."""

# gRPC's exporter would log a traceback and go on without the file, HTTP's would fail at every export.
_FILE_VARIABLES = [
    f"OTEL_EXPORTER_OTLP_{signal}{file}"
    for signal in ("TRACES_", "")
    for file in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
]

# What the protocol's specification says to retry; every other answer refuses the batch for good.
_RETRYABLE_HTTP = {429, 502, 503, 504}
_RETRYABLE_GRPC = {
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNAVAILABLE",
    "DATA_LOSS",
}


def to_readable_spans(trace: Trace, resource: Resource) -> list[ReadableSpan]:
    """The SDK's view of a trace, every span sampled."""

    def context(span_id: int) -> SpanContext:
        return SpanContext(trace.trace_id, span_id, is_remote=False, trace_flags=_SAMPLED)

    return [
        ReadableSpan(
            name=span.name,
            context=context(span.span_id),
            parent=None if span.parent_span_id is None else context(span.parent_span_id),
            resource=resource,
            attributes=span.attributes,
            kind=span.kind,
            status=Status() if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_unix_ns,
            end_time=span.end_unix_ns,
            instrumentation_scope=_SCOPE,
        )
        for span in trace.spans
    ]


def make_sdk_exporter(protocol: str) -> SpanExporter:
    """The official exporter for `grpc` or `http/protobuf`, configured by the $OTEL_EXPORTER_OTLP_* variables.

    Raises:
        UserError: One of them has a value that the exporter refuses, or names a file that cannot be read.
    """
    for variable in _FILE_VARIABLES:
        path = os.environ.get(variable)
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{variable}: cannot read the file {path}")
    # gRPC's C library reports each lost connection on stderr by itself; we say it in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return GrpcExporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    except Exception as error:  # Whatever the SDK raises here, a variable of the user's is the cause.
        raise UserError(f"OTEL_EXPORTER_OTLP_* for {protocol}: {error}") from error


class _ExporterLog(logging.Handler):
    """Listens to what the SDK's exporters log: the only place where they tell why an export failed.

    The first failure goes on to our own log in one line, the rest of an outage is silent.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failing = False
        self.refused = False
        for name in (
            "opentelemetry.exporter.otlp.proto.grpc.exporter",
            "opentelemetry.exporter.otlp.proto.http",
        ):
            sdk_logger = logging.getLogger(name)
            sdk_logger.propagate = False
            sdk_logger.handlers = [self]
            # Its DuplicateFilter would hide the second of two equal answers from us.
            sdk_logger.filters = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        arguments = record.args if isinstance(record.args, tuple) else ()
        if record.levelno >= logging.ERROR:
            self.refused = "larger than max" in message or any(map(_refuses, arguments))
        if not self.failing:
            self.failing = True
            logger.warning("collector: %s", " ".join(message.split()))


def _refuses(argument: object) -> bool:
    if isinstance(argument, Enum):  # grpc.StatusCode
        return argument.name not in _RETRYABLE_GRPC
    return isinstance(argument, int) and argument not in _RETRYABLE_HTTP


class OtlpExporter:
    """A bounded queue of traces, and a thread that brings them to the collector.

    A trace is kept whole or dropped whole, and stays in the queue until it is delivered or refused.
    """

    def __init__(
        self,
        sdk_exporter: SpanExporter,
        resource: Resource,
        stats: Stats,
        *,
        queue_spans: int,
        batch_spans: int,
        delay_s: float,
        wait_for_room: bool = False,
    ) -> None:
        """With `wait_for_room` a full queue makes `export` wait, else it drops the trace."""
        self._sdk_exporter = sdk_exporter
        self._resources = Resources(resource)
        self._stats = stats
        self._queue_spans = queue_spans
        self._batch_spans = batch_spans
        self._delay_s = delay_s
        self._wait_for_room = wait_for_room
        self._log = _ExporterLog()
        self._changed = threading.Condition()
        """Guards all below."""
        self._queue: deque[Trace] = deque()
        self._queued_spans = 0
        self._send_now = False
        self._closing = False
        self._abandoned = False
        self._worker = threading.Thread(target=self._work, name="otlp-export", daemon=True)
        self._worker.start()

    def export(self, trace: Trace) -> None:
        with self._changed:
            if not self._has_room(trace):
                self._send_now = True
                self._changed.notify_all()
                while self._wait_for_room and self._queue and not self._has_room(trace):
                    self._changed.wait(_SIGNAL_S)
            if not self._has_room(trace):
                self._stats.lose("lost_queue_full")
                return
            self._queue.append(trace)
            self._queued_spans += len(trace.spans)
            if self._queued_spans >= self._batch_spans or len(self._queue) == 1:
                self._changed.notify_all()

    def _has_room(self, trace: Trace) -> bool:
        return self._queued_spans + len(trace.spans) <= self._queue_spans

    def shutdown(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        try:
            while self._worker.is_alive() and time.monotonic() < deadline_s:
                self._worker.join(_SIGNAL_S)
        finally:
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
            self._sdk_exporter.shutdown()
            self._worker.join(_ABORT_S)
            with self._changed:
                if self._queue:
                    self._stats.lose("lost_export_failed", len(self._queue))
                    self._queue.clear()

    def _work(self) -> None:
        retry_s = _RETRY_FIRST_S
        while batch := self._next_batch():
            spans = [span for trace in batch for span in to_readable_spans(trace, self._resources.of(trace))]
            self._log.refused = False
            delivered = self._export(spans)
            if delivered or self._log.refused:
                self._done(batch, delivered)
                retry_s = _RETRY_FIRST_S
            else:
                with self._changed:
                    self._send_now = True  # The batch has waited for its delay.
                    self._changed.wait_for(lambda: self._abandoned, retry_s * random.uniform(0.8, 1.2))
                retry_s = min(retry_s * 2, _RETRY_MAX_S)

    def _next_batch(self) -> list[Trace]:
        """The oldest traces, left in the queue; waits until they fill a batch or have waited long enough.

        Empty at the end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(self._due, self._delay_s)
            batch: list[Trace] = []
            if self._abandoned:
                return batch
            spans = 0
            for trace in self._queue:
                spans += len(trace.spans)
                if batch and spans > self._batch_spans:
                    break
                batch.append(trace)
            self._send_now = self._send_now and len(batch) < len(self._queue)
            return batch

    def _due(self) -> bool:
        return self._queued_spans >= self._batch_spans or self._send_now or self._closing

    def _export(self, spans: Sequence[ReadableSpan]) -> bool:
        try:
            delivered = self._sdk_exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:
            if self._abandoned:  # gRPC raises ValueError when its channel is closed under it.
                return False
            # The thread must live: an exporter that raises loses this batch, and says so.
            logger.exception("collector: the exporter failed on a batch of %d spans", len(spans))
            self._log.refused = True
            return False
        if delivered and self._log.failing:
            self._log.failing = False
            logger.warning("collector: delivering again, %d spans queued", self._queued_spans)
        return delivered

    def _done(self, batch: Sequence[Trace], delivered: bool) -> None:
        with self._changed:
            if not self._queue:  # Counted as lost already: the answer came after shutdown gave up.
                return
            for trace in batch:
                self._queue.popleft()
                self._queued_spans -= len(trace.spans)
            self._changed.notify_all()
            if delivered:
                self._stats.exported += len(batch)
            else:
                self._stats.lose("lost_export_refused", len(batch))

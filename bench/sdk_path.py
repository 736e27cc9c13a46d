"""Sends a capture's traces through the SDK: `Tracer`, `BatchSpanProcessor`, the official exporter over gRPC.

OTEL_EXPORTER_OTLP_ENDPOINT=… python -m bench.sdk_path FILE
"""

import sys
from pathlib import Path

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from bench.stages import RESOURCE, decoded, made_by_sdk, readable
from otel_nginx_ebpf.traces.capture import read_capture
from otel_nginx_ebpf.traces.spans import RandomIds

_CHUNK = 200

if __name__ == "__main__":
    frames = list(read_capture(Path(sys.argv[1])))
    provider = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    # The processor drops spans if its queue is full. This queue has room for all spans.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), max_queue_size=50 * len(frames) + 512))
    tracer = provider.get_tracer("otel_nginx_ebpf")
    ids = RandomIds()
    for start in range(0, len(frames), _CHUNK):
        made_by_sdk(readable(decoded(frames[start : start + _CHUNK]), ids), tracer)
    provider.shutdown()

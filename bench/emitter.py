"""Measures the program's speed from a capture to a real collector on loopback, and the SDK's speed in comparison."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from collector.process import official
from e2e.agent_process import PROGRAM
from e2e.nginx_server import free_ports
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bench import stages
from bench.figures import summary
from bench.machine import NGINX_CPU
from otel_nginx_ebpf.export.otlp.encoding import Encoder
from otel_nginx_ebpf.export.otlp.records import RecordEncoder
from otel_nginx_ebpf.traces.capture import CaptureWriter, read_capture
from otel_nginx_ebpf.traces.spans import RandomIds

COUNTING_COLLECTOR = """
receivers:
  otlp: {{ protocols: {{ grpc: {{ endpoint: "127.0.0.1:{port}" }} }} }}
exporters:
  debug: {{ verbosity: basic, use_internal_logger: false }}
service:
  telemetry: {{ metrics: {{ level: none }} }}
  pipelines:
    traces: {{ receivers: [otlp], exporters: [debug] }}
"""
"""The debug exporter counts spans: it writes a line for each message, with the number of spans."""

START_RECORDS = 2_000
"""The time of a run with this many records is subtracted from each run's time: Python's start and imports."""
SDK_RECORDS = 20_000
"""The SDK is much slower, so it gets fewer records."""
_STAGE_RECORDS = 5_000
_ALLOCATION_RECORDS = 500


class Cost(NamedTuple):
    cpu_s: float
    wall_s: float


def cut(capture: Path, records: int) -> Path:
    """Copy the first `records` records to a new file beside the capture; return the new file."""
    path = capture.with_name(f"{capture.name}-{records}")
    with CaptureWriter(path, {}) as writer:
        for frame in islice(read_capture(capture), records):
            writer.append(frame.unix_offset_ns, frame.raw)
    return path


def _run(command: list[str | Path], port: int) -> Cost:
    """Run a command on one processor; the collector has the others. Raise RuntimeError if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    start_s = time.monotonic()
    process = subprocess.Popen(
        ["taskset", "--cpu-list", str(NGINX_CPU), *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or ("exported" in messages and "lost 0" not in messages):
        raise RuntimeError(f"{command} ended with {process.returncode}: {messages}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - start_s)


def to_collector(
    capture: Path, records: int, rounds: int, base: Path | None, advance: Callable[[str], None]
) -> dict[str, Any]:
    """Measure requests/s on one processor, the program and the SDK in turn, and count the collector's spans.

    `base` is the program of another checkout, to compare with.
    """
    replay = ["replay", "--exporter", "otlp"]
    ways: dict[str, tuple[list[str | Path], int]] = {"program": ([PROGRAM, *replay], records)}
    if base is not None:
        ways["base"] = ([base, *replay], records)
    ways["sdk"] = ([sys.executable, "-m", "bench.sdk_path"], min(SDK_RECORDS, records))
    captures = {count: cut(capture, count) for count in {START_RECORDS, *(count for _, count in ways.values())}}
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    received: dict[str, int] = {}
    for number in range(rounds):
        for way, (command, count) in ways.items():
            advance(f"round {number + 1}, {way}: {count} records to a collector")
            (port,) = free_ports(1)
            collector = official(COUNTING_COLLECTOR.format(port=port), [port], capture.parent)
            try:
                start = _run([*command, captures[START_RECORDS]], port)
                whole = _run([*command, captures[count]], port)
            finally:
                collector.stop()
            spans = spans_received(collector.log())
            if received.setdefault(way, spans) != spans:
                raise RuntimeError(f"{way}: the collector has {spans} spans, and had {received[way]} before")
            costs[way].append(Cost(whole.cpu_s - start.cpu_s, whole.wall_s - start.wall_s))
    return {
        way: {
            "records": count,
            "spans_received": received[way],
            "cpu_us_a_request": summary([each.cpu_s * 1e6 / (count - START_RECORDS) for each in costs[way]]),
            "requests_a_cpu_second": summary([(count - START_RECORDS) / each.cpu_s for each in costs[way]]),
            "requests_a_second": summary([(count - START_RECORDS) / each.wall_s for each in costs[way]]),
        }
        for way, (_, count) in ways.items()
    }


def spans_received(log: str) -> int:
    """Return how many spans the collector received, from the lines of its debug exporter."""
    return sum(map(int, re.findall(r'"spans": (\d+)', log)))


def each_stage(capture: Path, rounds: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measure processor time, bytes and allocations of each stage, for a request."""
    frames = list(islice(read_capture(capture), _STAGE_RECORDS))
    count = len(frames)
    requests = stages.decoded(frames)
    ids = RandomIds(random.Random(1))
    encoder = Encoder(ids.generate_span_id)
    traces = stages.readable(requests, ids)

    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=stages.RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("otel_nginx_ebpf")

    def sdk_spans() -> None:
        kept.clear()
        stages.made_by_sdk(traces, tracer)

    records = RecordEncoder(encoder)
    ways: dict[str, Callable[[], Any]] = {
        "record to OTLP": lambda: stages.taken(frames, records),
        "decode": lambda: stages.decoded(frames),
        "decoded to OTLP": lambda: stages.encoded(requests, encoder),
        "readable trace": lambda: stages.readable(requests, ids),
        "SDK: spans by Tracer": sdk_spans,
        "SDK: OTLP": lambda: encode_spans(kept.get_finished_spans()).SerializeToString(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, stage in ways.items():
            advance(f"round {number + 1}, stage: {name}")
            times[name].append(stages.cpu_us_each(stage, count))
    sdk_bytes = len(encode_spans(kept.get_finished_spans()).SerializeToString())

    few = _ALLOCATION_RECORDS
    del frames[few:], requests[few:], traces[few:]
    advance("allocations")
    return {
        "records": count,
        "cpu_us_a_request": {name: summary(values) for name, values in times.items()},
        "record_bytes_a_request": sum(len(frame.raw) for frame in islice(read_capture(capture), count)) / count,
        "otlp_bytes_a_request": {
            "program": sum(
                map(len, stages.encoded(stages.decoded(list(islice(read_capture(capture), count))), encoder))
            )
            / count,
            "sdk": sdk_bytes / count,
        },
        "spans_a_request": len(kept.get_finished_spans()) / count,
        "allocations_a_request": {name: stages.allocations_each(stage, few) for name, stage in ways.items()},
    }

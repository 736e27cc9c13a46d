"""Which spans become examples of which durations."""

from dataclasses import replace

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.emitter.exporters import _Readable
from otel_nginx_ebpf.export.interface import TraceExporter
from otel_nginx_ebpf.export.metrics.requests import OtlpRequestMetrics, RequestSources
from otel_nginx_ebpf.export.otlp.encoding import Encoder
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.metrics.choices import DEFAULT_CHOICES
from otel_nginx_ebpf.metrics.connections import ConnectionCounts
from otel_nginx_ebpf.metrics.exemplars import Exemplars
from otel_nginx_ebpf.metrics.histograms import Histogram
from otel_nginx_ebpf.metrics.series import BOUNDS_S, bucket, of_phase
from otel_nginx_ebpf.metrics.totals import Measured, RequestDurations
from otel_nginx_ebpf.traces.model import AttributeValue, Trace
from otel_nginx_ebpf.traces.phases import REQUEST, UPSTREAM_CONNECT, UPSTREAM_EXCHANGE, phases_of
from otel_nginx_ebpf.traces.record import Request, decode
from unit.sample_traces import RETRIED, UNIX_OFFSET_NS

RESOURCE: dict[str, AttributeValue] = {"service.name": "nginx"}


def with_two_attempts_at_once() -> Request:
    retried = decode(RETRIED)
    live = replace(retried.attempts[1], connect_ms=0, header_ms=9)
    return replace(retried, attempts=(live, replace(live, peer="127.0.0.1:9000")))


def found(exemplars: Exemplars, request: Request) -> dict[str, tuple[int, int]]:
    """By peer, or for the request: the span's id and end."""
    examples = {}
    for phase in phases_of(request):
        start_mono_ns, end_mono_ns, kind, number, error = phase
        series = of_phase(request, phase, DEFAULT_CHOICES)
        failed = kind == UPSTREAM_CONNECT and error is not None
        assert (series is not None) == (failed or kind in (REQUEST, UPSTREAM_EXCHANGE))
        if series is not None:
            of_buckets = exemplars.of(Histogram(RESOURCE, series))
            example = of_buckets[bucket(end_mono_ns - start_mono_ns)]
            assert (example.duration_ns, example.trace_id) == (end_mono_ns - start_mono_ns, request.trace_id)
            name = request.attempts[number - 1].peer if number else None
            examples[name or REQUEST] = example.span_id, example.end_unix_ns
    return examples


def test_exchanges_of_the_same_times_are_told_apart() -> None:
    exemplars, request, ids = Exemplars(), with_two_attempts_at_once(), iter(range(1, 100))
    _, spans = Encoder(ids.__next__).encode(request, UNIX_OFFSET_NS)
    exemplars.add(request, UNIX_OFFSET_NS, RESOURCE, spans)
    expected = {
        request.attempts[phase[3] - 1].peer if phase[3] else REQUEST: (span_id, phase[1] + UNIX_OFFSET_NS)
        for phase, span_id, _ in spans
        if phase[2] in (REQUEST, UPSTREAM_EXCHANGE)
    }
    assert found(exemplars, request) == expected
    assert len(expected) == 3


def test_a_kind_that_had_an_example_wants_none() -> None:
    exemplars, request, ids = Exemplars(), with_two_attempts_at_once(), iter(range(1, 100))
    _, spans = Encoder(ids.__next__).encode(request, UNIX_OFFSET_NS)
    assert [exemplars.wants(request, RESOURCE, spans) for _ in range(2)] == [True, False]
    assert exemplars.wants(replace(request, location="/other"), RESOURCE, spans)


def test_readable_traces_offer_the_same() -> None:
    class Kept(TraceExporter):
        def export(self, trace: Trace) -> None:
            self.trace = trace

        def shutdown(self, timeout_s: float) -> None: ...

    exemplars, request, kept = Exemplars(), with_two_attempts_at_once(), Kept()
    _Readable([kept], exemplars=exemplars).take([(request, UNIX_OFFSET_NS, RESOURCE)])
    server, *others = kept.trace.spans
    expected = {REQUEST: (server.span_id, server.end_unix_ns)} | {
        span.attributes["nginx.upstream.peer"]: (span.span_id, span.end_unix_ns)
        for span in others
        if span.name == UPSTREAM_EXCHANGE
    }
    assert found(exemplars, request) == expected


class OneSeries(RequestDurations):
    """The requests of one series, without a kernel that counts them."""

    def __init__(self, measured: Measured) -> None:
        super().__init__()
        self.measured = measured

    def collect(self) -> list[Measured]:
        return [self.measured]


def test_each_is_sent_once_however_late_its_record_comes() -> None:
    exemplars, request = Exemplars(), with_two_attempts_at_once()
    _, spans = Encoder(iter(range(1, 100)).__next__).encode(request, UNIX_OFFSET_NS)
    series = of_phase(request, spans[0][0], DEFAULT_CHOICES)
    assert series is not None
    durations = OneSeries(Measured(RESOURCE, series, (1, 1, *[0] * len(BOUNDS_S))))
    metrics = OtlpRequestMetrics(RequestSources(durations, ConnectionCounts(), exemplars, Resources(Resource.create())))

    def sent() -> list[int]:
        (of_nginx,) = metrics.collect()
        (point,) = of_nginx.scope_metrics[0].metrics[0].data.data_points
        return [exemplar.trace_id for exemplar in point.exemplars]

    assert sent() == []
    # The request ended years ago.
    exemplars.add(request, UNIX_OFFSET_NS, RESOURCE, spans)
    assert [sent(), sent()] == [[request.trace_id], []]

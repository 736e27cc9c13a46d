"""Traces that were kept, as examples of request durations."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from otel_nginx_ebpf.metrics.choices import DEFAULT_CHOICES, MetricChoices
from otel_nginx_ebpf.metrics.histograms import Histogram
from otel_nginx_ebpf.metrics.series import bucket, of_phase
from otel_nginx_ebpf.metrics.totals import Series
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.phases import Phase
from otel_nginx_ebpf.traces.record import Request

# Of all requests of one kind, one request in about this many seconds becomes an example.
_EVERY_S = 1.0
_KEPT = 4096


class Example(NamedTuple):
    """One duration in a bucket, and the span that has this duration."""

    duration_ns: int
    end_unix_ns: int
    trace_id: int
    span_id: int


Spans = Sequence[tuple[Phase, int, Any]]
"""Phases and the ids of their spans, the request's phase first. The third element of a tuple is not used."""


class Exemplars:
    """For each series and bucket, a recent trace that was kept. One thread offers traces; any thread may read them."""

    def __init__(self, choices: MetricChoices = DEFAULT_CHOICES) -> None:
        self._choices = choices
        self._examples: dict[tuple[int, Series], dict[int, Example]] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._since_s = time.monotonic()

    def wants(self, request: Request, resource: Mapping[str, AttributeValue], spans: Spans) -> bool:
        """Tells whether a trace should become an example: its kind had none recently.

        Of `request`, only what names its series is read: location, status, method, cache status and peer.
        """
        start_mono_ns, end_mono_ns, *_ = spans[0][0]
        peer = request.attempts[-1].peer if request.attempts else None
        kind = (
            id(resource),
            request.location,
            request.status,
            request.method,
            request.cache_status,
            peer,
            bucket(end_mono_ns - start_mono_ns),
        )
        if kind in self._seen or len(self._seen) > _KEPT:
            now_s = time.monotonic()
            if now_s - self._since_s < _EVERY_S:
                return False
            self._seen.clear()
            self._since_s = now_s
        self._seen.add(kind)
        return True

    def add(self, request: Request, unix_offset_ns: int, resource: Mapping[str, AttributeValue], spans: Spans) -> None:
        """Makes examples of a trace that is on its way to the collector."""
        if len(self._examples) > _KEPT:
            self._examples = {}
        for phase, span_id, _ in spans:
            series = of_phase(request, phase, self._choices)
            if series is None:
                continue
            start_mono_ns, end_mono_ns, *_ = phase
            duration_ns = end_mono_ns - start_mono_ns
            self._examples.setdefault((id(resource), series), {})[bucket(duration_ns)] = Example(
                duration_ns, end_mono_ns + unix_offset_ns, request.trace_id, span_id
            )

    def of(self, histogram: Histogram) -> Mapping[int, Example]:
        """Returns the examples of a series by the conventions' bucket."""
        return self._examples.get((id(histogram.resource), histogram.series), {}).copy()

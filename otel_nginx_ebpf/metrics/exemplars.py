"""Traces that were kept, as examples of the requests' durations."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from otel_nginx_ebpf.metrics.series import bucket, of_exchanges, of_request
from otel_nginx_ebpf.metrics.totals import Measured, Series
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.record import Request

# Of requests of one kind one is an example, once in so many seconds.
_EVERY_S = 1.0
_KEPT = 4096


class Example(NamedTuple):
    """One of a bucket's durations, and the span whose it is."""

    duration_ns: int
    end_unix_ns: int
    trace_id: int
    span_id: int


Spans = Sequence[tuple[int, int, int, Any]]
"""The SERVER span first: start and end in CLOCK_MONOTONIC nanoseconds, id; what follows is not looked at."""


class Exemplars:
    """Of each series and bucket a trace that was kept, not older than need be. One thread offers, any reads."""

    def __init__(self) -> None:
        self._examples: dict[tuple[int, Series], dict[int, Example]] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._since_s = 0.0

    def offer(
        self, request: Request, unix_offset_ns: int, resource: Mapping[str, AttributeValue], spans: Spans
    ) -> None:
        """Takes note of a trace that is on its way to the collector."""
        start, end, span_id, _ = spans[0]
        peer = request.attempts[-1].peer if request.attempts else None
        kind = (id(resource), request.location, request.status, request.method, peer, bucket(end - start))
        if kind in self._seen or len(self._seen) > _KEPT:
            now_s = time.monotonic()
            if now_s - self._since_s < _EVERY_S:
                return
            self._seen.clear()
            self._since_s = now_s
        self._seen.add(kind)
        if len(self._examples) > _KEPT:
            self._examples = {}
        id_of = {(start, end): span_id for start, end, span_id, _ in spans[1:]}
        found = [(of_request(request), start, end, span_id)]
        for series, start, end in of_exchanges(request):
            if (start, end) in id_of:
                found.append((series, start, end, id_of[start, end]))
        for series, start, end, span_id in found:
            examples = self._examples.setdefault((id(resource), series), {})
            examples[bucket(end - start)] = Example(end - start, end + unix_offset_ns, request.trace_id, span_id)

    def of(self, measured: Measured) -> Mapping[int, Example]:
        """By bucket."""
        return self._examples.get((id(measured.resource), measured.series), {}).copy()

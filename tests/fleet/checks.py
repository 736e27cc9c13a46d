"""Compares what the backends of a fleet have with what nginx logged."""

from collections import Counter
from typing import Any

from e2e.jaeger_backend import Jaeger
from e2e.nginx_server import LogLine
from e2e.oracle import logged_attempts

SLOW_S = 0.5
"""The threshold of examples/collector/tail-sampling.yaml."""

JaegerTraces = dict[str, list[dict[str, Any]]]
"""The spans of each trace, by trace id, in the form of Jaeger's API."""


def stored(jaeger: Jaeger, service: str) -> JaegerTraces:
    """Return all traces that Jaeger has of a service."""
    found = jaeger.ask("/api/traces", service=service, limit=jaeger.traces_max) or []
    return {each["traceID"]: each["spans"] for each in found}


def is_error(line: LogLine) -> bool:
    """Whether a span of the request is an error: nginx's answer or a peer's, or a peer that did not answer."""
    statuses = [each.status for each in logged_attempts(line)]
    return int(line["status"]) >= 500 or any(int(status) >= 400 for status in statuses)


def is_kept(line: LogLine) -> bool:
    """Whether the sampler must keep the request's trace."""
    return is_error(line) or float(line["request_time"]) > SLOW_S


def faults_of(line: LogLine, spans: list[dict[str, Any]]) -> list[str]:
    """Return what a trace in Jaeger lacks, or has twice, of what nginx logged."""
    names = Counter(span["operationName"] for span in spans)
    children = {"downstream read", "upstream connect", "upstream exchange", "downstream write"}
    (server,) = names.keys() - children
    # nginx gives a peer that refused the status 502 and sent it nothing.
    attempts = logged_attempts(line)
    exchanges = sum(each.bytes_sent != "0" for each in attempts)
    found = []
    if len({span["spanID"] for span in spans}) != len(spans) or names[server] != 1:
        found.append("a span is there twice")
    if names["upstream exchange"] != exchanges:
        found.append(f"{names['upstream exchange']} exchanges instead of {exchanges}")
    if names["downstream read"] != 1 or names["downstream write"] != 1:
        found.append("a phase is not there once")
    failed = sum(_has_failed(span) for span in spans if span["operationName"] == "upstream connect")
    if failed != len(attempts) - exchanges:
        found.append(f"{failed} failed connects instead of {len(attempts) - exchanges}")
    root = next(span["spanID"] for span in spans if span["operationName"] == server)
    if any(each["spanID"] != root for span in spans for each in span["references"] if span["operationName"] != server):
        found.append("a span is elsewhere in the tree")
    return [f"{line['message']}: {fault}" for fault in found]


def _has_failed(span: dict[str, Any]) -> bool:
    return any(tag["key"] == "otel.status_code" and tag["value"] == "ERROR" for tag in span["tags"])

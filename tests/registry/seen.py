"""Collects what is wrong with the spans, metrics and resources that tests read of real programs.

The readers (`e2e.agent_process`, `collector.process`) show everything to this module. A fixture of tests/conftest.py
fails a test whose data have findings.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from registry.checker import check_labels, check_metric, check_program, check_resource, check_span

# Resource attributes that tests, or the collectors of tests, add: users may name any.
_SAID = frozenset({"deployment.environment.name", "relay", "tier"})

_findings: Counter[str] = Counter()


class Span(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...


def trace(resource: Mapping[str, Any], spans: Iterable[Span]) -> None:
    _findings.update(f"resource: {each}" for each in check_resource(resource, _SAID))
    for span in spans:
        found = check_span(span.kind, span.name, span.status, span.attributes)
        if found:
            _findings.update(f"{span.kind} {span.name!r} {dict(span.attributes)}: {each}" for each in found)


def metric(
    resource: Mapping[str, Any], name: str, instrument: str, unit: str, points: Iterable[Mapping[str, Any]]
) -> None:
    if resource.get("service.name") == "otel-nginx-ebpf":
        _findings.update(f"resource of the program: {each}" for each in check_program(resource))
    else:
        _findings.update(f"resource: {each}" for each in check_resource(resource, _SAID))
    _findings.update(check_metric(name, instrument, unit, points))


def labels(family: str, names: Iterable[str]) -> None:
    """Shows a family of Prometheus metrics."""
    _findings.update(check_labels(family, names))


def schema(wanted: str, *urls: str) -> None:
    _findings.update(f"schema_url {url!r}, not {wanted!r}" for url in urls if url != wanted)


def take() -> list[str]:
    """Returns the findings since the last call, each once, with the number of times."""
    found = [f"{count} times {text}" for text, count in _findings.items()]
    _findings.clear()
    return found

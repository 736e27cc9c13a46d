"""Collects what is wrong with the spans, metrics and resources that tests read of real programs.

The readers (`e2e.agent_process`, `collector.process`) show everything to this module. A fixture of tests/conftest.py
fails a test whose data have findings.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from registry.checker import (
    check_event,
    check_labels,
    check_metric,
    check_program,
    check_resource,
    check_span,
    span_group,
)
from registry.reader import declaration, own

# Attributes that tests, or the collectors of tests, add to resources, or rules to spans: users may name any.
_SAID = frozenset({"deployment.environment.name", "relay", "rule", "tier"})

_ACCESS_LOG = own().groups["event.nginx.access_log"].attributes

_findings: Counter[str] = Counter()
_examples: dict[str, str] = {}
"""By finding, the attributes of the first span that had it."""
_told: Counter[tuple[str, str]] = Counter()
"""How often a group of our registry was seen with an attribute."""
_excused: Counter[str] = Counter()
_last_resource: Mapping[str, Any] | None = None


class Event(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...


class Span(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...
    @property
    def events(self) -> Sequence[Event]: ...


def _resource(attributes: Mapping[str, Any]) -> None:
    global _last_resource
    if attributes != _last_resource:  # thousands of traces in a row have one
        _last_resource = attributes
        _findings.update(f"resource: {each}" for each in check_resource(attributes, _SAID))
        _told.update(("entity.nginx", name) for name in attributes)


def trace(resource: Mapping[str, Any], spans: Iterable[Span]) -> None:
    _resource(resource)
    excused: list[str] = []
    for span in spans:
        group = span_group(span.kind, span.name) or ""
        facts = {name: value for name, value in span.attributes.items() if name not in _SAID}
        _told.update((group, name) for name in facts)
        found = check_span(span.kind, span.name, span.status, facts, excused)
        for each in found:
            text = f"{span.kind} {span.name!r}: {each}" if span.kind != "SERVER" else f"SERVER: {each}"
            _findings[text] += 1
            _examples.setdefault(text, str(dict(span.attributes)))
        for event in span.events:
            _told.update((f"event.{event.name}", name) for name in event.attributes)
            _findings.update(f"event {event.name!r}: {each}" for each in check_event(event.name, event.attributes))
    _excused.update(excused)


def log_record(resource: Mapping[str, Any], name: str, attributes: Mapping[str, Any]) -> None:
    """Takes a log record of our registry's event `name`.

    The record of a line says two of the event's attributes otherwise; that of a request also has what SERVER has.
    """
    _resource(resource)
    if name == "nginx.access_log":
        of_event = {each: value for each, value in attributes.items() if each in _ACCESS_LOG}
        server = {each: value for each, value in attributes.items() if each not in of_event}
        status = "ERROR" if "error.type" in server else "UNSET"
        found = [*check_event(name, of_event), *check_span("SERVER", "", status, server)]
        _findings.update(f"log record {name!r}: {each}" for each in found)
        _told.update((f"event.{name}", each) for each in of_event)
        return
    said = {"log.severity": "error", "nginx.error.message": ""}
    _findings.update(f"log record {name!r}: {each}" for each in check_event(name, {**said, **attributes}))
    _findings.update(f"log record {name!r}: has {each}" for each in said if each in attributes)


def metric(
    resource: Mapping[str, Any], name: str, instrument: str, unit: str, points: Iterable[Mapping[str, Any]]
) -> None:
    points = list(points)
    group = next((each.id for each in own().of_type("metric") if each.name == name), "")
    _told.update((group, attribute) for point in points for attribute in point)
    if resource.get("service.name") == "otel-nginx-ebpf":
        _findings.update(f"resource of the program: {each}" for each in check_program(resource))
    else:
        _resource(resource)
    _findings.update(check_metric(name, instrument, unit, points))


def labels(family: str, names: Iterable[str]) -> None:
    """Shows a family of Prometheus metrics."""
    _findings.update(check_labels(family, names))


def schema(wanted: str, *urls: str) -> None:
    _findings.update(f"schema_url {url!r}, not {wanted!r}" for url in urls if url != wanted)


def summary() -> list[str]:
    """Returns a line for each attribute that was seen, with level, stability and type. Then the exceptions used."""
    lines = []
    for (group, name), count in sorted(_told.items()):
        declared = declaration(name)
        if declared and group in own().groups and name in own().groups[group].attributes:
            level = own().groups[group].level(name)
            lines.append(f"{group} {name}: {level}, {declared[0].stability}, {declared[0].type}; {count} times")
    return lines + [f"exception: {text}; {count} times" for text, count in sorted(_excused.items())]


def take() -> list[str]:
    """Returns the findings since the last call, each once, with the number of times and an example."""
    found = [f"{text}; {count} times {_examples.pop(text, '')}" for text, count in _findings.items()]
    _findings.clear()
    _examples.clear()
    return found

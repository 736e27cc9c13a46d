"""Holds spans, metrics and resources against the conventions' registry and ours. Each check returns its findings."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from registry.reader import (
    CONDITIONALLY,
    REQUIRED,
    Condition,
    Group,
    Reference,
    conventions,
    declaration,
    own,
)

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "int": int,
    "double": float,
    "boolean": bool,
    "any": object,
}


def _is_of_type(value: object, kind: str) -> bool:
    if kind.endswith("[]"):
        return isinstance(value, list | tuple) and all(_is_of_type(each, kind[:-2]) for each in value)
    if isinstance(value, bool) and kind in ("int", "double"):
        return False
    return isinstance(value, _TYPES[kind])


@cache
def _declared(name: str) -> tuple[str, tuple[object, ...] | None] | None:
    """Returns an attribute's type, and its values if no others are allowed. `None`: nobody declares the attribute."""
    found = declaration(name)
    if found is None:
        return None
    attribute, by = found
    closed = by == "own" and attribute.members
    return attribute.type, tuple(member["value"] for member in attribute.members) if closed else None


def check_value(name: str, value: object) -> list[str]:
    """Checks that the attribute is declared, and that the value has its type."""
    declared = _declared(name)
    if declared is None:
        return [f"{name}: neither the conventions nor our registry know it"]
    kind, values = declared
    if not _is_of_type(value, kind):
        return [f"{name}: {value!r} is no {kind}"]
    if values is not None and value not in values:
        return [f"{name}: {value!r} is none of {', '.join(map(str, values))}"]
    return []


def _holds(condition: Condition, facts: Mapping[str, object]) -> bool:
    return all(
        name not in facts
        if wanted == "absent"
        else name in facts and (wanted == "present" or any(fnmatchcase(str(facts[name]), each) for each in wanted))
        for name, wanted in condition.items()
    )


def _any_holds(conditions: Iterable[Condition], facts: Mapping[str, object]) -> bool:
    return any(_holds(each, facts) for each in conditions)


Rules = tuple[Mapping[str, Reference], tuple[Reference, ...]]
"""The attributes that a group may have, and those that it must have, perhaps on conditions."""


@cache
def _rules(name: str) -> Rules:
    group = own().groups[name]
    demanded = [
        each
        for each in group.attributes.values()
        if group.level(each.name) == REQUIRED or (group.level(each.name) == CONDITIONALLY and each.present_if)
    ]
    return group.attributes, tuple(demanded)


def _reference(allowed: Mapping[str, Reference], key: str) -> Reference | None:
    """Returns an attribute's reference in a group, also by a template such as `http.request.header.<key>`."""
    if key in allowed:
        return allowed[key]
    template = next((name for name in allowed if key.startswith(f"{name}.")), None)
    declared = declaration(template) if template else None
    return allowed[template] if template and declared and declared[0].type.startswith("template[") else None


def check_group(
    name: str,
    attributes: Mapping[str, object],
    facts: Mapping[str, object] | None = None,
    excused: list[str] | None = None,
) -> list[str]:
    """Checks attributes against a group of our registry.

    Args:
        name: The group's id.
        attributes: Their values by name.
        facts: The attributes, and what else conditions name. `None`: the attributes.
        excused: Gets a text for each required attribute that is missing by an exception.
    """
    allowed, demanded = _rules(name)
    facts = attributes if facts is None else facts
    found = []
    for key, value in attributes.items():
        found += check_value(key, value)
        reference = _reference(allowed, key)
        if reference is None and _declared(key):
            found.append(f"{key}: {name} does not have it")
        elif reference and reference.only_if and not _any_holds(reference.only_if, facts):
            found.append(f"{key}: there, without any of {list(reference.only_if)}")
    for reference in demanded:
        if reference.name in attributes:
            continue
        conditional = reference.present_if and own().groups[name].level(reference.name) == CONDITIONALLY
        if conditional and not _any_holds(reference.present_if, facts):
            continue
        exception = next((each for each in reference.missing if _holds(each, facts)), None)
        if exception is None:
            found.append(f"{reference.name}: missing, though required")
        elif excused is not None:
            excused.append(f"{name} without {reference.name}: {exception}")
    return found


@cache
def _span_groups() -> dict[tuple[str, str | None], str]:
    return {(group.kind, group.name): group.id for group in own().of_type("span")}


def span_group(kind: str, name: str) -> str | None:
    """Returns the group of a span. SERVER spans, and CLIENT spans that are no connect, may have any name."""
    groups = _span_groups()
    return groups.get((kind, name)) or groups.get((kind, None))


def check_span(
    kind: str, name: str, status: str, attributes: Mapping[str, object], excused: list[str] | None = None
) -> list[str]:
    """Checks a span. `kind` and `status` are OTLP's words, such as `SERVER` and `ERROR`."""
    group = span_group(kind, name)
    if group is None:
        return [f"our registry has no {kind} span {name!r}"]
    return check_group(group, attributes, {**attributes, "span.status": status}, excused)


def check_event(name: str, attributes: Mapping[str, object]) -> list[str]:
    """Checks an event of a span."""
    group = next((each.id for each in own().of_type("event") if each.name == name), None)
    return [f"our registry has no event {name!r}"] if group is None else check_group(group, attributes)


def check_resource(attributes: Mapping[str, object], said: Iterable[str] = ()) -> list[str]:
    """Checks the resource of an nginx. The user named the attributes `said`; they may be any."""
    ours = {name: value for name, value in attributes.items() if name not in frozenset(said)}
    found = [finding for name, value in ours.items() for finding in check_value(name, value)]
    allowed = own().groups["entity.nginx"].attributes
    found += [f"{name}: entity.nginx does not have it" for name in ours if name not in allowed and _declared(name)]
    return found + _check_entities(attributes)


def check_program(attributes: Mapping[str, object]) -> list[str]:
    """Checks the resource of the program itself, which its own metrics have."""
    return [finding for name, value in attributes.items() for finding in check_value(name, value)] + _check_entities(
        attributes
    )


def _check_entities(attributes: Mapping[str, object]) -> list[str]:
    """Checks that each entity of the conventions with any attribute has all attributes that it requires."""
    return [
        f"{name}: missing, though {entity.id} requires it"
        for entity in _entities()
        if any(name in attributes for name in entity.attributes)
        for name in entity.attributes
        if entity.level(name) == REQUIRED and name not in attributes
    ]


@cache
def _entities() -> tuple[Group, ...]:
    return tuple(conventions().of_type("entity"))


def check_metric(name: str, instrument: str, unit: str, points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Checks a metric and the attributes of its points."""
    groups = {group.name: group for group in own().of_type("metric")}
    group = groups.get(name)
    if group is None:
        return [f"{name}: our registry has no such metric"]
    found = [
        f"{name}: {what} {told!r}, not {wanted!r}"
        for what, told, wanted in (("instrument", instrument, group.instrument), ("unit", unit, group.unit))
        if told != wanted
    ]
    for point in points:
        found += [f"{name}: {finding}" for finding in check_group(group.id, point)]
    return found


# Labels that Prometheus, the SDK's exporter or ours add: the bucket, the instance and the scope.
_LABELS = frozenset({"le", "service_name", "service_instance_id"})


def check_labels(family: str, names: Iterable[str]) -> list[str]:
    """Checks a family of Prometheus metrics. Its name and its labels have `_` instead of `.`."""
    groups = [group for group in own().of_type("metric") if family.startswith((group.name or "").replace(".", "_"))]
    if not groups:
        return [f"{family}: our registry has no such metric"]
    known = {name.replace(".", "_") for group in groups for name in group.attributes} | _LABELS
    return [
        f"{family}: no label {name} in our registry"
        for name in names
        if name not in known and not name.startswith("otel_scope_")
    ]

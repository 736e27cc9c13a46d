"""Reads registries in the format of the semantic conventions: theirs (tests/semconv) and ours (docs/registry.yaml)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OWN = ROOT / "docs" / "registry.yaml"
CONVENTIONS = ROOT / "tests" / "semconv"

REQUIRED, CONDITIONALLY, RECOMMENDED, OPT_IN = "required", "conditionally_required", "recommended", "opt_in"

Condition = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Attribute:
    """The declaration of an attribute."""

    name: str
    type: str
    """`string`, `int`, `double`, `boolean`, `string[]`, `any` or `template[…]`. An enumeration has its values' type."""
    members: tuple[Mapping[str, Any], ...]
    """The members of an enumeration. Others may be told, too, if a convention declares it."""
    stability: str
    declared_in: str = ""
    """Who declares an attribute of our registry in truth. Empty: the registry itself."""


@dataclass(frozen=True)
class Reference:
    """An attribute in a group."""

    name: str
    level: str | None
    """`None`: the group says nothing. `Group.level` has the level in force."""
    condition: str = ""
    """When a conditionally required attribute is there, in words."""
    brief: str = ""
    absent: str = ""
    missing: tuple[Condition, ...] = ()
    present_if: tuple[Condition, ...] = ()
    only_if: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Group:
    """A span, a metric, an entity, or a group of attributes that others extend."""

    id: str
    type: str
    name: str | None
    kind: str
    stability: str
    brief: str
    unit: str
    instrument: str
    own: tuple[Reference, ...]
    """The attributes that the group names itself."""
    attributes: Mapping[str, Reference] = field(default_factory=dict)
    """The attributes that this group names, and the attributes of the groups that it extends."""
    annotations: Mapping[str, Any] = field(default_factory=dict)

    def level(self, name: str) -> str:
        """Returns the requirement level of an attribute. Without a statement, it is `recommended`."""
        return self.attributes[name].level or RECOMMENDED


@dataclass(frozen=True)
class Registry:
    attributes: Mapping[str, Attribute]
    groups: Mapping[str, Group]

    def attribute(self, name: str) -> Attribute | None:
        """Returns the declaration of an attribute, also by a template such as `k8s.pod.label.<key>`."""
        if name in self.attributes:
            return self.attributes[name]
        for prefix in (name[:end] for end in range(len(name)) if name[end] == "."):
            found = self.attributes.get(prefix)
            if found and found.type.startswith("template["):
                return replace(found, type=found.type.removeprefix("template[").removesuffix("]"))
        return None

    def of_type(self, kind: str) -> list[Group]:
        return [group for group in self.groups.values() if group.type == kind]


def _attribute(fields: Mapping[str, Any]) -> Attribute:
    declared = fields["type"]
    members: tuple[Mapping[str, Any], ...] = ()
    if isinstance(declared, dict):
        members = tuple(declared["members"])
        declared = {str: "string", int: "int"}[type(members[0]["value"])]
    name = fields.get("id") or fields["key"]
    notes = fields.get("annotations", {})
    return Attribute(name, declared, members, fields["stability"], notes.get("declared_in", ""))


def _reference(fields: Mapping[str, Any]) -> Reference:
    level, condition = fields.get("requirement_level"), ""
    if isinstance(level, dict):
        ((level, condition),) = level.items()
    notes = fields.get("annotations", {})
    assert notes.keys() <= {"absent", "missing", "present_if", "only_if"} or "id" in fields, fields
    return Reference(
        fields.get("ref") or fields.get("id") or "",
        level,
        condition,
        " ".join(fields.get("brief", "").split()),
        notes.get("absent", ""),
        *(tuple(notes.get(name, ())) for name in ("missing", "present_if", "only_if")),
    )


def _group(fields: Mapping[str, Any]) -> Group:
    return Group(
        fields["id"],
        fields["type"],
        fields.get("metric_name") or fields.get("name") or fields.get("annotations", {}).get("span"),
        fields.get("span_kind", "").upper(),
        fields.get("stability", ""),
        " ".join(fields["brief"].split()),
        fields.get("unit", ""),
        fields.get("instrument", ""),
        tuple(_reference(each) for each in fields.get("attributes") or ()),
        annotations=fields.get("annotations", {}),
    )


def _merged(upper: Reference | None, own: Reference) -> Reference:
    """Returns a reference with what it does not say itself taken from the extended group."""
    if upper is None:
        return own
    own_level = own.level is not None
    return replace(
        own,
        level=own.level if own_level else upper.level,
        condition=own.condition if own_level else upper.condition,
        brief=own.brief or upper.brief,
    )


def read(files: Iterable[Path]) -> Registry:
    """Reads files of one registry."""
    attributes: dict[str, Attribute] = {}
    groups: dict[str, Group] = {}
    extended: dict[str, str] = {}
    for file in files:
        content = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
        declared = list(content.get("attributes", ()))
        for fields in content.get("groups", ()):
            groups[fields["id"]] = _group(fields)
            declared += [each for each in fields.get("attributes") or () if "id" in each]
            if "extends" in fields:
                extended[fields["id"]] = fields["extends"]
        for each in map(_attribute, declared):
            assert each.name not in attributes, f"{each.name} is declared twice"
            attributes[each.name] = each

    def resolved(name: str) -> dict[str, Reference]:
        found = resolved(extended[name]) if name in extended else {}
        for each in groups[name].own:
            found[each.name] = _merged(found.get(each.name), each)
        return found

    return Registry(attributes, {name: replace(group, attributes=resolved(name)) for name, group in groups.items()})


@cache
def conventions() -> Registry:
    """Returns the semantic conventions' registry."""
    return read(sorted(CONVENTIONS.rglob("*.yaml")))


@cache
def own() -> Registry:
    """Returns our registry. Its references have the levels of the conventions, unless they say another."""
    ours = read([OWN])
    theirs = conventions()

    def with_levels(group: Group) -> Group:
        name = group.annotations.get("conventions")
        upper = theirs.groups[name].attributes if name else _of_entities(theirs) if group.type == "entity" else {}
        return replace(group, attributes={key: _merged(upper.get(key), each) for key, each in group.attributes.items()})

    return Registry(ours.attributes, {name: with_levels(group) for name, group in ours.groups.items()})


def _of_entities(registry: Registry) -> dict[str, Reference]:
    return {key: each for group in registry.of_type("entity") for key, each in group.attributes.items()}


def declaration(name: str) -> tuple[Attribute, str] | None:
    """Returns the declaration of an attribute and who declares it: `conventions` or `own`. `None`: nobody does."""
    if found := conventions().attribute(name):
        return found, "conventions"
    if found := own().attribute(name):
        return found, "own"
    return None

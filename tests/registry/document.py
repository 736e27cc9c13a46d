"""Writes the tables of attributes and metrics into the pages of docs/: `PYTHONPATH=tests python -m registry.document`.

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`. `TABLES` has the names.
"""

import re
from collections.abc import Callable, Iterable

from registry.reader import CONDITIONALLY, OPT_IN, RECOMMENDED, REQUIRED, ROOT, Group, Reference, declaration, own

DOCS = ROOT / "docs"
_LEVELS = {REQUIRED: "required", CONDITIONALLY: "conditional", RECOMMENDED: "recommended", OPT_IN: "opt-in"}
_TABLE = re.compile(r"(<!-- table ([\w.]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


def _references(group: Group, own_only: bool = False) -> list[Reference]:
    return [group.attributes[each.name] for each in group.own] if own_only else list(group.attributes.values())


def attributes(name: str) -> str:
    """Returns the table of the attributes that a group names itself: level, meaning and when each is absent."""
    group = own().groups[name]
    rows = [
        (f"`{each.name}`", _LEVELS[group.level(each.name)], each.brief, each.absent)
        for each in _references(group, own_only=True)
    ]
    return _table(("attribute", "level", "meaning", "absent if"), rows)


def own_metrics() -> str:
    """Returns the table of the program's own metrics."""
    rows = [
        (f"`{group.name}`", group.instrument, f"`{group.unit}`", _attributes_of(group), group.brief)
        for group in own().of_type("metric")
        if group.id.startswith("metric.otel_nginx_ebpf.")
    ]
    return _table(("metric", "instrument", "unit", "attribute", "meaning"), rows)


def _attributes_of(group: Group) -> str:
    return ", ".join(f"`{name}`" for name in group.attributes)


def terminations() -> str:
    """Returns the table of the values of nginx.termination."""
    members = own().attributes["nginx.termination"].members
    rows = [(f"`{each['value']}`", each["annotations"]["fault"], each["brief"]) for each in members]
    return _table(("value", "fault of", "meaning"), rows)


_GROUPS = {
    "span.nginx.server": "SERVER",
    "span.nginx.connect": "connect",
    "span.nginx.connect.failed": "failed connect",
}
_GROUPS |= {
    "span.nginx.exchange": "exchange",
    "event.nginx.error_log": "log line",
    "event.nginx.access_log": "log record",
    "entity.nginx": "resource",
}


def everything() -> str:
    """Returns the table of all attributes: type, stability, who declares each, and what has it at which level."""
    found: dict[str, list[str]] = {}
    for group in own().groups.values():
        what = f"`{group.name}`" if group.type == "metric" else _GROUPS.get(group.id)
        for name in group.attributes if what else ():
            found.setdefault(name, []).append(f"{what}: {_LEVELS[group.level(name)]}")
    rows = []
    for name in sorted(found):
        declared = declaration(name)
        assert declared, name
        attribute, by = declared
        source = attribute.declared_in or {"conventions": "conventions", "own": "`registry.yaml`"}[by]
        rows.append(
            (f"`{name}`", attribute.type, attribute.stability.replace("_", " "), source, "; ".join(found[name]))
        )
    return _table(("attribute", "type", "stability", "declared in", "part of"), rows)


TABLES: dict[str, Callable[[], str]] = {
    **{
        name: (lambda name=name: attributes(name))  # type: ignore[misc]
        for name in (
            "span.nginx.server",
            "attributes.nginx.attempt",
            "attributes.nginx.asked",
            "span.nginx.exchange",
            "event.nginx.error_log",
            "event.nginx.access_log",
            "entity.nginx",
            "metric.nginx.http.server.request.duration",
            "metric.nginx.http.client.request.duration",
        )
    },
    "metrics": own_metrics,
    "nginx.termination": terminations,
    "everything": everything,
}


def written(page: str) -> str:
    """Returns a page's text with its tables as they should be."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if written(text) != text:
            path.write_text(written(text), encoding="utf-8")
            print(f"docs/{path.name}: its tables were out of date")


if __name__ == "__main__":
    main()

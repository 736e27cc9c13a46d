"""Reads `[[rules]]` of the TOML file. Each error is one line with the rule's place and the key."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, get_args

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.settings.declaration import nanoseconds
from otel_nginx_ebpf.settings.model import Sampler, Settings
from otel_nginx_ebpf.settings.rules import (
    RULES_MAX,
    TEXT_KEYS,
    TEXTS_MAX,
    Rule,
    compared_path,
    compared_text,
    exclusion,
)

_NAMESPACES = ("client", "error", "http", "network", "nginx", "server", "service", "telemetry", "url", "user_agent")
"""Attributes of these namespaces are facts, which a constant must not replace."""

# Readers return a value of a rule. Their ValueError says what the value must be.

_METHOD = re.compile(r"[!#$%&'+.^_`|~0-9A-Za-z-]{1,16}")
_STATUS = re.compile(r"[1-5](xx|[0-9]{2})")
_NAME = re.compile(r"[a-z][a-z0-9_.-]*")


def _method(value: object) -> str:
    if not isinstance(value, str) or not _METHOD.fullmatch(value):
        raise ValueError("a method of at most 16 characters, such as GET")
    return value


def _status(value: object) -> str:
    text = str(value)
    if isinstance(value, bool) or not _STATUS.fullmatch(text):
        raise ValueError("a status, such as 404, or a class, such as 5xx")
    return text


def _list(read: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    def values(value: object) -> tuple[str, ...]:
        listed = value if isinstance(value, list) else [value]
        if not listed:
            raise ValueError("one value or a list of values")
        return tuple(read(each) for each in listed)

    return values


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _sampler(value: object) -> str:
    if value not in get_args(Sampler):
        raise ValueError(f"one of {', '.join(get_args(Sampler))}")
    return str(value)


def _ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return float(value)


def _duration(value: object) -> int:
    with suppress(ValueError):
        if found := nanoseconds(value):
            return found
    raise ValueError("a number and its unit, us, ms or s, such as 500ms")


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text")
    return value


def _attributes(value: object) -> tuple[tuple[str, str | bool | int | float], ...]:
    if not isinstance(value, dict) or not value:
        raise ValueError('a table of constants, such as { team = "shop" }')
    for name, constant in value.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f'a table of attributes; {name!r} is not the name of one (write it in quotes: "a.b")')
        if name.split(".")[0] in _NAMESPACES:
            raise ValueError(f"constants; {name} would look like a fact. Use a name of your own")
        if not isinstance(constant, str | bool | int | float) or (
            type(constant) is int and not -(2**63) <= constant < 2**63
        ):
            raise ValueError(f"constants: text, numbers, true or false; {name} is something else")
    return tuple(value.items())


_READERS: dict[str, Callable[[object], Any]] = {
    **dict.fromkeys(TEXT_KEYS, _list(compared_text)),
    "path": _list(compared_path),
    "method": _list(_method),
    "status": _list(_status),
    "drop": _switch,
    "sampler": _sampler,
    "sampler_arg": _ratio,
    "keep_slower_than": _duration,
    "metrics": _switch,
    "span_name": _name,
    "attributes": _attributes,
    "service_name": _name,
}


def read_rules(tables: object, file: object, exclude: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """Returns the rules: first those of `--exclude`, then those of the file in its order.

    Args:
        tables: The value of the key `rules`; `None`: the file has no such key.
        file: The file's name, for errors.
        exclude: The paths of `--exclude`.

    Raises:
        UserError: A rule is wrong, or there are too many.
    """
    if tables is not None and not (isinstance(tables, list) and all(isinstance(each, dict) for each in tables)):
        raise UserError(f"{file}: rules must be tables of a TOML file: write [[rules]] before the keys of each rule")
    rules = (
        *(exclusion(each) for each in exclude),
        *(_rule(f"{file}: rule {number}", table) for number, table in enumerate(tables or (), 1)),
    )
    if len(rules) > RULES_MAX:
        raise UserError(f"{rules[RULES_MAX].place} is one too many: there may be {RULES_MAX} rules, with --exclude")
    texts = 0
    for rule in rules:
        texts += sum(map(len, rule.conditions.values()))
        if texts > TEXTS_MAX:
            raise UserError(f"{rule.place}: all rules together may compare {TEXTS_MAX} values; use a * for several")
    return rules


def _rule(place: str, table: Mapping[str, Any]) -> Rule:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _READERS:
            raise UserError(f"{place}: unknown key {key!r}; known are {', '.join(_READERS)}")
        try:
            values[key] = _READERS[key](value)
        except ValueError as error:
            raise UserError(f"{place}, {key}: must be {error}; it is {value!r}") from None
    rule = Rule(place, **values)
    has_ratio = rule.sampler is not None and rule.sampler.endswith("traceidratio")
    others = sorted(values.keys() & {"sampler", "keep_slower_than", "span_name", "attributes", "service_name"})
    if has_ratio and rule.sampler_arg is None:
        raise UserError(f"{place}, sampler: {rule.sampler} needs the key sampler_arg, the fraction of traces")
    if rule.sampler_arg is not None and not has_ratio:
        raise UserError(f"{place}, sampler_arg: needs a sampler with traceidratio in the same rule")
    if rule.drop and others:
        raise UserError(f"{place}, drop: what is dropped has no {others[0]}; take out one of the two")
    if not values.keys() - rule.conditions.keys():
        raise UserError(f"{place}: says nothing about its requests; add one of drop, sampler, span_name, …")
    return rule


def check_told(settings: Settings) -> None:
    """Raises `UserError` if `--propagate` must tell a decision before the conditions of a rule are known.

    A rule that decides, and each rule before it, must be known then: the first rule that matches decides.
    """
    unknown = ["status"] if settings.propagate != "off" else []
    if settings.tells_in_memory:
        unknown.append("location")
    for index, rule in enumerate(settings.rules):
        found = next((name for name in unknown if name in rule.conditions), None)
        if found and any(later.decides for later in settings.rules[index:]):
            raise UserError(
                f"{rule.place}, {found}: --propagate={settings.propagate} tells the decision before the {found} is "
                "known; move the rule behind all rules with drop or sampler, and let it say neither"
            )

"""Reads rules as the kernel program does (`probes/rules.c`), for the requests of a capture file. Pure."""

import struct
from collections.abc import Mapping, Sequence

from opentelemetry.semconv.attributes import service_attributes

from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.settings.rules import TEXT_KEYS, Pattern, Rule
from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, c_enum
from otel_nginx_ebpf.traces.model import AttributeValue
from otel_nginx_ebpf.traces.phases import phases_of
from otel_nginx_ebpf.traces.record import Request, decode

_RULE = REQUEST_RECORD.offset("rule")
_KEPT = REQUEST_RECORD.offset("kept")
_RULE_NUMBER = struct.Struct("<B")
_KEPT_NUMBERS = {name: c_enum("kept")[f"KEPT_{name.upper()}"] for name in ("error", "slow")}

NOT_TRACED_BY_RULE = "not_traced_by_rule"
NOT_SAMPLED = "not_sampled"


def facts_of(request: Request) -> dict[str, str | None]:
    """Returns what rules compare of a request, by the rule's key."""
    return {
        "server_name": request.server_name,
        "location": request.location,
        "path": request.uri.partition("?")[0] if request.uri is not None else None,
        "method": request.method,
        "user_agent": request.user_agent,
    }


def matches(rule: Rule, facts: Mapping[str, str | None], status: int) -> bool:
    """Tells whether a request has one of the values of each condition."""
    for key in TEXT_KEYS:
        text, values = facts[key], getattr(rule, key)
        if values and (text is None or not any(Pattern.parse(value).matches(text) for value in values)):
            return False
    return not rule.status or any(value in (str(status), f"{status // 100}xx") for value in rule.status)


def first_match(rules: Sequence[Rule], facts: Mapping[str, str | None], status: int) -> int:
    """Returns the number of the first rule that matches, from 1; 0: none."""
    return next((number for number, rule in enumerate(rules, 1) if matches(rule, facts, status)), 0)


class CapturedRules:
    """Applies rules to the records of a capture file, in place of the rules with which it was recorded."""

    def __init__(self, settings: Settings) -> None:
        self._rules = settings.rules
        self._keep_errors = settings.keep_errors
        self._keep_slower_than_ns = settings.keep_slower_than

    def apply(self, raw: bytes) -> tuple[bytes, str | None]:
        """Returns the record with the number of its rule, and why the rule leaves it out; `None`: it does not.

        Raises:
            RecordError: The record is damaged.
        """
        if not self._rules:
            return _with_number(raw, 0), None
        request = decode(raw)
        number = first_match(self._rules, facts_of(request), request.status)
        raw = _with_number(raw, number)
        if not number:
            return raw, None
        rule = self._rules[number - 1]
        if rule.drop:
            return raw, NOT_TRACED_BY_RULE
        if rule.sampler is None or _samples(rule, request):
            return raw, None
        reason = self._reason_to_keep(rule, request)
        if reason is None:
            return raw, NOT_SAMPLED
        return raw[:_KEPT] + bytes([_KEPT_NUMBERS[reason]]) + raw[_KEPT + 1 :], None

    def _reason_to_keep(self, rule: Rule, request: Request) -> str | None:
        if self._keep_errors and 500 <= request.status < 600:
            return "error"
        start_ns, end_ns, *_ = phases_of(request)[0]
        slow_ns = self._keep_slower_than_ns if rule.keep_slower_than is None else rule.keep_slower_than
        return "slow" if slow_ns is not None and end_ns - start_ns >= slow_ns else None


def _with_number(raw: bytes, number: int) -> bytes:
    told, end = _RULE_NUMBER.pack(number), _RULE + _RULE_NUMBER.size
    return raw if len(raw) < end or raw[_RULE:end] == told else raw[:_RULE] + told + raw[end:]


def _samples(rule: Rule, request: Request) -> bool:
    """Tells whether a rule's sampler takes a request that was recorded."""
    assert rule.sampler is not None
    if rule.sampler.startswith("parentbased_") and request.parent_span_id is not None:
        return True  # its parent is sampled: otherwise the capture would not have it
    if rule.sampler.endswith("traceidratio"):
        return request.trace_id % 2**64 < round((rule.sampler_arg or 0.0) * 2**64)
    return rule.sampler.endswith("always_on")


class ServiceNames:
    """The resources of requests whose rule names a service of its own."""

    _KEPT = 1024

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._names = {number: rule.service_name for number, rule in enumerate(rules, 1) if rule.service_name}
        self._made: dict[tuple[int, str], tuple[Mapping[str, AttributeValue], Mapping[str, AttributeValue]]] = {}

    def resource(self, number: int, attributes: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
        """Returns the resource attributes of a request with this rule. `attributes`: those of its nginx.

        Requests with one name from one nginx share the object: exporters compare resources by identity.
        """
        name = self._names.get(number)
        if name is None:
            return attributes
        made = self._made.get((id(attributes), name))
        if made is None or made[0] is not attributes:
            if len(self._made) >= self._KEPT:
                self._made.clear()
            made = attributes, {**attributes, service_attributes.SERVICE_NAME: name}
            self._made[id(attributes), name] = made
        return made[1]

    def resource_of_record(self, raw: bytes, attributes: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
        """Returns the same for a record that is not damaged."""
        return self.resource(_RULE_NUMBER.unpack_from(raw, _RULE)[0], attributes)


def service_names_of(rules: Sequence[Rule]) -> ServiceNames | None:
    """Returns the services that rules name. `None`: they name none."""
    return ServiceNames(rules) if any(rule.service_name for rule in rules) else None

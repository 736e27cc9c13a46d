"""Turns the rules into C: a function that finds the first rule that matches a request (`probes/rules.c`)."""

from collections.abc import Iterable, Sequence

from otel_nginx_ebpf.planner.sampling import ratio_constants
from otel_nginx_ebpf.settings.rules import TEXT_BYTES_MAX, TEXT_KEYS, Pattern, Rule

_WORDS = {8: "u64", 4: "u32", 2: "u16", 1: "u8"}


def constants(rules: Sequence[Rule]) -> dict[str, int]:
    """Returns constants of the kernel program's text, by name. A flag is 1 or 0.

    RULES: There are rules.
    RULES_KEEP: A rule may keep what the sampler leaves out.
    RULES_KEEP_SLOWER: A rule keeps slow requests.
    RULES_BY_…, RULES_BY_…_TAIL: A rule compares this text; its end.
    """
    flags = {
        "RULES": bool(rules),
        "RULES_KEEP": any(rule.sampler or rule.keep_slower_than for rule in rules),
        "RULES_KEEP_SLOWER": any(rule.keep_slower_than for rule in rules),
    }
    for name in TEXT_KEYS:
        patterns = [Pattern.parse(text) for rule in rules for text in getattr(rule, name)]
        flags[f"RULES_BY_{name.upper()}"] = bool(patterns)
        flags[f"RULES_BY_{name.upper()}_TAIL"] = any(pattern.end for pattern in patterns)
    return {name: int(flag) for name, flag in flags.items()}


def text(rules: Sequence[Rule]) -> str:
    """Returns the text of match_rules().

    It reads each fact anew. Otherwise registers would hold what earlier comparisons told of a fact, and the verifier
    would follow each combination.
    """
    lines = [
        "static __always_inline void match_rules(struct process *process, const volatile struct rule_facts *facts)",
        "{",
        "    struct rule *rule = &process->rule;",
    ]
    for number, rule in enumerate(rules, 1):
        conditions = [_any(_test(name, value) for value in values) for name, values in rule.conditions.items()]
        lines.append(f"    if ({' && '.join(conditions) or 'true'}) {{")
        lines += [f"        rule->{name} = {value:#x};" for name, value in _said(number, rule)]
        lines += ["        return;", "    }"]
    return "\n".join([*lines, "}", ""])


def _said(number: int, rule: Rule) -> Iterable[tuple[str, int]]:
    yield "number", number
    if rule.drop:
        yield "drops", 1
    if rule.sampler is not None:
        by_parent, always, bound = ratio_constants(rule.sampler, rule.sampler_arg or 0.0)
        yield from (("samples_by_parent", by_parent), ("samples_always", always), ("sample_ratio_bound", bound))
    if rule.keep_slower_than is not None:
        yield "keep_slower_than_ns", rule.keep_slower_than
    if not rule.metrics:
        yield "unmeasured", 1


def _any(tests: Iterable[str]) -> str:
    return f"({' || '.join(tests)})"


def _test(name: str, value: str) -> str:
    if name == "status":
        first = int(value.replace("xx", "00"))
        return f"facts->status - {first} < {100 if value.endswith('xx') else 1}"
    pattern, count = Pattern.parse(value), f"facts->{name}_bytes"
    start, end = pattern.start.encode(), (pattern.end or "").encode()
    least = len(start) + len(end)
    if pattern.end is None:
        length = f"{count} == {least}"
    elif end:
        length = f"{count} >= {least} && {count} < RULE_TEXT_TOO_LONG"
    else:
        length = f"{count} >= {least}"
    return f"({' && '.join([length, *_equal(f'{name}_head', 0, start), *_equal(f'{name}_tail', -len(end), end)])})"


def _equal(member: str, at: int, expected: bytes) -> Iterable[str]:
    """Yields comparisons of a member's bytes, which begin at `at`; below 0: from the member's end."""
    offset, taken = at % TEXT_BYTES_MAX if at < 0 else at, 0
    while taken < len(expected):
        size = next(size for size in _WORDS if size <= len(expected) - taken)
        number = int.from_bytes(expected[taken : taken + size], "little")
        yield f"*(const volatile {_WORDS[size]} *)(facts->{member} + {offset + taken}) == {number:#x}"
        taken += size

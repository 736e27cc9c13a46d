"""The function that matches rules in the kernel, compiled by gcc, compared with `traces.rules`."""

import ctypes
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from otel_nginx_ebpf.planner.rules import constants, text
from otel_nginx_ebpf.settings.rules import TEXT_BYTES_MAX, TEXT_KEYS, WHOLE_BYTES_MAX, Pattern, Rule
from otel_nginx_ebpf.traces.rules import first_match
from tests.unit.c_compiler import compile_library

PROBES = Path(__file__).parents[3] / "probes"
_STRUCTS = re.search(
    r"^#define RULE_TEXT_BYTES.*?^struct rule \{.*?^\};", (PROBES / "maps.c").read_text(), re.DOTALL | re.MULTILINE
)
assert _STRUCTS
_TOO_LONG = 1 << 32
# Words at any address are well-defined only in such types. clang would read them byte by byte in the kernel.
_UNALIGNED = "".join(f"typedef u{bits} near_u{bits} __attribute__((aligned(1)));\n" for bits in (8, 16, 32, 64))


def limit(name: str) -> int:
    found = re.search(rf"^#define {name} (\d+)", _STRUCTS[0], re.MULTILINE)  # type: ignore[index]
    assert found
    return int(found[1])


def test_both_sides_have_the_same_limits() -> None:
    assert limit("RULE_TEXT_BYTES") == TEXT_BYTES_MAX
    assert limit("RULE_PATH_BYTES") == WHOLE_BYTES_MAX + 1


def compiled(rules: tuple[Rule, ...]) -> ctypes.CDLL:
    fields = "".join(
        f"    if (which == {index}) {{ facts.{name}_bytes = bytes; fill(facts.{name}_head, sizeof(facts.{name}_head), "
        f"facts.{name}_tail, text, whole); }}\n"
        for index, name in enumerate(TEXT_KEYS)
    )
    unaligned = re.sub(r"\(const volatile (u\d+) \*\)", r"(const volatile near_\1 *)", text(rules))
    return compile_library(
        f"""
#include <linux/types.h>
#pragma GCC diagnostic ignored "-Wunused-parameter"
#define bool _Bool
#define true 1
{_STRUCTS[0]}
struct process {{ struct rule rule; }};
{_UNALIGNED}
{unaligned}
static struct rule_facts facts;
static void fill(u8 *head, u64 head_bytes, u8 *tail, const u8 *text, u64 whole)
{{
    for (u64 i = 0; i < head_bytes; i++) head[i] = i < whole ? text[i] : 'x';
    for (u64 i = 0; i < RULE_TEXT_BYTES; i++) tail[RULE_TEXT_BYTES - 1 - i] = i < whole ? text[whole - 1 - i] : 'x';
}}
void set_text(u32 which, const u8 *text, u64 whole, u64 bytes)
{{
{fields}
}}
u32 match(u32 status)
{{
    struct process process = {{}};
    facts.status = status;
    match_rules(&process, &facts);
    return process.rule.number | process.rule.drops << 8 | process.rule.unmeasured << 9;
}}
""",  # type: ignore[index]
        [PROBES / "stub_headers" / "include"],
    )


WORDS = st.sampled_from(
    ["/", "/a", "/ab", "a", "b", ".css", "/static/", "kube-probe/1", "12345678", "é", "x" * 127, "y" * 400]
)
TEXTS = st.lists(WORDS, max_size=4).map("".join)
PARTS = TEXTS.map(lambda text: text.encode()[:TEXT_BYTES_MAX].decode(errors="ignore"))
PATTERNS = st.builds(
    lambda start, star, end: f"{start}*{end}" if star and start + end else start or "a", PARTS, st.booleans(), PARTS
)
SOME = st.lists(PATTERNS, max_size=3).map(tuple)
STATUSES = st.lists(st.sampled_from(["2xx", "5xx", "404", "200", "599"]), max_size=2).map(tuple)
RULES = st.lists(
    st.builds(
        Rule,
        st.just(""),
        server_name=SOME,
        location=SOME,
        path=SOME,
        method=SOME,
        user_agent=SOME,
        status=STATUSES,
        drop=st.booleans(),
        metrics=st.booleans(),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@st.composite
def facts_near(draw: st.DrawFn, rules: tuple[Rule, ...]) -> dict[str, str | None]:
    """Texts of which many match, or nearly match."""
    facts: dict[str, str | None] = {}
    for name in TEXT_KEYS:
        values = [value for rule in rules for value in getattr(rule, name)]
        wanted = st.sampled_from(values).map(lambda value: value.replace("*", "")) if values else TEXTS
        told = draw(st.one_of(wanted, wanted.flatmap(lambda text: TEXTS.map(lambda more: text + more)), TEXTS))
        facts[name] = told or None
    return facts


@settings(max_examples=15)
@given(st.data(), RULES)
def test_the_kernel_s_reading_is_ours(data: st.DataObject, rules: tuple[Rule, ...]) -> None:
    library = compiled(rules)
    library.match.restype = ctypes.c_uint32
    for _ in range(30):
        facts, status = data.draw(facts_near(rules)), data.draw(st.sampled_from([0, 200, 204, 404, 500, 599, 600]))
        for index, name in enumerate(TEXT_KEYS):
            raw = (facts[name] or "").encode()
            told = len(raw) if len(raw) <= WHOLE_BYTES_MAX else _TOO_LONG
            library.set_text(index, raw, ctypes.c_uint64(len(raw)), ctypes.c_uint64(told))
        number = first_match(rules, facts, status)
        rule = rules[number - 1] if number else Rule("")
        assert library.match(status) == number | rule.drop << 8 | (not rule.metrics) << 9


def test_constants_say_what_must_be_read() -> None:
    assert not any(constants(()).values())
    told = constants((Rule("", path=("/a*.css",), user_agent=("kube-probe/*",), keep_slower_than=1, drop=True),))
    assert {name for name, value in told.items() if value} == {
        "RULES",
        "RULES_KEEP",
        "RULES_KEEP_SLOWER",
        "RULES_BY_PATH",
        "RULES_BY_PATH_TAIL",
        "RULES_BY_USER_AGENT",
    }
    assert Pattern.parse("/a*.css") == Pattern("/a", ".css")

"""tracestate: cases from W3C Trace Context level 2, with the API's `TraceState` as the oracle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import TraceState

from otel_nginx_ebpf.traces.trace_state import canonical

THIRTY_TWO = ",".join(f"k{number}=v" for number in range(32))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, ""),
        ("", ""),
        (" ,\t,", ""),
        ("rojo=00f067aa0ba902b7", "rojo=00f067aa0ba902b7"),
        ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("foo=1 \t , \t bar=2, \t baz=3", "foo=1,bar=2,baz=3"),
        ("foo=1,,bar=2,", "foo=1,bar=2"),
        ("foo= 1", "foo= 1"),  # leading spaces belong to the value
        ("foo=1 2", "foo=1 2"),
        ("foo=1,bar=2,foo=3", "foo=1,bar=2"),
        ("z" * 256 + "=1", "z" * 256 + "=1"),
        ("z" * 257 + "=1", ""),
        ("foo=" + "v" * 256, "foo=" + "v" * 256),
        ("foo=" + "v" * 257, ""),
        ("foo-_*/bar=bar4", "foo-_*/bar=bar4"),
        ("fw529a3039@dt=FfAZlA", "fw529a3039@dt=FfAZlA"),
        ("0foo=1", "0foo=1"),  # level 2; level 1, and the API, want a tenant behind a digit
        ("a@b@c=1", "a@b@c=1"),
        ("foo", ""),
        ("foo=", ""),
        ("=1", ""),
        ("foo=1=2", ""),
        ("foo=\tx", ""),
        ("foo=ü", ""),
        ("foo =1", ""),
        ("Foo=1", ""),
        ("@foo=1", ""),
        ("foo=1,bar", ""),
        (THIRTY_TWO, THIRTY_TWO),
        (THIRTY_TWO + ",x=1", ""),
    ],
)
def test_the_specification_s_cases(header: str | None, expected: str) -> None:
    assert canonical(header) == expected


KEY = st.from_regex(r"[a-z][a-z0-9_\-*/]{0,20}(@[a-z][a-z0-9]{0,3})?", fullmatch=True)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=",="), max_size=20)
BLANK = st.text(" \t", max_size=2)
MEMBER = st.builds(lambda before, key, value, after: f"{before}{key}={value}{after}", BLANK, KEY, VALUE, BLANK) | BLANK


@given(st.lists(MEMBER, max_size=34, unique_by=lambda member: member.partition("=")[0].strip()))
def test_what_level_1_knows_is_as_in_the_api(members: list[str]) -> None:
    header = ",".join(members)
    assert canonical(header) == TraceState.from_header([header]).to_header()


@given(st.text())
def test_whatever_comes_the_result_is_canonical(header: str) -> None:
    assert canonical(canonical(header)) == canonical(header)

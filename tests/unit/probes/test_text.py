"""The functions of `probes/text.h`, compiled by gcc from the text that the kernel program compiles."""

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.traces.record import METHODS
from tests.unit.c_compiler import compile_library

PROBES = Path(__file__).parents[3] / "probes"

_SOURCE = r"""
#include <linux/types.h>
#include "record.h"
#define EVERY_BYTE 0x0101010101010101ULL
#include "text.h"

u64 call_is_not_0(u64 number) { return is_not_0(number); }
u64 call_bytes_before_space(u64 low, u64 high) { return bytes_before_space(low, high); }
u64 call_lower_case(u64 text) { return lower_case(text); }
u64 call_leading_spaces(u64 text) { return leading_spaces(text); }
u64 call_bytes_through(u64 text, u8 byte) { return bytes_through(zero_bytes(text ^ byte * EVERY_BYTE)); }
u64 call_method_of_text(u64 text, u64 bytes) { return method_of_text(first_bytes(text, bytes)); }
"""

_library = compile_library(_SOURCE, [PROBES / "stub_headers" / "include", PROBES])


def call(name: str, *arguments: int) -> int:
    function = getattr(_library, f"call_{name}")
    function.restype = ctypes.c_uint64
    return int(function(*map(ctypes.c_uint64, arguments)))


def word(text: bytes) -> int:
    assert len(text) == 8
    return int.from_bytes(text, "little")


WORDS = st.binary(min_size=8, max_size=8) | st.text(" \n:Ha\0", min_size=8, max_size=8).map(str.encode)


@given(st.integers(0, 2**64 - 1))
def test_is_not_0(number: int) -> None:
    assert call("is_not_0", number) == (number != 0)
    assert call("is_not_0", 0) == 0


@given(WORDS, WORDS)
def test_bytes_before_space(low: bytes, high: bytes) -> None:
    assert call("bytes_before_space", word(low), word(high)) == len((low + high).partition(b" ")[0])


@given(WORDS | st.text("@AZ[`az{\x80\xc1", min_size=8, max_size=8).map(lambda text: text.encode("latin-1")))
def test_lower_case(text: bytes) -> None:
    assert call("lower_case", word(text)) == word(text.lower())


@given(WORDS)
def test_leading_spaces(text: bytes) -> None:
    assert call("leading_spaces", word(text)) == 8 - len(text.lstrip(b" "))


@given(WORDS, st.sampled_from(b" \n:"))
def test_bytes_through(text: bytes, byte: int) -> None:
    expected = text.index(byte) + 1 if byte in text else 8
    assert call("bytes_through", word(text), byte) == expected


@pytest.mark.parametrize("bit", METHODS)
def test_method_of_text(bit: int) -> None:
    method = METHODS[bit].encode()
    assert call("method_of_text", word((method + b" /xxxxxx")[:8]), len(method)) == bit
    assert call("method_of_text", word((method.lower() + b" /xxxxxx")[:8]), len(method)) == 1

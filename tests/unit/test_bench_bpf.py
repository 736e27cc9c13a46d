"""The interpreter of BPF programs that `make counts` uses; it checks itself against records of real requests, too."""

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest

from bench.bpf import ARRAY, Machine, Map, parse

HASH = 1
NUMBERS, KNOWN = 7, 8
"""Stand for the maps in the code."""
CONTEXT = struct.pack("<2Q", 2**64 - 5, 0x1122334455667788)

Words = tuple[int, int, int, int, int]
"""Code, destination, source, offset, immediate number."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine({NUMBERS: Map(ARRAY, 4, 8, 2, b"\x05"), KNOWN: Map(HASH, 8, 8, 10)}, os.getpid())
    yield machine
    machine.close()


def stored(machine: Machine, *instructions: Words) -> int:
    """Run instructions; return what they leave in r0."""
    end = [(0x7B, 6, 0, 0, 0), (0xB7, 0, 0, 0, 0), (0x95, 0, 0, 0, 0)]  # *(u64 *)r6 = r0; r0 = 0; exit
    whole = [(0xBF, 6, 1, 0, 0), *instructions, *end]  # r6 = r1
    text = b"".join(struct.pack("<BBhi", code, to | source << 4, *rest) for code, to, source, *rest in whole)
    context = machine.put_context(CONTEXT)
    machine.run(parse(text), context)
    return int.from_bytes(machine.read(context, 8), "little")


@pytest.mark.parametrize(
    ("code", "left", "right", "expected"),
    [
        (0x0F, -1, 3, 2),  # r0 += r2
        (0x0C, -1, 3, 2),  # w0 += w2
        (0x1F, 1, 3, 2**64 - 2),
        (0x1C, 1, 3, 2**32 - 2),
        (0x3F, 7, 0, 0),
        (0x9F, 7, 0, 7),
        (0x6F, 1, 65, 2),
        (0x7F, -1, 60, 15),
        (0xCF, -8, 1, 2**64 - 4),
        (0xCC, -8, 1, 2**32 - 4),
        (0xBC, 0, -1, 2**32 - 1),
        (0xAF, 6, 3, 5),
    ],
)
def test_arithmetic(machine: Machine, code: int, left: int, right: int, expected: int) -> None:
    assert stored(machine, (0xB7, 0, 0, 0, left), (0xB7, 2, 0, 0, right), (code, 0, 2, 0, 0)) == expected


@pytest.mark.parametrize(
    ("code", "left", "right", "jumps"),
    [
        (0x1D, 3, 3, True),
        (0x2D, -1, 1, True),  # unsigned
        (0x6D, -1, 1, False),  # signed
        (0x6E, -1, 1, False),
        (0x4D, 6, 1, False),
        (0xAD, 1, -1, True),
        (0xCD, -1, 1, True),
        (0x3D, 1, 1, True),
        (0xDD, 2, 1, False),
    ],
)
def test_jumps(machine: Machine, code: int, left: int, right: int, jumps: bool) -> None:
    compared = ((0xB7, 3, 0, 0, left), (0xB7, 2, 0, 0, right), (0xB7, 0, 0, 0, 1), (code, 3, 2, 1, 0))
    assert stored(machine, *compared, (0xB7, 0, 0, 0, 0)) == jumps
    assert machine.counts["instructions"] == 9 - jumps


def test_reads_of_the_context(machine: Machine) -> None:
    assert stored(machine, (0x79, 0, 1, 0, 0)) == 2**64 - 5
    assert stored(machine, (0x69, 0, 1, 10, 0)) == 0x5566
    assert stored(machine, (0x71, 0, 1, 8, 0), (0xDC, 0, 0, 0, 16)) == 0x8800  # htons
    with pytest.raises(IndexError, match="outside"):
        stored(machine, (0x79, 0, 1, 600, 0))


def test_maps(machine: Machine) -> None:
    key = ((0x7A, 10, 0, -8, 1), (0xBF, 2, 10, 0, 0), (0x07, 2, 0, 0, -8))  # r2 = &(u64)1
    number = ((0x18, 1, 1, 0, NUMBERS), (0, 0, 0, 0, 0), *key, (0x85, 0, 0, 0, 1))
    assert stored(machine, *number, (0x79, 0, 0, 0, 0)) == 0
    assert stored(machine, *number, (0x79, 0, 0, -8, 0)) == 5
    known = ((0x18, 1, 1, 0, KNOWN), (0, 0, 0, 0, 0), *key)
    assert stored(machine, *known, (0x85, 0, 0, 0, 1)) == 0
    stored(machine, *known, (0xBF, 3, 10, 0, 0), (0x07, 3, 0, 0, -8), (0xB7, 4, 0, 0, 0), (0x85, 0, 0, 0, 2))
    increment = ((0xB7, 5, 0, 0, 4), (0xDB, 0, 5, 0, 0), (0x79, 0, 0, 0, 0))  # lock *(u64 *)r0 += 4
    assert stored(machine, *known, (0x85, 0, 0, 0, 1), *increment) == 5
    assert stored(machine, *known, (0x85, 0, 0, 0, 3)) == 0
    assert stored(machine, *known, (0x85, 0, 0, 0, 1)) == 0
    assert machine.counts["map_lookup"] == 5


def test_reads_of_a_process(machine: Machine) -> None:
    text = ctypes.create_string_buffer(b"nginx")
    address = ctypes.addressof(text)
    to = ((0xBF, 1, 10, 0, 0), (0x07, 1, 0, 0, -8), (0x7A, 10, 0, -8, -1), (0xB7, 2, 0, 0, 8))
    here = ((0x18, 3, 0, 0, address & 2**32 - 1 if address & 2**31 == 0 else (address & 2**32 - 1) - 2**32),)
    high = ((0, 0, 0, 0, address >> 32),)
    assert stored(machine, *to, *here, *high, (0x85, 0, 0, 0, 114)) == len("nginx") + 1
    assert stored(machine, *to, (0xB7, 3, 0, 0, 0), (0x85, 0, 0, 0, 112)) == 2**64 - 14
    assert stored(machine, *to, (0xB7, 3, 0, 0, 0), (0x85, 0, 0, 0, 112), (0x79, 0, 10, -8, 0)) == 0

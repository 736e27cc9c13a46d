"""Interprets BPF programs, and counts what they do: instructions, and calls of the kernel's helpers by name.

It has what BCC makes of probes/*.c, no more. Values of maps, the stack and the context are objects of the interpreter;
nginx's memory is that of a process that stands still.
"""

import os
import struct
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_INSTRUCTION = struct.Struct("<BBhi")
_SIZES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
_MASK, _MASK32 = 2**64 - 1, 2**32 - 1
_STACK_BYTES = 512
_EFAULT = 14

ARRAY = 2
"""BPF_MAP_TYPE_ARRAY. All other types of ours that a program looks into are hashes."""


@dataclass
class Map:
    """A map, empty, or an array of zeros."""

    kind: int
    key_bytes: int
    value_bytes: int
    entries: int
    content: bytes = b""
    """What an array begins with; the rest is 0."""


class Instruction(NamedTuple):
    code: int
    to: int
    source: int
    offset: int
    number: int


def parse(code: bytes) -> list[Instruction]:
    """Read a program's bytes; an instruction of 16 bytes is followed by one that means nothing."""
    parsed = []
    wide = False
    for start, (opcode, registers, offset, number) in zip(
        range(0, len(code), 8), _INSTRUCTION.iter_unpack(code), strict=True
    ):
        if opcode == 0x18 and not wide:
            high = _INSTRUCTION.unpack_from(code, start + 8)[3]
            number = number & _MASK32 | (high & _MASK32) << 32
        wide = opcode == 0x18 and not wide
        parsed.append(Instruction(opcode, registers & 15, registers >> 4, offset, number))
    return parsed


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


class Machine:
    """Runs programs that share maps. `maps` are by the number that stands for them in the programs' code."""

    def __init__(self, maps: Mapping[int, Map], tgid: int) -> None:
        self._maps = maps
        # A hash: the address of each key's value. An array: the address of all values, at the key b"".
        self._values: dict[int, dict[bytes, int]] = {number: {} for number in maps}
        self._pid_tgid = tgid << 32 | tgid
        self._memory = os.open(f"/proc/{tgid}/mem", os.O_RDONLY)
        self._objects: list[bytearray] = [bytearray()]
        self._stack, self._context, self._registers = (self.add(bytes(_STACK_BYTES)) for _ in range(3))
        self.records: list[bytes] = []
        """What the programs have sent."""
        self.tails: dict[int, list[Instruction]] = {}
        """The program in each map of programs, by the map's number. Such a map without a program here is empty."""
        self.counts: Counter[str] = Counter()
        """How many `instructions` ran, and how often each helper was called."""
        for number, each in maps.items():
            if each.kind == ARRAY:
                self._values[number][b""] = self.add(each.content.ljust(each.entries * each.value_bytes, b"\0"))

    def close(self) -> None:
        os.close(self._memory)

    def add(self, content: bytes) -> int:
        """Make an object; return its address. Its number is in the upper half: no object is at nginx's addresses."""
        self._objects.append(bytearray(content))
        return (1 << 20 | len(self._objects) - 1) << 32

    def put_context(self, content: bytes) -> int:
        """Set what the next run's context is; return its address."""
        self.write(self._context, content)
        return self._context

    def put_registers(self, content: bytes) -> int:
        """Set the registers of a system call; return their address."""
        self.write(self._registers, content)
        return self._registers

    def insert(self, number: int, key: bytes, value: bytes) -> None:
        """Add an entry to a hash."""
        self._values[number][key] = self.add(value)

    def write(self, address: int, content: bytes) -> None:
        memory, offset = self._at(address)
        memory[offset : offset + len(content)] = content

    def _at(self, address: int) -> tuple[bytearray, int]:
        memory, offset = self._objects[(address >> 32) - (1 << 20)], address & _MASK32
        if offset >= len(memory):
            raise IndexError(f"address {address:#x} is outside of its object")
        return memory, offset

    def read(self, address: int, count: int) -> bytes:
        memory, offset = self._at(address)
        return bytes(memory[offset : offset + count])

    def run(self, program: list[Instruction], context: int) -> None:
        """Run a program from beginning to end. Raise NotImplementedError at what BCC does not make of our text."""
        registers = [0] * 11
        registers[1], registers[10] = context, self._stack + _STACK_BYTES
        at = ran = 0
        while True:
            code, to, source, offset, number = program[at]
            at += 1
            ran += 1
            kind = code & 7
            if kind in (4, 7):  # arithmetic
                bits, mask = (64, _MASK) if kind == 7 else (32, _MASK32)
                left, operation = registers[to] & mask, code & 0xF0
                right = (registers[source] if code & 8 else number) & mask
                if operation == 0x00:
                    left += right
                elif operation == 0x10:
                    left -= right
                elif operation == 0x20:
                    left *= right
                elif operation == 0x30:
                    left = left // right if right else 0
                elif operation == 0x40:
                    left |= right
                elif operation == 0x50:
                    left &= right
                elif operation == 0x60:
                    left <<= right & bits - 1
                elif operation == 0x70:
                    left >>= right & bits - 1
                elif operation == 0x80:
                    left = -left
                elif operation == 0x90:
                    left = left % right if right else left
                elif operation == 0xA0:
                    left ^= right
                elif operation == 0xB0:
                    left = right
                elif operation == 0xC0:
                    left = _signed(left, bits) >> (right & bits - 1)
                else:  # the order of bytes
                    whole = (registers[to] & (1 << number) - 1).to_bytes(number // 8, "little")
                    left, mask = int.from_bytes(whole, "big" if code & 8 else "little"), _MASK
                registers[to] = left & mask
            elif kind == 1:
                memory, place = self._at(registers[source] + offset & _MASK)
                registers[to] = int.from_bytes(memory[place : place + _SIZES[code & 0x18]], "little")
            elif kind in (2, 3):
                size = _SIZES[code & 0x18]
                memory, place = self._at(registers[to] + offset & _MASK)
                value = number if kind == 2 else registers[source]
                if code & 0xE0 == 0xC0:
                    if number:
                        raise NotImplementedError(f"atomic operation {number:#x}")
                    value += int.from_bytes(memory[place : place + size], "little")
                memory[place : place + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            elif code == 0x18:
                registers[to] = number
                at += 1
            elif code == 0x05:
                at += offset
            elif code == 0x95:
                break
            elif code == 0x85:
                if source:
                    raise NotImplementedError("a call of another function")
                if number == 12 and registers[2] in self.tails:
                    program, at = self.tails[registers[2]], 0
                    self.counts["tail_call"] += 1
                    continue
                registers[0] = self._call(number, registers) & _MASK
            else:
                bits, mask = (64, _MASK) if kind == 5 else (32, _MASK32)
                left, operation = registers[to] & mask, code & 0xF0
                right = (registers[source] if code & 8 else number) & mask
                if operation & 0xF0 in (0x60, 0x70, 0xC0, 0xD0):
                    left, right = _signed(left, bits), _signed(right, bits)
                if (
                    (operation == 0x10 and left == right)
                    or (operation in (0x20, 0x60) and left > right)
                    or (operation in (0x30, 0x70) and left >= right)
                    or (operation == 0x40 and left & right)
                    or (operation == 0x50 and left != right)
                    or (operation in (0xA0, 0xC0) and left < right)
                    or (operation in (0xB0, 0xD0) and left <= right)
                ):
                    at += offset
        self.counts["instructions"] += ran

    def _call(self, helper: int, registers: list[int]) -> int:
        if helper not in _HELPERS:
            raise NotImplementedError(f"helper {helper}")
        name = _HELPERS[helper]
        self.counts[name] += 1
        result: int = getattr(self, f"_{name}")(*registers[1:6])
        return result

    def _map_lookup(self, number: int, key: int, *_: int) -> int:
        table = self._maps[number]
        wanted = self.read(key, table.key_bytes)
        if table.kind != ARRAY:
            return self._values[number].get(wanted, 0)
        index = int.from_bytes(wanted, "little")
        return self._values[number][b""] + index * table.value_bytes if index < table.entries else 0

    def _map_update(self, number: int, key: int, value: int, flags: int, *_: int) -> int:
        table = self._maps[number]
        found, content = self._map_lookup(number, key), self.read(value, table.value_bytes)
        if found and flags & 1:  # BPF_NOEXIST
            return -17
        if found:
            self.write(found, content)
        else:
            self._values[number][self.read(key, table.key_bytes)] = self.add(content)
        return 0

    def _map_delete(self, number: int, key: int, *_: int) -> int:
        return 0 if self._values[number].pop(self.read(key, self._maps[number].key_bytes), 0) else -2

    def _probe_read_user(self, to: int, count: int, address: int, *_: int) -> int:
        try:
            content = os.pread(self._memory, count, address) if 0 < address < 1 << 47 else b""
        except OSError:
            content = b""
        self.write(to, content.ljust(count, b"\0"))
        return 0 if len(content) == count else -_EFAULT

    def _probe_read_user_str(self, to: int, count: int, address: int, *_: int) -> int:
        text = b""
        while b"\0" not in text and len(text) < count:
            try:
                more = os.pread(self._memory, min(256, count - len(text)), address + len(text))
            except OSError:
                more = b""
            if not more:
                return -_EFAULT
            text += more
        text = text.partition(b"\0")[0][: count - 1] + b"\0"
        self.write(to, text)
        return len(text)

    def _probe_read_kernel(self, to: int, count: int, address: int, *_: int) -> int:
        self.write(to, self.read(address, count))
        return 0

    def _clock(self, *_: int) -> int:
        return time.monotonic_ns()

    def _random(self, *_: int) -> int:
        return int.from_bytes(os.urandom(4), "little")

    def _process(self, *_: int) -> int:
        return self._pid_tgid

    def _process_in_namespace(self, _device: int, _inode: int, to: int, *_: int) -> int:
        self.write(to, struct.pack("<Q", self._pid_tgid))
        return 0

    def _tail_call(self, _context: int, number: int, *_: int) -> int:
        return -2  # the map is empty

    def _ring_buffer(self, _map: int, content: int, count: int, *_: int) -> int:
        self.records.append(self.read(content, count))
        return 0


_HELPERS = {
    1: "map_lookup",
    2: "map_update",
    3: "map_delete",
    5: "clock",
    7: "random",
    12: "tail_call",
    14: "process",
    112: "probe_read_user",
    113: "probe_read_kernel",
    114: "probe_read_user_str",
    120: "process_in_namespace",
    130: "ring_buffer",
}
"""enum bpf_func_id."""

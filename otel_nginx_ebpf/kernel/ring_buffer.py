"""Reads a BPF ring buffer and a counter map through mmap: no BCC, no libbpf, no system call, no capability.

The layout is the kernel's ABI (Linux kernel/bpf/ringbuf.c): a page with the consumer's position, read-write; then,
read-only, a page with the producer's position and the data, mapped twice in a row so that a record never wraps.
"""

import mmap
import os
import struct
from collections.abc import Iterator

_POSITION = struct.Struct("<Q")
_HEADER = struct.Struct("<II")
_BUSY = 1 << 31
_DISCARDED = 1 << 30


class RingBuffer:
    """The consumer's side. Owns the map's descriptor."""

    def __init__(self, descriptor: int, data_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._descriptor = descriptor
        self._mask = data_bytes - 1
        self._consumer = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._producer = mmap.mmap(descriptor, page + 2 * data_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._data_start = page

    def read(self) -> Iterator[bytes]:
        """The records that are complete now, oldest first. Space is given back when the iterator ends or is closed."""
        position = _POSITION.unpack_from(self._consumer, 0)[0]
        end = _POSITION.unpack_from(self._producer, 0)[0]
        try:
            while position < end:
                at = self._data_start + (position & self._mask)
                length = _HEADER.unpack_from(self._producer, at)[0]
                if length & _BUSY:
                    return
                start = at + _HEADER.size
                size = length & ~_DISCARDED
                position += (_HEADER.size + size + 7) & ~7
                if not length & _DISCARDED:
                    yield self._producer[start : start + size]
        finally:
            _POSITION.pack_into(self._consumer, 0, position)

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()
        os.close(self._descriptor)


class CounterArray:
    """An mmap-able BPF array of 64-bit counters. Owns the map's descriptor."""

    def __init__(self, descriptor: int, length: int) -> None:
        self._descriptor = descriptor
        self._struct = struct.Struct(f"<{length}Q")
        self._mapped = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)

    def read(self) -> tuple[int, ...]:
        return self._struct.unpack_from(self._mapped, 0)

    def close(self) -> None:
        self._mapped.close()
        os.close(self._descriptor)

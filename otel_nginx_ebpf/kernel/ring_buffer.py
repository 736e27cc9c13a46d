"""Reads a BPF ring buffer and a counter map through mmap: no BCC, no libbpf, no capability.

The layout is the kernel's ABI (Linux kernel/bpf/ringbuf.c): a page with the consumer's position, read-write; then,
read-only, a page with the producer's position and the data, there twice in a row so that a record never wraps.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterator

_HEADER = struct.Struct("<II")
_BUSY = 1 << 31
_DISCARDED = 1 << 30

# So much of the data is mapped at a time, and only while it is read: what is mapped counts as this process's memory,
# twice over were it the whole. Many times the longest record.
_WINDOW_BYTES = 1 << 20


class RingBuffer:
    """The consumer's side. Owns the map's descriptor."""

    def __init__(self, descriptor: int, data_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._descriptor = descriptor
        self._mask = data_bytes - 1
        # As numbers, each read and written by one machine instruction: struct.pack_into writes zeros first, and to a
        # worker that sees those the buffer is full.
        writable = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._consumed = memoryview(writable).cast("Q")
        self._produced = memoryview(mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)).cast("Q")

    def fill(self) -> float:
        """How much of it waits to be read: 0 to 1."""
        return (self._produced[0] - self._consumed[0]) / (self._mask + 1)

    def read(self, given_back: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """The records that are complete now, oldest first.

        Space is given back after each window, and when the iterator ends or is closed; then `given_back` is called.
        """
        position = self._consumed[0]
        end = self._produced[0]
        while position < end:
            in_page = position % mmap.PAGESIZE
            with self._map(position - in_page, end) as window:
                at = in_page
                try:
                    while at < len(window):
                        length = _HEADER.unpack_from(window, at)[0]
                        if length & _BUSY:
                            return
                        start = at + _HEADER.size
                        stop = start + (length & ~_DISCARDED)
                        if stop > len(window):
                            break
                        at = (stop + 7) & ~7
                        if not length & _DISCARDED:
                            yield window[start:stop]
                finally:
                    position += at - in_page
                    self._give_back_to(position)
                    given_back()

    def _give_back_to(self, position: int) -> None:
        self._consumed[0] = position

    def _map(self, position: int, end: int) -> mmap.mmap:
        """A window of the data, from the start of a page on."""
        length = min(end - position, _WINDOW_BYTES)
        offset = 2 * mmap.PAGESIZE + (position & self._mask)
        return mmap.mmap(self._descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)

    def close(self) -> None:
        self._consumed.release()
        self._produced.release()
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

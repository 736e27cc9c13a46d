"""Reads a BPF ring buffer and a counter map through mmap. This needs no BCC, no libbpf and no capability.

The layout is the kernel's ABI (Linux kernel/bpf/ringbuf.c). First comes a writable page with the consumer's position.
Then come read-only pages: the producer's position, and the data twice in a row, so that a record never wraps.

The kernel stores a record before its length, and the length before the producer's position; and it writes over a record
once it reads a later consumer's position. A processor such as arm64 may make reads in another order. Python has no
instruction against this, but a lock has: a thread that gets a lock sees what others wrote before they gave it back. So
to give a lock back and get it again separates what comes before from what comes after.
"""

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator

from otel_nginx_ebpf.machine import this_machine

_HEADER = struct.Struct("<II")
_BUSY = 1 << 31
_DISCARDED = 1 << 30

# How much of the data is mapped at a time, and only while it is read. Mapped pages count as this process's memory; the
# whole buffer would count twice. This is many times the longest record.
_WINDOW_BYTES = 1 << 20


class RingBuffer:
    """The consumer's side. Owns the map's descriptor."""

    def __init__(self, descriptor: int, data_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._descriptor = descriptor
        self._mask = data_bytes - 1
        # Cast to numbers, so that one machine instruction reads or writes each position. struct.pack_into writes zeros
        # first; a worker that sees the zeros takes the buffer for full.
        writable = mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._consumed = memoryview(writable).cast("Q")
        self._produced = memoryview(mmap.mmap(descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)).cast("Q")
        self._weakly_ordered = this_machine().weakly_ordered
        self._held = threading.Lock()
        self._held.acquire()

    def fill(self) -> float:
        """Returns the share of the buffer that waits to be read, from 0 to 1."""
        return (self._produced[0] - self._consumed[0]) / (self._mask + 1)

    def read(self, given_back: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """Yields the records that are complete now, oldest first.

        Frees the space after each window, and when the iterator ends or is closed. Calls `given_back` after that.
        """
        position = self._consumed[0]
        end = self._produced[0]
        if self._weakly_ordered:
            self._separate()
        while position < end:
            in_page = position % mmap.PAGESIZE
            with self._map(position - in_page, end) as window:
                at = in_page
                try:
                    while at < len(window):
                        length = _HEADER.unpack_from(window, at)[0]
                        if length & _BUSY:
                            return
                        if self._weakly_ordered:
                            self._separate()
                        start = at + _HEADER.size
                        stop = start + (length & ~_DISCARDED)
                        if stop > len(window):
                            break
                        at = (stop + 7) & ~7
                        if not length & _DISCARDED:
                            yield window[start:stop]
                finally:
                    position += at - in_page
                    if self._weakly_ordered:
                        self._separate()
                    self._give_back_to(position)
                    given_back()

    def _separate(self) -> None:
        """Keeps the processor from moving a read or write across this call.

        To release is no earlier than all that comes before, to acquire is no later than all that comes after, and a
        processor keeps an acquire behind the release before it (Arm Architecture Reference Manual, B2.3).
        """
        self._held.release()
        self._held.acquire()

    def _give_back_to(self, position: int) -> None:
        self._consumed[0] = position

    def _map(self, position: int, end: int) -> mmap.mmap:
        """Maps a window of the data. `position` must be the start of a page."""
        length = min(end - position, _WINDOW_BYTES)
        offset = 2 * mmap.PAGESIZE + (position & self._mask)
        return mmap.mmap(self._descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)

    def close(self) -> None:
        self._consumed.release()
        self._produced.release()
        os.close(self._descriptor)


class CounterArray:
    """A BPF array of 64-bit counters that can be mapped. Owns the map's descriptor."""

    def __init__(self, descriptor: int, length: int) -> None:
        self._descriptor = descriptor
        self._struct = struct.Struct(f"<{length}Q")
        self._mapped = mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)

    def read(self) -> tuple[int, ...]:
        return self._struct.unpack_from(self._mapped, 0)

    def close(self) -> None:
        self._mapped.close()
        os.close(self._descriptor)

"""The reader of the kernel's ring buffer, on a file with the layout of the kernel's buffer."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from otel_nginx_ebpf.kernel import ring_buffer
from otel_nginx_ebpf.kernel.ring_buffer import RingBuffer

PAGE = os.sysconf("SC_PAGE_SIZE")
DATA_BYTES = 4 << 20
BUSY, DISCARDED = 1 << 31, 1 << 30


class Producer:
    """The kernel's side: positions only grow, and the data is there twice in a row."""

    def __init__(self, position: int = 0) -> None:
        self.file = os.memfd_create("ring buffer")
        os.ftruncate(self.file, 2 * PAGE + 2 * DATA_BYTES)
        self.position = position
        self._set(0, position)
        self._set(PAGE, position)
        self.reader = RingBuffer(os.dup(self.file), DATA_BYTES)

    def _set(self, offset: int, position: int) -> None:
        os.pwrite(self.file, struct.pack("<Q", position), offset)

    @property
    def consumed(self) -> int:
        return int(struct.unpack("<Q", os.pread(self.file, 8, 0))[0])

    def write(self, record: bytes, flags: int = 0) -> None:
        raw = struct.pack("<II", len(record) | flags, 0) + record
        raw += bytes(-len(raw) % 8)
        at = self.position % DATA_BYTES
        low, high = raw[: DATA_BYTES - at], raw[DATA_BYTES - at :]
        for start, part in ((at, low), (0, high)):
            for copy in (0, DATA_BYTES):
                os.pwrite(self.file, part, 2 * PAGE + copy + start)
        self.position += len(raw)
        self._set(PAGE, self.position)


@pytest.fixture(params=[0, DATA_BYTES - 24, 7 * DATA_BYTES - PAGE - 8])
def producer(request: pytest.FixtureRequest) -> Iterator[Producer]:
    """From the beginning, across the end, and a page before it."""
    made = Producer(request.param)
    yield made
    made.reader.close()
    os.close(made.file)


def mapped_kib() -> int:
    """Of the ring buffer, by this process."""
    with open("/proc/self/smaps", encoding="ascii") as file:
        mappings = file.read().split("/memfd:ring buffer")[1:]
    return sum(int(each.split("Size:")[1].split()[0]) for each in mappings)


def test_records_of_every_length_arrive_in_order(producer: Producer) -> None:
    records = [os.urandom(length % 5000) for length in range(0, 300_000, 331)]
    assert sum(map(len, records)) > 2 * ring_buffer._WINDOW_BYTES
    for record in records:
        producer.write(record)
    assert list(producer.reader.read()) == records
    assert producer.consumed == producer.position
    assert list(producer.reader.read()) == []


def test_what_is_not_complete_ends_the_reading_until_it_is(producer: Producer) -> None:
    producer.write(b"one")
    at = producer.position
    producer.write(b"two", BUSY)
    producer.write(b"three")
    assert list(producer.reader.read()) == [b"one"]
    assert list(producer.reader.read()) == []
    assert producer.consumed == at
    end, producer.position = producer.position, at
    producer.write(b"two")
    producer.position = end
    producer._set(PAGE, end)
    assert list(producer.reader.read()) == [b"two", b"three"]


def test_what_the_program_discarded_is_passed_over(producer: Producer) -> None:
    producer.write(b"one")
    producer.write(b"never mind", DISCARDED)
    producer.write(b"two")
    assert list(producer.reader.read()) == [b"one", b"two"]
    assert producer.consumed == producer.position


def test_space_is_given_back_where_reading_stops_and_little_is_mapped_meanwhile(producer: Producer) -> None:
    for _ in range(2000):
        producer.write(bytes(1000))
    at_rest = mapped_kib()
    begin = producer.consumed
    reading = producer.reader.read()
    for _ in range(1500):
        next(reading)
    assert at_rest < mapped_kib() <= at_rest + (ring_buffer._WINDOW_BYTES >> 10)
    assert begin + ring_buffer._WINDOW_BYTES // 2 < producer.consumed < producer.position
    reading.close()
    assert producer.consumed == begin + 1500 * 1008
    assert mapped_kib() == at_rest


WATCH = """
import mmap, sys
consumed = memoryview(mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
print("watching", flush=True)
print(min(consumed[0] for _ in range(3_000_000)))
"""


def test_a_position_changes_at_once() -> None:
    """Whoever looks meanwhile, as the kernel does, finds the old one or the new one."""
    producer = Producer(7 * DATA_BYTES)
    command = [sys.executable, "-c", WATCH, str(producer.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[producer.file], text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        while watcher.poll() is None:
            for position in range(producer.position, producer.position + 80_000, 8):
                producer.reader._give_back_to(position)
        assert int(watcher.stdout.read()) >= producer.position
    producer.reader.close()
    os.close(producer.file)

"""Messages that wait for the collector on disk: all arrive in order, also after a restart, and damage is counted."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.otlp import delivery as otlp
from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir, Stored
from otel_nginx_ebpf.export.otlp.sender import make_sender
from otel_nginx_ebpf.linux import checked, libc
from otel_nginx_ebpf.metrics.stats import Stats
from unit.otlp_receiver import GrpcReceiver
from unit.sample_traces import renumbered, static_trace

MIB = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def wait_until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where no collector is yet."""
    with GrpcReceiver() as gone:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{gone.port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    return gone.port


def exporter(
    stats: Stats, directory: Path, *, disk_bytes: int = MIB, queue_bytes: int = MIB, batch_spans: int = 20
) -> OtlpExporter:
    """Messages of 10 traces each."""
    return OtlpExporter(
        make_sender("grpc"),
        Resource({}),
        stats,
        queue_spans=10**6,
        queue_bytes=queue_bytes,
        batch_spans=batch_spans,
        delay_s=0.1,
        queue_dir=QueueDir(directory, disk_bytes),
    )


def offer(subject: OtlpExporter, stats: Stats, count: int) -> None:
    for _ in range(count):
        stats.received += 1
        subject.export(renumbered(static_trace(), stats.received))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.otlp.gz"))


def test_what_memory_would_not_hold_waits_on_disk_and_comes_in_order(port: int, tmp_path: Path) -> None:
    stats = Stats()
    subject = exporter(stats, tmp_path / "queue", queue_bytes=100_000)
    offer(subject, stats, 20)
    wait_until(lambda: len(files(tmp_path / "queue")) >= 2)
    for _ in range(20):
        offer(subject, stats, 100)
        # 2,000 traces are 800 kB.
        wait_until(lambda: subject._held.bytes < 20_000)
    assert sum(path.stat().st_mode & 0o77 for path in (tmp_path / "queue").iterdir()) == 0, "for its owner only"
    with GrpcReceiver(port) as receiver:
        wait_until(lambda: len(receiver.trace_ids) >= 2020)
        subject.shutdown(10)
    assert receiver.trace_ids == list(range(1, 2021))
    assert (stats.exported, stats.lost, files(tmp_path / "queue")) == (2020, {}, [])


def test_a_message_that_would_fill_all_memory_goes_to_disk_too(port: int, tmp_path: Path) -> None:
    """--queue-mib 1 is less than a message's 2 MiB."""
    stats = Stats()
    subject = exporter(stats, tmp_path, disk_bytes=8 * MIB, batch_spans=10**6)
    offer(subject, stats, 1)
    wait_until(lambda: files(tmp_path))
    largest = 0
    for _ in range(80):
        offer(subject, stats, 100)
        largest = max(largest, subject._held.bytes)
        wait_until(lambda: subject._held.bytes < MIB // 2)
    assert stats.received * largest / 100 > 2 * MIB
    with GrpcReceiver(port) as receiver:
        subject.shutdown(10)
    assert sorted(receiver.trace_ids) == list(range(1, stats.received + 1))
    assert (stats.exported, stats.lost, files(tmp_path)) == (stats.received, {}, [])


def test_what_is_left_waits_for_the_next_run(port: int, tmp_path: Path) -> None:
    stats = Stats()
    subject = exporter(stats, tmp_path)
    offer(subject, stats, 95)
    subject.shutdown(0)
    assert (stats.received, stats.exported, stats.kept, stats.lost) == (95, 0, 95, {})
    assert "exported 0, kept for the next run 95, lost 0" in stats.summary()
    later = Stats()
    with GrpcReceiver(port) as receiver:
        subject = exporter(later, tmp_path)
        offer(subject, later, 5)
        wait_until(lambda: len(receiver.trace_ids) >= 100)
        subject.shutdown(10)
    assert receiver.trace_ids == [*range(1, 96), *range(96, 101)]
    assert (later.received, later.exported, later.kept, later.lost) == (100, 100, 0, {})


def test_a_killed_run_loses_only_what_was_in_memory(port: int, tmp_path: Path) -> None:
    stats = Stats()
    killed = exporter(stats, tmp_path)
    offer(killed, stats, 100)
    wait_until(lambda: len(files(tmp_path)) == 10)
    (tmp_path / "000000000099-1-1.otlp.gz.new").write_bytes(b"unfinished")
    # As the kernel would: the lock goes, nothing else is done.
    killed._sender.shutdown()
    killed._abandoned = True
    assert killed._queue_dir
    killed._queue_dir.close()
    later = Stats()
    with GrpcReceiver(port) as receiver:
        subject = exporter(later, tmp_path)
        wait_until(lambda: len(receiver.trace_ids) >= 100)
        subject.shutdown(10)
    assert sorted(receiver.trace_ids) == list(range(1, 101))
    assert (later.received, later.exported, later.lost) == (100, 100, {})
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"", lambda raw: raw[:40] + b"\0\0\0" + raw[43:]])
def test_damage_is_set_aside_and_counted(damage: Callable[[bytes], bytes], port: int, tmp_path: Path) -> None:
    subject = exporter(stats := Stats(), tmp_path)
    offer(subject, stats, 30)
    subject.shutdown(0)
    second = tmp_path / files(tmp_path)[1]
    second.write_bytes(damage(second.read_bytes()))
    (tmp_path / "notes.txt").write_text("not ours")
    later = Stats()
    with GrpcReceiver(port) as receiver:
        subject = exporter(later, tmp_path)
        wait_until(lambda: len(receiver.trace_ids) >= 20)
        subject.shutdown(10)
    assert receiver.trace_ids == [*range(1, 11), *range(21, 31)]
    assert (later.received, later.exported, later.lost) == (30, 20, {"lost_queue_file_damaged": 10})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["lock", "notes.txt", second.name + ".damaged"])


def exchange(one: Path, other: Path) -> None:
    """Swap two names, so that at no time a name is gone."""
    checked(libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE))


def test_a_file_that_cannot_be_read_now_is_read_later(
    port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with too many open files. The others need not wait for it."""
    subject = exporter(stats := Stats(), tmp_path)
    offer(subject, stats, 30)
    subject.shutdown(0)
    first = tmp_path / files(tmp_path)[0]
    hidden = first.rename(tmp_path / "hidden")
    first.mkdir()
    later = Stats()
    with GrpcReceiver(port) as receiver:
        subject = exporter(later, tmp_path)
        wait_until(lambda: len(receiver.trace_ids) >= 20)
        assert "Is a directory" in caplog.text
        exchange(hidden, first)
        hidden.rmdir()
        wait_until(lambda: len(receiver.trace_ids) >= 30)
        subject.shutdown(10)
    assert receiver.trace_ids == [*range(11, 31), *range(1, 11)]
    assert (later.exported, later.lost, files(tmp_path)) == (30, {}, [])


def test_a_disk_that_is_slow_at_the_end_stores_nothing_twice(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is real, but for its pace."""
    stored = QueueDir.store
    writing = threading.Event()

    def slowly(directory: QueueDir, message: bytes, traces: int, spans: int) -> Stored | None:
        writing.set()
        time.sleep(otlp._ABORT_S + 0.5)
        return stored(directory, message, traces, spans)

    monkeypatch.setattr(QueueDir, "store", slowly)
    stats = Stats()
    subject = exporter(stats, tmp_path)
    offer(subject, stats, 10)
    assert writing.wait(10)
    subject.shutdown(0)
    assert (stats.kept, stats.lost, len(files(tmp_path))) == (10, {}, 1)
    assert subject._queue_dir
    assert subject._queue_dir.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_full_disk_leaves_memory_and_then_the_rest_is_counted(
    port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = Stats()
    subject = exporter(stats, tmp_path, disk_bytes=5_000, queue_bytes=100_000)
    offer(subject, stats, 10)
    wait_until(lambda: files(tmp_path))
    offer(subject, stats, 1_000)
    wait_until(lambda: ": full (" in caplog.text)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5_000
    with GrpcReceiver(port) as receiver:
        subject.shutdown(20)
    assert receiver.trace_ids == sorted(receiver.trace_ids)
    assert stats.exported == len(receiver.trace_ids) > 200
    assert stats.lost == {"lost_queue_full": 1_010 - stats.exported}


def test_a_directory_that_another_program_uses(tmp_path: Path) -> None:
    first = QueueDir(tmp_path, MIB)
    with pytest.raises(UserError, match="another otel-nginx-ebpf uses it"):
        QueueDir(tmp_path, MIB)
    first.close()
    QueueDir(tmp_path, MIB).close()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--queue-dir .*file: "):
        QueueDir(tmp_path / "file", MIB)

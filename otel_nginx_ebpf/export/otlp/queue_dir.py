"""Stores messages on disk while the collector does not accept them. They outlive the program.

Each message is a file: an ExportTraceServiceRequest, compressed by gzip, whose checksum tells whether the file is
complete. The file's name holds the message's place in the queue and its numbers of traces and spans.
"""

import fcntl
import gzip
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.process import privileges

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{12})-(\d{1,9})-(\d{1,9})\.otlp\.gz")
_FASTEST = 1


class Stored(NamedTuple):
    """A message on disk."""

    path: Path
    traces: int
    spans: int


class QueueDir:
    """A directory of messages. Only one program at a time may use it. Only one thread at a time may call `store`.

    Raises:
        UserError: The directory cannot be used, or another program uses it.
    """

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._full = False
        self._unreadable: set[Path] = set()
        self._counting = threading.Lock()
        try:
            for each in (directory.parent, directory):  # `mode` does not count for what `parents` makes
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in directory.glob("*.new"):
                unfinished.unlink()
            found = sorted(directory.iterdir())
            self.bytes = sum(path.stat().st_size for path in found)
        except BlockingIOError:
            raise UserError(f"--queue-dir {directory}: another otel-nginx-ebpf uses it") from None
        except OSError as error:
            raise UserError(f"--queue-dir {directory}: {privileges.whose(error)}") from error
        matches = [(path, match) for path in found if (match := _NAME.fullmatch(path.name))]
        self._next = 1 + max((int(match[1]) for _, match in matches), default=0)
        self._left_behind = [Stored(path, int(match[2]), int(match[3])) for path, match in matches]

    def left_behind(self) -> Iterator[Stored]:
        """Yields the messages that an earlier run did not deliver, oldest first."""
        yield from self._left_behind

    def store(self, message: bytes, traces: int, spans: int) -> Stored | None:
        """Writes a message to the end of the queue. Returns None if there is no room or the disk refuses the file."""
        packed = gzip.compress(message, _FASTEST, mtime=0)
        problem = f"full ({self._bytes_max >> 20} MiB)" if self.bytes + len(packed) > self._bytes_max else ""
        path = self._directory / f"{self._next:012}-{traces}-{spans}.otlp.gz"
        unfinished = path.with_suffix(".new")
        if not problem:
            try:
                with open(unfinished, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                    file.write(packed)
                unfinished.rename(path)
            except OSError as error:
                problem = str(error.strerror)
                with suppress(OSError):  # a disk that has become read-only refuses this too
                    unfinished.unlink()
        if problem:
            if not self._full:
                logger.warning("--queue-dir %s: %s; nothing more is stored now", self._directory, problem)
            self._full = True
            return None
        self._full = False
        self._next += 1
        self._count(len(packed))
        return Stored(path, traces, spans)

    def load(self, stored: Stored) -> bytes | None:
        """Reads a stored message. If its file is damaged, renames the file to `*.damaged`, logs that and returns None.

        Raises:
            OSError: The file cannot be read now (too many open files, a failing disk); logged once.
        """
        try:
            packed = stored.path.read_bytes()
            if not packed:  # an empty file would decompress to an empty message without an error
                raise EOFError("it is empty")
            return gzip.decompress(packed)
        except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            aside = stored.path.with_name(stored.path.name + ".damaged")
            try:
                stored.path.rename(aside)
            except OSError:
                aside = stored.path
            logger.error("--queue-dir: a file is damaged and kept as %s: %s", aside, error)
            return None
        except OSError as error:
            if stored.path not in self._unreadable:
                self._unreadable.add(stored.path)
                logger.warning("--queue-dir: cannot read %s now, will retry: %s", stored.path, error.strerror)
            raise

    def forget(self, stored: Stored) -> None:
        """Removes a message that is no longer needed."""
        try:
            size = stored.path.stat().st_size
            stored.path.unlink()
        except OSError as error:
            logger.error("--queue-dir: cannot remove %s: %s", stored.path, error.strerror)
        else:
            self._count(-size)

    def _count(self, size: int) -> None:
        with self._counting:
            self.bytes += size

    def close(self) -> None:
        """Releases the directory for other programs."""
        os.close(self._lock)

"""Capture files: unchanged kernel records, for replay on any machine.

    MAGIC, u32 bytes of the header, u32 CRC-32 of the header, the header as JSON
    u32 bytes of the record, s64 Unix time minus monotonic time in ns, u32 CRC-32 of both, the record   * n

Numbers are little-endian. The header describes the layout of the records. If the layout is not this program's, reading
the file raises an error, because the program would misread the records.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.traces.abi import LIMITS, REQUEST_RECORD, STRING_HEADER, STRING_KINDS, UPSTREAM_ATTEMPT
from otel_nginx_ebpf.traces.error_log import LOG_LINE

MAGIC = b"otel-nginx-ebpf capture 1\n"

_HEADER_PREFIX = struct.Struct("<II")
_FRAME_PREFIX = struct.Struct("<IqI")
FRAME_BYTES = _FRAME_PREFIX.size
"""The size of a frame without its record."""
_OFFSET = struct.Struct("<q")
_OFFSET_IN_PREFIX = slice(4, 12)
_HEADER_BYTES_MAX = 1 << 20


class CaptureError(Exception):
    """The file is damaged or cut short. The message says at which byte."""


def record_layout() -> dict[str, Any]:
    """Returns the layout of records. The writer and the reader of a file must have equal layouts."""
    structs = (REQUEST_RECORD, UPSTREAM_ATTEMPT, STRING_HEADER, LOG_LINE)
    return {
        "structs": {layout.name: [list(field) for field in layout.fields] for layout in structs},
        "string_kinds": STRING_KINDS,
    }


class Frame(NamedTuple):
    """One record, and Unix time minus monotonic time when the record was taken."""

    unix_offset_ns: int
    raw: bytes


def create(path: Path) -> int:
    """Creates a file, or empties an existing file. Returns its descriptor.

    Only the owner can read a new file, because it will hold what clients sent.

    Raises:
        UserError: The file cannot be created.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot write the capture file {path}: {error.strerror}") from error


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to the capture file: {error.strerror}; stopping") from error


class CaptureWriter:
    """Writes a capture file.

    Raises:
        UserError: The file cannot be created or written, for example because no space is left.
    """

    def __init__(self, file: Path | int, about: Mapping[str, str]) -> None:
        """Creates or replaces the file. If `file` is a descriptor, writes to it and owns it.

        `about` goes into the header. It tells readers where the records come from.
        """
        self._file: BinaryIO = open(create(file) if isinstance(file, Path) else file, "wb")  # noqa: SIM115
        self.records = 0
        self.bytes = 0
        header = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "program": __version__,
            "about": {"kernel": os.uname().release, **about},
            "record": record_layout(),
        }
        raw = json.dumps(header).encode()
        self._write(MAGIC + _HEADER_PREFIX.pack(len(raw), zlib.crc32(raw)) + raw)

    def append(self, unix_offset_ns: int, raw: bytes) -> None:
        checksum = zlib.crc32(raw, zlib.crc32(_OFFSET.pack(unix_offset_ns)))
        self._write(_FRAME_PREFIX.pack(len(raw), unix_offset_ns, checksum) + raw)
        self.records += 1

    def _write(self, data: bytes) -> None:
        with _told():
            self._file.write(data)
        self.bytes += len(data)

    def flush(self) -> None:
        with _told():
            self._file.flush()

    def close(self) -> None:
        with _told():
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _header(file: BinaryIO, path: Path) -> dict[str, Any]:
    if file.read(len(MAGIC)) != MAGIC:
        raise UserError(f"{path} is not a capture file of this version: it does not begin with {MAGIC!r}")
    prefix = file.read(_HEADER_PREFIX.size)
    if len(prefix) < _HEADER_PREFIX.size:
        raise CaptureError(f"{path}: the header is cut short at byte {len(MAGIC) + len(prefix)}")
    length, checksum = _HEADER_PREFIX.unpack(prefix)
    raw = file.read(length) if length <= _HEADER_BYTES_MAX else b""
    if len(raw) != length or zlib.crc32(raw) != checksum:
        raise CaptureError(f"{path}: the header at byte {len(MAGIC)} is damaged")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CaptureError(f"{path}: the header at byte {len(MAGIC)} is not a JSON object")
    return header


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a capture file: when, where and by which version the file was written.

    Raises:
        UserError: The file is not a capture file, or cannot be opened.
        CaptureError: The header is damaged.
    """
    with _open(path) as file:
        return _header(file, path)


def read_capture(path: Path) -> Iterator[Frame]:
    """Yields the records of a capture file in order. Holds one record in memory at a time.

    Raises:
        UserError: The file is not a capture file, its records have another layout, or it cannot be opened.
        CaptureError: The file is damaged. All records before the damage have been yielded.
    """
    with _open(path) as file:
        header = _header(file, path)
        if header.get("record") != record_layout():
            raise UserError(
                f"{path} was written by otel-nginx-ebpf {header.get('program')}, which lays records out in "
                f"another way than this version, {__version__}: replay it with that version"
            )
        start = file.tell()
        while True:
            prefix = file.read(_FRAME_PREFIX.size)
            if not prefix:
                return
            if len(prefix) < _FRAME_PREFIX.size:
                raise CaptureError(f"{path}: cut short in the frame at byte {start}")
            length, unix_offset_ns, checksum = _FRAME_PREFIX.unpack(prefix)
            if length > LIMITS["RECORD_BYTES_MAX"]:
                raise CaptureError(f"{path}: damaged at byte {start}: a record of {length} bytes")
            raw = file.read(length)
            if len(raw) < length:
                raise CaptureError(f"{path}: cut short in the frame at byte {start}")
            if zlib.crc32(raw, zlib.crc32(prefix[_OFFSET_IN_PREFIX])) != checksum:
                raise CaptureError(f"{path}: damaged at byte {start}: wrong checksum")
            yield Frame(unix_offset_ns, raw)
            start += _FRAME_PREFIX.size + length


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read the capture file {path}: {error.strerror}") from error

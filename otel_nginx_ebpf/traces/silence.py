"""Finds a boundary whose function is exported and probed and yet never called, because the compiler has inlined it.

Its silence shows in records that it should have marked. Of the boundaries only HTTP/2's can fall silent: nginx calls
the others' functions through pointers, or from several places. Pure.
"""

import struct

from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, c_enum

BOUNDARY = "HTTP/2 response begins"

# So many records that lack the mark, and none that has it.
_ENOUGH = 20

_U64 = struct.Struct("<Q")
_FIRST_WRITE_NS = REQUEST_RECORD.offset("first_write_ns")
_BYTES_SENT = REQUEST_RECORD.offset("bytes_sent")
_COARSE_START = REQUEST_RECORD.offset("coarse_start")
_HTTP_VERSION = REQUEST_RECORD.offset("http_version")
_HTTP_2 = c_enum("http_version")["HTTP_VERSION_2"]


class SilenceWatch:
    """Counts HTTP/2 responses without the mark of their beginning, until one has it."""

    def __init__(self) -> None:
        self._unmarked = 0
        self._decided = False

    def fell_silent(self, raw: bytes) -> bool:
        """Takes a whole record. True once: when the boundary has been silent for long enough."""
        if (
            self._decided
            or _U64.unpack_from(raw, _HTTP_VERSION)[0] != _HTTP_2
            or not _U64.unpack_from(raw, _BYTES_SENT)[0]
            or raw[_COARSE_START]  # nothing was marked of it
        ):
            return False
        self._unmarked += 1
        marked = _U64.unpack_from(raw, _FIRST_WRITE_NS)[0] != 0
        self._decided = marked or self._unmarked == _ENOUGH
        return self._decided and not marked

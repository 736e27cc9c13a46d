"""Finds a boundary whose function is exported and has a probe, but is never called, because the compiler inlined it.

Records then lack the mark that the probe should have made. Only HTTP/2's boundary can fall silent: nginx calls the
functions of the other boundaries through pointers, or from several places. Pure.
"""

import struct

from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, c_enum

BOUNDARY = "HTTP/2 response begins"

# The boundary is silent when this many records lack the mark and no record has it.
_ENOUGH = 20

_U64 = struct.Struct("<Q")
_FIRST_WRITE_NS = REQUEST_RECORD.offset("first_write_ns")
_BYTES_SENT = REQUEST_RECORD.offset("bytes_sent")
_COARSE_START = REQUEST_RECORD.offset("coarse_start")
_HTTP_VERSION = REQUEST_RECORD.offset("http_version")
_HTTP_2 = c_enum("http_version")["HTTP_VERSION_2"]


class SilenceWatch:
    """Counts HTTP/2 responses without the mark of their beginning, until a response has the mark."""

    def __init__(self) -> None:
        self._unmarked = 0
        self._decided = False

    def fell_silent(self, raw: bytes) -> bool:
        """Takes a whole record. Returns true once: when the boundary has been silent for long enough."""
        if (
            self._decided
            or _U64.unpack_from(raw, _HTTP_VERSION)[0] != _HTTP_2
            or not _U64.unpack_from(raw, _BYTES_SENT)[0]
            or raw[_COARSE_START]  # no probe marked this request
        ):
            return False
        self._unmarked += 1
        marked = _U64.unpack_from(raw, _FIRST_WRITE_NS)[0] != 0
        self._decided = marked or self._unmarked == _ENOUGH
        return self._decided and not marked

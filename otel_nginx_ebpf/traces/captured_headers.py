"""Decodes the headers that the kernel program copied into a record (`probes/captured_headers.c`)."""

import struct
import time
from functools import lru_cache

from otel_nginx_ebpf.traces.abi import STRING_HEADER, STRING_KINDS, c_enum

REQUEST_HEADER = "http.request.header"
RESPONSE_HEADER = "http.response.header"
REDACTED = "REDACTED"

_PREFIXES = {
    STRING_KINDS["STRING_REQUEST_HEADER"]: REQUEST_HEADER,
    STRING_KINDS["STRING_RESPONSE_HEADER"]: RESPONSE_HEADER,
}
_VALUE = STRING_KINDS["STRING_HEADER_VALUE"]
_HOW = c_enum("captured")
_REDACTED, _NOT = _HOW["CAPTURED_REDACTED"], _HOW["CAPTURED_NOT"]
_NUMBER, _TIME = _HOW["CAPTURED_NUMBER"], _HOW["CAPTURED_TIME"]
_NUMBER_FORMAT = struct.Struct("<q")
_unpack_string_header = STRING_HEADER.struct.unpack_from
_STRING_HEADER_BYTES = STRING_HEADER.size

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_KEPT_SECTIONS = 256
KEPT_SECTION_BYTES_MAX = 1024
"""Longer sections are not worth a place in a cache."""

CapturedHeaders = tuple[dict[str, tuple[str, ...]], tuple[str, ...]]
"""The attributes, and the names of those that are incomplete."""


def parse(section: bytes) -> CapturedHeaders:
    """Returns the captured headers of a record.

    Raises:
        ValueError: The bytes are cut short, or contradict themselves.
    """
    return (_kept_parse if len(section) <= KEPT_SECTION_BYTES_MAX else _parse)(section)


def _parse(section: bytes) -> CapturedHeaders:
    values: dict[str, tuple[str, ...]] = {}
    cut: dict[str, None] = {}
    offset, end = 0, len(section)
    while offset < end:
        kind, how, text, whole, offset = _string(section, offset)
        if kind not in _PREFIXES:
            raise ValueError(f"a string of the kind {kind} among captured headers")
        name = f"{_PREFIXES[kind]}.{str(text, 'ascii', 'backslashreplace')}"
        value = b""
        if offset < end and section[offset] == _VALUE:
            _, _, value, whole, offset = _string(section, offset)
            if whole > len(value):
                cut[name] = None
        if how == _NOT:
            cut[name] = None
        else:
            values[name] = (*values.get(name, ()), _text(how, value))
    return values, tuple(cut)


_kept_parse = lru_cache(_KEPT_SECTIONS)(_parse)


def _string(section: bytes, offset: int) -> tuple[int, int, bytes, int, int]:
    """Returns kind, attempt, content and whole length of a string, and the offset behind it."""
    try:
        kind, attempt, length, whole = _unpack_string_header(section, offset)
    except struct.error as error:
        raise ValueError("a captured header is cut short") from error
    start = offset + _STRING_HEADER_BYTES
    end = start + length
    if end > len(section):
        raise ValueError("a captured header passes the record's end")
    return kind, attempt, section[start:end], whole, end + -length % 8


def _text(how: int, value: bytes) -> str:
    if how == _REDACTED:
        return REDACTED
    if how in (_NUMBER, _TIME):
        if len(value) != _NUMBER_FORMAT.size:
            raise ValueError(f"a number of {len(value)} bytes among captured headers")
        (number,) = _NUMBER_FORMAT.unpack(value)
        return str(number) if how == _NUMBER else _http_date(number)
    return str(value, "utf-8", "backslashreplace")


def _http_date(unix_s: int) -> str:
    """Returns a time as nginx writes it (RFC 9110, 5.6.7)."""
    try:
        at = time.gmtime(unix_s)
    except (OverflowError, OSError) as error:
        raise ValueError(f"a date of {unix_s} s among captured headers") from error
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    return f"{day}, {at.tm_mday:02} {month} {at.tm_year:04} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT"

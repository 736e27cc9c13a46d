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
_VALUE_ITSELF, _REDACTED, _NOT = _HOW["CAPTURED_VALUE"], _HOW["CAPTURED_REDACTED"], _HOW["CAPTURED_NOT"]
_NUMBER, _TIME = _HOW["CAPTURED_NUMBER"], _HOW["CAPTURED_TIME"]
_NUMBER_FORMAT = struct.Struct("<q")
_unpack_string_header = STRING_HEADER.struct.unpack_from
_STRING_HEADER_BYTES = STRING_HEADER.size

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_KEPT_SECTIONS = 256
_KEPT_SECTION_BYTES_MAX = 1024

CapturedHeaders = tuple[dict[str, tuple[str, ...]], tuple[str, ...]]
"""The attributes, and the names of those that are incomplete."""


def parse(section: bytes) -> CapturedHeaders:
    """Returns the captured headers of a record.

    Raises:
        ValueError: The bytes are cut short, or contradict themselves.
    """
    return (_kept_parse if len(section) <= _KEPT_SECTION_BYTES_MAX else _parse)(section)


def _parse(section: bytes) -> CapturedHeaders:
    values: dict[str, tuple[str, ...]] = {}
    cut: dict[str, None] = {}
    offset, end = 0, len(section)
    try:
        while offset < end:
            kind, how, length, _ = _unpack_string_header(section, offset)
            start = offset + _STRING_HEADER_BYTES
            offset = start + length + -length % 8
            name = _name(kind, section[start : start + length])
            value = b""
            if offset < end and section[offset] == _VALUE:
                _, _, length, whole = _unpack_string_header(section, offset)
                start = offset + _STRING_HEADER_BYTES
                offset = start + length + -length % 8
                value = section[start : start + length]
                if whole > length:
                    cut[name] = None
            if how == _NOT:
                cut[name] = None
                continue
            text = str(value, "utf-8", "backslashreplace") if how == _VALUE_ITSELF else _text(how, value)
            values[name] = (*values[name], text) if name in values else (text,)
    except struct.error as error:
        raise ValueError("a captured header is cut short") from error
    if offset != end:
        raise ValueError("a captured header passes the record's end")
    return values, tuple(cut)


@lru_cache(_KEPT_SECTIONS)
def _name(kind: int, name: bytes) -> str:
    """Returns the name of the attribute."""
    if kind not in _PREFIXES:
        raise ValueError(f"a string of the kind {kind} among captured headers")
    return f"{_PREFIXES[kind]}.{str(name, 'ascii', 'backslashreplace')}"


_kept_parse = lru_cache(_KEPT_SECTIONS)(_parse)


def _text(how: int, value: bytes) -> str:
    if how == _REDACTED:
        return REDACTED
    if how in (_NUMBER, _TIME):
        if len(value) != _NUMBER_FORMAT.size:
            raise ValueError(f"a number of {len(value)} bytes among captured headers")
        (number,) = _NUMBER_FORMAT.unpack(value)
        return str(number) if how == _NUMBER else _http_date(number)
    raise ValueError(f"a captured header of the kind {how}")


def _http_date(unix_s: int) -> str:
    """Returns a time as nginx writes it (RFC 9110, 5.6.7)."""
    try:
        at = time.gmtime(unix_s)
    except (OverflowError, OSError) as error:
        raise ValueError(f"a date of {unix_s} s among captured headers") from error
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    return f"{day}, {at.tm_mday:02} {month} {at.tm_year:04} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT"

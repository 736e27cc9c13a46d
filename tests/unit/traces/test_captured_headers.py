"""Captured headers: from the bytes of a record to attributes."""

import struct
from dataclasses import replace

import pytest

from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, c_enum
from otel_nginx_ebpf.traces.captured_headers import parse
from otel_nginx_ebpf.traces.record import RecordError, decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from unit.sample_traces import STATIC, UNIX_OFFSET_NS, string, with_headers

HOW = c_enum("captured")
WITH_HEADERS = with_headers(STATIC)


def server(raw: bytes) -> dict[str, object]:
    return dict(build_trace(decode(raw), UNIX_OFFSET_NS, RandomIds()).spans[0].attributes)


def test_headers_become_attributes() -> None:
    assert server(WITH_HEADERS).items() - server(STATIC).items() == {
        ("http.request.header.x-tenant", ("one", "")),
        ("http.request.header.cookie", ("REDACTED",)),
        ("http.response.header.last-modified", ("Sun, 06 Nov 1994 08:49:37 GMT",)),
    }


def test_what_is_incomplete_is_named() -> None:
    value = string("STRING_HEADER_VALUE", "cut")
    cut = value[:4] + struct.pack("<I", 4) + value[8:]
    headers, names = parse(
        string("STRING_REQUEST_HEADER", "x-a")
        + cut
        + string("STRING_REQUEST_HEADER", "x-b", HOW["CAPTURED_NOT"])
        + string("STRING_RESPONSE_HEADER", "x-a")
    )
    assert headers == {"http.request.header.x-a": ("cut",), "http.response.header.x-a": ("",)}
    assert names == ("http.request.header.x-a", "http.request.header.x-b")
    request = replace(decode(WITH_HEADERS), headers_missing=True, cut=("STRING_USER_AGENT",))
    attributes = build_trace(request, UNIX_OFFSET_NS, RandomIds()).spans[0].attributes
    assert attributes["nginx.truncated_attributes"] == ("user_agent.original", "http.*.header.*")


@pytest.mark.parametrize(
    "section",
    [
        WITH_HEADERS[len(STATIC) : -9],
        string("STRING_URI", "/"),
        string("STRING_HEADER_VALUE", "without a name"),
        string("STRING_RESPONSE_HEADER", "a", HOW["CAPTURED_NUMBER"]) + string("STRING_HEADER_VALUE", "123"),
        string("STRING_RESPONSE_HEADER", "a", HOW["CAPTURED_TIME"])
        + string("STRING_HEADER_VALUE", struct.pack("<q", 2**62)),
        b"\x17",
    ],
)
def test_damaged_headers(section: bytes) -> None:
    at = REQUEST_RECORD.offset("headers_at")
    raw = STATIC[:at] + struct.pack("<H", len(STATIC)) + STATIC[at + 2 :]
    with pytest.raises(RecordError):
        decode(raw + section)


@pytest.mark.parametrize("headers_at", [1, len(WITH_HEADERS) + 1, 2**16 - 1])
def test_headers_at_an_impossible_place(headers_at: int) -> None:
    at = REQUEST_RECORD.offset("headers_at")
    with pytest.raises(RecordError):
        decode(WITH_HEADERS[:at] + struct.pack("<H", headers_at) + WITH_HEADERS[at + 2 :])

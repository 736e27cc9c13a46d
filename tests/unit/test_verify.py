"""Requests that agree with themselves, and such as only a wrong layout makes."""

from dataclasses import replace
from typing import Any

import pytest

from otel_nginx_ebpf.verify import contradictions
from unit.test_spans import ATTEMPT, OFFSET_NS, REQUEST

START_UNIX_MS = (REQUEST.created_mono_ns + OFFSET_NS) // 1_000_000
RIGHT = replace(REQUEST, nginx_start_unix_ms=START_UNIX_MS, attempts=(ATTEMPT,))


def test_a_right_request_has_no_contradictions() -> None:
    assert contradictions(RIGHT, OFFSET_NS) == ()
    assert contradictions(replace(RIGHT, method="PURGE", method_bit=1), OFFSET_NS) == ()
    assert contradictions(replace(RIGHT, method=None, method_bit=1, requests_seen=None), OFFSET_NS) == ()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"method_bit": 8}, "method"),
        ({"method": "PURGE"}, "method"),
        ({"http_version": 17}, "HTTP version"),
        ({"status": 140_000}, "status"),
        ({"request_bytes": 2**60}, "sizes"),
        ({"connection": 0}, "connection number"),
        ({"connection_requests": 3_000_000}, "number of the connection's requests"),
        ({"nginx_start_unix_ms": START_UNIX_MS - 7_200_000}, "start time"),
        ({"client_sockaddr": b"\x99\x99" + bytes(14)}, "client address"),
        ({"client_sockaddr": None}, "client address"),
        ({"attempts": (replace(ATTEMPT, response_ms=2**50),)}, "upstream times"),
        ({"attempts": (replace(ATTEMPT, response_ms=60_000),)}, "upstream response time"),
        ({"attempts": (replace(ATTEMPT, peer="backend"),)}, "upstream peer's address"),
        ({"attempts": (replace(ATTEMPT, status=4711),)}, "upstream status"),
    ],
)
def test_what_cannot_be_is_named(wrong: dict[str, Any], named: str) -> None:
    assert any(named in text for text in contradictions(replace(RIGHT, **wrong), OFFSET_NS))

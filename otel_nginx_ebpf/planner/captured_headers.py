"""Which headers the kernel program copies into records (`probes/captured_headers.c`)."""

import re
from collections.abc import Iterable, Sequence

from otel_nginx_ebpf.kernel.loader import CapturedHeader
from otel_nginx_ebpf.planner.program import ngx_hash
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.abi import STRING_KINDS

SECRETS = frozenset({"authorization", "cookie", "proxy-authorization", "set-cookie"})
"""Headers whose values no setting reveals."""

_REQUEST, _RESPONSE = STRING_KINDS["STRING_REQUEST_HEADER"], STRING_KINDS["STRING_RESPONSE_HEADER"]


def chosen(settings: Settings) -> tuple[CapturedHeader, ...]:
    """Returns the headers that the user chose, those of requests first.

    A field to sanitize is a regular expression that matches at the beginning of a name, as in OpenTelemetry's
    instrumentations for Python. All names are known here, so the kernel program does not even read such a value.
    """
    sanitized = [re.compile(field, re.IGNORECASE) for field in settings.sanitize_headers]

    def headers(kind: int, names: Iterable[str]) -> list[CapturedHeader]:
        return [
            CapturedHeader(kind, name, name in SECRETS or any(field.match(name) for field in sanitized))
            for name in dict.fromkeys(names)
        ]

    return (
        *headers(_REQUEST, settings.capture_request_headers),
        *headers(_RESPONSE, settings.capture_response_headers),
    )


def text(headers: Sequence[CapturedHeader]) -> str:
    """Returns headers for people."""

    def names(kind: int) -> str:
        return ", ".join(f"{each.name}{' (redacted)' * each.redacted}" for each in headers if each.kind == kind)

    return f"of requests: {names(_REQUEST) or 'none'}; of responses: {names(_RESPONSE) or 'none'}"


def constants(settings: Settings, *, is_fork: bool) -> dict[str, int]:
    """Returns constants of the kernel program's text, by name.

    Args:
        settings: The user's settings.
        is_fork: The binary is a fork of nginx. What no layout has is only known for nginx.
    """
    headers = chosen(settings)
    of_requests = [header.name for header in headers if header.kind == _REQUEST]
    of_responses = [header.name for header in headers if header.kind == _RESPONSE]
    return {
        "CAPTURES_HEADERS": int(bool(headers)),
        "CAPTURED_NAMES_MAX": len(headers),
        "CAPTURED_REQUEST_BITS": _bits(map(ngx_hash, of_requests)),
        "CAPTURED_RESPONSE_BITS": _bits(map(len, of_responses)),
        **{
            f"CAPTURES_{name.upper().replace('-', '_')}": int(name in of_responses and not is_fork)
            for name in ("content-type", "content-length", "last-modified")
        },
    }


def _bits(numbers: Iterable[int]) -> int:
    """Returns a set of 64 bits: which remainders the numbers have."""
    bits = 0
    for number in numbers:
        bits |= 1 << number % 64
    return bits

"""Which headers the kernel program copies."""

from otel_nginx_ebpf.planner.captured_headers import SECRETS, chosen, constants
from otel_nginx_ebpf.planner.program import ngx_hash
from otel_nginx_ebpf.settings.model import Settings


def test_secrets_are_always_redacted() -> None:
    settings = Settings(capture_request_headers=(*sorted(SECRETS), "x-a"), capture_response_headers=("set-cookie",))
    assert {header.name: header.redacted for header in chosen(settings)} == {
        **dict.fromkeys(SECRETS, True),
        "x-a": False,
    }


def test_fields_to_sanitize_match_at_the_beginning_of_a_name() -> None:
    names = ("session", "x-session", "SESSION-id".lower(), "x-key", "my-x-key")
    settings = Settings(capture_request_headers=names, sanitize_headers=("Session", ".*-KEY"))
    redacted = [header.name for header in chosen(settings) if header.redacted]
    assert redacted == ["session", "session-id", "x-key", "my-x-key"]


def test_constants() -> None:
    assert constants(Settings(), is_fork=False)["CAPTURES_HEADERS"] == 0
    settings = Settings(capture_request_headers=("host", "via", "host"), capture_response_headers=("content-type", "a"))
    found = constants(settings, is_fork=False)
    assert found["CAPTURED_NAMES_MAX"] == 4
    assert found["CAPTURED_REQUEST_BITS"] == 1 << ngx_hash("host") % 64 | 1 << ngx_hash("via") % 64
    assert found["CAPTURED_RESPONSE_BITS"] == 1 << 12 | 1 << 1
    assert (found["CAPTURES_CONTENT_TYPE"], found["CAPTURES_LAST_MODIFIED"]) == (1, 0)
    assert constants(settings, is_fork=True)["CAPTURES_CONTENT_TYPE"] == 0

"""What a build's module signature says about its options, and where the members of its structs are then."""

import pytest

from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.dwarf import Structs
from otel_nginx_ebpf.nginx.signature import Signature

# nginx 1.22.1 --with-compat, and without some of it.
ALL = "0011111111010111001111111111111111"
NO_PCRE = "0011111111010111001111011111111111"
NO_CACHE = "0011111111010111001111111111111011"
NEITHER = "0011111111010111001111011111111011"
NO_COMPAT = "0001111111010111001000110001100110"


@pytest.mark.parametrize(
    ("digits", "lacks"),
    [(ALL, ()), (NO_PCRE, ("PCRE",)), (NO_CACHE, ("the HTTP cache",)), (NEITHER, ("PCRE", "the HTTP cache"))],
)
def test_a_compatible_build_may_lack_pcre_and_the_cache(digits: str, lacks: tuple[str, ...]) -> None:
    signature = Signature(digits)
    assert signature.is_understood
    assert signature.with_compat
    assert signature.tells_layout
    assert signature.lacks == lacks
    assert signature.has_http_cache == ("the HTTP cache" not in lacks)


@pytest.mark.parametrize("digits", ["", ALL + "1", ALL[1:], NO_COMPAT])
def test_others_do_not_tell_a_layout(digits: str) -> None:
    signature = Signature(digits)
    assert not signature.with_compat
    assert not signature.tells_layout
    assert signature.is_understood == (digits == NO_COMPAT)
    assert signature.has_http_cache == (digits == NO_COMPAT)


@pytest.mark.parametrize("flag", [3, 4, 22, 24, 26, 28, 29, 30, 31, 33])
def test_what_lacks_an_option_that_compat_brings_about_does_not_tell_a_layout(flag: int) -> None:
    signature = Signature(ALL[: flag - 1] + "0" + ALL[flag:])
    assert signature.with_compat
    assert signature.contradicts_itself
    assert not signature.tells_layout


def moved(layout: Structs, variant: Structs) -> dict[str, int]:
    return {
        f"{struct}.{member}": variant[struct][member] - offset
        for struct, members in layout.items()
        if struct in variant
        for member, offset in members.items()
        if ":" not in member and variant[struct][member] != offset
    }


# As gcc lays out 1.18.0, 1.22.1, 1.26.3, 1.28.3 and 1.30.6.
BEHIND_THE_CAPTURES = {f"ngx_http_request_s.{name}" for name in ("err_status", "request_length", "sizeof", "stream")}
AHEAD_OF_THE_CACHE = {
    f"ngx_http_request_s.{name}"
    for name in (
        *("connection", "ctx", "loc_conf", "main_conf", "signature", "srv_conf"),
        *("read_event_handler", "write_event_handler"),
    )
}
IN_UPSTREAM = {
    "ngx_http_upstream_s.cleanup": -16,
    "ngx_http_upstream_s.length": -8,
    "ngx_http_upstream_s.start_time": -16,
    "ngx_http_upstream_s.state": -16,
}


@pytest.mark.parametrize("release", catalogue.shipped().layouts)
def test_the_members_behind_what_is_absent_move_towards_the_beginning(release: str) -> None:
    layout = catalogue.shipped().layouts[release]
    behind_the_cache = {
        f"ngx_http_request_s.{name}" for name in layout["ngx_http_request_s"] if ":" not in name
    } - AHEAD_OF_THE_CACHE
    assert moved(layout, Signature(ALL).layout(layout)) == {}
    assert moved(layout, Signature(NO_PCRE).layout(layout)) == dict.fromkeys(BEHIND_THE_CAPTURES, -24)
    assert moved(layout, Signature(NO_CACHE).layout(layout)) == dict.fromkeys(behind_the_cache, -8) | IN_UPSTREAM
    assert moved(layout, Signature(NEITHER).layout(layout)) == (
        dict.fromkeys(behind_the_cache, -8) | dict.fromkeys(BEHIND_THE_CAPTURES, -32) | IN_UPSTREAM
    )


@pytest.mark.parametrize("digits", [NO_PCRE, NO_CACHE, NEITHER])
def test_bit_fields_are_not_known_where_others_may_be_missing(digits: str) -> None:
    layout = catalogue.shipped().layouts["1.22.1"]
    fields = {(struct, member) for struct in layout for member in layout[struct] if ":" in member}
    assert fields == {("ngx_http_request_s", "limit_conn_status:2"), ("ngx_http_request_s", "limit_req_status:3")}
    changed = Signature(digits).layout(layout)
    assert layout.keys() - changed.keys() == (set() if digits == NO_PCRE else {"ngx_http_cache_s"})
    assert not any(":" in member for members in changed.values() for member in members)

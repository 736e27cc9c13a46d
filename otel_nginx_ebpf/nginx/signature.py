"""Reads a build's ./configure options from its module signature, and adapts the layout of its structs to them.

NGX_MODULE_SIGNATURE (nginx's src/core/ngx_module.h) has three sizes, and then a digit for each option that matters to
modules. --with-compat turns on all of them except PCRE and the HTTP cache, which add members of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from otel_nginx_ebpf.nginx.dwarf import SIZEOF, Structs, is_bit_field

_FLAGS = 34
_PCRE, _HTTP_CACHE, _COMPAT = 23, 32, 34

# The options that --with-compat turns on on Linux: file AIO, sendfile without disk I/O, threads, TLS, gzip,
# X-Forwarded-For, real IP, headers, DAV, upstream zones.
_BROUGHT_ABOUT = (3, 4, 22, 24, 26, 28, 29, 30, 31, 33)


@dataclass(frozen=True, slots=True)
class _Gap:
    """Members that a build does not have. All members behind them move towards the struct's beginning by their size."""

    struct: str
    behind: str
    """The first member behind the gap that the program reads."""
    size: int
    """The size of the missing members, in bytes."""


# Measured in 1.18.0, 1.22.1, 1.26.3, 1.28.3 and 1.30.6, which agree. Tests compare them again.
_GAPS: Mapping[int, tuple[_Gap, ...]] = {
    _PCRE: (_Gap("ngx_http_request_s", "request_length", 24),),  # ncaptures, captures, captures_data
    _HTTP_CACHE: (
        _Gap("ngx_http_request_s", "upstream", 8),  # cache
        _Gap("ngx_http_upstream_s", "length", 8),  # caches
        _Gap("ngx_http_upstream_s", "start_time", 8),  # create_key
    ),
}
_NAMES = {_PCRE: "PCRE", _HTTP_CACHE: "the HTTP cache"}


class Signature:
    """The options of a build. `digits` are the signature's digits; empty if the build has no signature."""

    def __init__(self, digits: str = "") -> None:
        self._digits = digits

    def _has(self, flag: int) -> bool:
        return self._digits[flag - 1] == "1"

    @property
    def is_understood(self) -> bool:
        """Tells whether there is a signature, with as many options as nginx has had since 1.11.5."""
        return len(self._digits) == _FLAGS

    @property
    def with_compat(self) -> bool:
        """Tells whether modules of other builds fit (`--with-compat`)."""
        return self.is_understood and self._has(_COMPAT)

    @property
    def contradicts_itself(self) -> bool:
        """Tells whether options that `--with-compat` turns on are missing: someone has changed what it means."""
        return self.with_compat and not all(self._has(flag) for flag in _BROUGHT_ABOUT)

    @property
    def tells_layout(self) -> bool:
        """Tells whether `layout` can adapt a known layout to these options."""
        return self.with_compat and not self.contradicts_itself

    @property
    def has_http_cache(self) -> bool:
        """Tells whether the build is known to have the HTTP cache."""
        return self.is_understood and self._has(_HTTP_CACHE)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The names of the options that a `--with-compat` build may lack, and this build lacks."""
        return tuple(_NAMES[flag] for flag in _GAPS if not self._has(flag)) if self.is_understood else ()

    def layout(self, structs: Structs) -> Structs:
        """Returns the layout of this `--with-compat` build. `structs` is a build of the same release without gaps.

        Bit-fields are left out of structs with gaps: other bit-fields are missing there, too.
        """
        gaps = [gap for flag, gaps in _GAPS.items() if not self._has(flag) for gap in gaps]
        return {
            struct: _closed(members, [gap for gap in gaps if gap.struct == struct])
            for struct, members in structs.items()
            if struct != "ngx_http_cache_s" or self.has_http_cache
        }


def _closed(members: dict[str, int], gaps: list[_Gap]) -> dict[str, int]:
    def moved(member: str, offset: int) -> int:
        return offset - sum(gap.size for gap in gaps if member == SIZEOF or offset >= members[gap.behind])

    return {member: moved(member, offset) for member, offset in members.items() if not (gaps and is_bit_field(member))}

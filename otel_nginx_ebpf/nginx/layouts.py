"""Finds the struct layout of an nginx binary: the byte offsets of members, and the source that they come from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.catalogue import Catalogue
from otel_nginx_ebpf.nginx.debug_files import debug_files
from otel_nginx_ebpf.nginx.dwarf import SIZEOF, DwarfError, Structs, is_bit_field, read_structs

_log = logging.getLogger(__name__)

_DEBUG_SYMBOLS = (
    "install its debug symbols (Debian: nginx-dbgsym or nginx-core-dbgsym; nginx.org: nginx-dbg or nginx-debuginfo), "
    "or set DEBUGINFOD_URLS to a server that has them"
)
_DEBUG_SYMBOLS_OF_FORK = (
    "install its debug symbols, run a build that is not stripped, or set DEBUGINFOD_URLS to a server that has them"
)

# nginx's largest struct has 1.5 KB. BPF maps get members of these sizes, and a container's debug information is not
# trusted.
_STRUCT_BYTES_MAX = 16 << 10

# Not every build has these: HTTP/2, the HTTP cache, TLS, and members that came with nginx 1.15.8, 1.17.6 and 1.23.0.
# Nor has every catalogue of a user's own: `cleanup`, the cache and bit-fields are new.
_OPTIONAL_STRUCTS = ("ngx_http_v2_", "ngx_http_cache_s")
CACHE = "ngx_http_cache_s"
"""A struct that other machines lay out in another way than the catalogue says: it holds a `struct stat`."""
_OPTIONAL_MEMBERS = {
    ("ngx_connection_s", "proxy_protocol"),
    ("ngx_connection_s", "ssl"),
    ("ngx_http_upstream_s", "cleanup"),
    ("ngx_http_upstream_state_t", "bytes_sent"),
    ("ngx_table_elt_t", "next"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets by struct and member (`nginx.dwarf.Structs`); `sizeof` is the struct's size in bytes.

    A member is absent if the build does not have it, or if it is not known for the release. For most releases HTTP/2's
    structs are not known.
    """

    structs: Structs
    source: str
    """For people: `DWARF`, `debug file PATH`, `debuginfod`, `catalogue 1.22.1`, `catalogue 1.26.3 (assumed)`,
    `catalogue 1.28.0 without PCRE`."""
    assumed: bool = False
    """The layout is an older release's of the same branch. It counts only after nginx's memory has confirmed it."""


def layout_for(binary: Binary, known: Catalogue | None = None) -> Layout:
    """Returns the layout of a binary from its debug information, or else from the catalogue.

    The catalogue's layout must be of exactly the binary's release, because members move even within a stable branch.
    Members that the binary's configure options leave out are removed from it. If the catalogue does not have the
    release, the newest older release of its branch is assumed to fit. nginx's layouts are never used for a fork.

    Args:
        binary: The binary. If its path is /proc/PID/exe, debug files are searched in that process's root too.
        known: Layouts by release; `catalogue.known()` by default.

    Raises:
        UserError: No layout is known, or the user's catalogue cannot be read.
    """
    known = catalogue.known() if known is None else known
    members = catalogue.shipped().members()
    measured = _measured(binary, members)
    if measured is not None:
        _compare(binary, measured, known)
        return measured
    reason = _unlike_others(binary)
    if reason and (binary.is_fork or not binary.signature.tells_layout):
        raise UserError(
            f"{binary.name} ({binary}) {reason}, so its struct layout may differ from other builds of its release, and "
            f"its debug information was not found: {_debug_symbols(binary)}"
        )
    assumed = binary.release not in known.layouts
    release = known.before_in_branch(binary.release) if assumed else binary.release
    if release is None:
        fork = " and may differ from nginx's" if binary.is_fork else ""
        raise UserError(
            f"the struct layout of {binary} ({binary.name}) is not known{fork}, no earlier release of its branch is "
            f"known, and its debug information was not found: {_debug_symbols(binary)}; or add the release, from a "
            "build that has debug symbols, with `otel-nginx-ebpf layouts add BINARY`"
        )
    structs = {
        struct: {member: offset for member, offset in offsets.items() if member in members[struct]}
        for struct, offsets in known.layouts[release].items()
        if struct in members and (binary.machine.name == "x86_64" or struct != CACHE)
    }
    if lacking := _lacking(structs, members):
        raise UserError(
            f"the known struct layout of {release} lacks {', '.join(lacking)}: "
            "add the release again with `otel-nginx-ebpf layouts add BINARY`"
        )
    if assumed:
        structs = _spoken_for(structs)
    lacks = f" without {' and '.join(binary.signature.lacks)}" if binary.signature.lacks else ""
    source = f"catalogue {release}{lacks}{' (assumed)' if assumed else ''}"
    return Layout(binary.signature.layout(structs), source, assumed)


def _spoken_for(structs: Structs) -> Structs:
    """Returns the members for which something in nginx's memory speaks (docs/decisions/0014-doubt-of-a-layout.md)."""
    return {
        struct: {member: offset for member, offset in members.items() if not is_bit_field(member)}
        for struct, members in structs.items()
        if struct != CACHE
    }


def _debug_symbols(binary: Binary) -> str:
    """Returns the advice for a binary whose debug information was not found."""
    return _DEBUG_SYMBOLS_OF_FORK if binary.is_fork else _DEBUG_SYMBOLS


def _unlike_others(binary: Binary) -> str:
    """Returns why a build's layout differs from other builds of its release; empty if it does not differ."""
    signature = binary.signature
    if not signature.is_understood:
        return "has no module signature that this program understands"
    if not signature.with_compat:
        return "was configured without --with-compat"
    if signature.contradicts_itself:
        return "has a module signature that lacks options which --with-compat turns on"
    return f"was configured without {' and '.join(signature.lacks)}" if signature.lacks else ""


def _lacking(structs: Structs, members: Mapping[str, set[str]]) -> list[str]:
    """Returns the members that every build has and this layout lacks."""
    return [
        f"{struct}.{member}"
        for struct in sorted(members)
        for member in sorted(members[struct])
        if member not in structs.get(struct, {})
        and not struct.startswith(_OPTIONAL_STRUCTS)
        and (struct, member) not in _OPTIONAL_MEMBERS
        and not is_bit_field(member)
    ]


def _measured(binary: Binary, members: Mapping[str, set[str]]) -> Layout | None:
    """Returns the layout from the first debug information that is complete, or None."""
    for file in debug_files(binary):
        try:
            structs = read_structs(file.content, members, file.alternate)
        except DwarfError as error:
            _log.warning("%s: the layout is not taken from %s: %s", binary.name, file.source, error)
            continue
        lacking = _lacking(structs, members)
        oversized = [struct for struct, offsets in structs.items() if offsets.get(SIZEOF, 0) > _STRUCT_BYTES_MAX]
        if not lacking and not oversized:
            return Layout(structs, file.source)
        if oversized:
            _log.warning(
                "%s: the layout is not taken from %s: too large: %s", binary.name, file.source, ", ".join(oversized)
            )
        elif structs:
            _log.warning("%s: the layout is not taken from %s: no %s", binary.name, file.source, ", ".join(lacking))
    return None


def _compare(binary: Binary, measured: Layout, known: Catalogue) -> None:
    """Logs a warning if a build's debug information contradicts the known layout of its release.

    The debug information wins.
    """
    if binary.with_compat and not binary.signature.lacks and binary.release in known.layouts:
        contradictions = catalogue.contradictions(known.layouts[binary.release], measured.structs)
        if contradictions:
            _log.warning(
                "%s: its debug information (%s) contradicts the known layout of %s and is used instead: %s",
                binary.name,
                measured.source,
                binary,
                "; ".join(contradictions),
            )


def add_release(path: Path, target: Path, shipped: Catalogue | None = None) -> list[str]:
    """Measures the layout of a binary by its debug information and adds its release to a user's catalogue.

    Args:
        path: The binary.
        target: The catalogue's file. It is made if it does not exist.
        shipped: The catalogue whose content need not be added; `catalogue.shipped()` by default.

    Returns:
        Lines for the user: what was added, and how the layout differs from the nearest known release.

    Raises:
        UserError: The binary cannot be measured, is not configured --with-compat, or contradicts the known layout of
            its release; or the catalogue cannot be written.
    """
    binary = Binary(path)
    own = catalogue.load(target)
    known = (catalogue.shipped() if shipped is None else shipped).filled_from(own)
    if reason := _unlike_others(binary):
        raise UserError(
            f"{binary.name} {reason}: its layout differs from other builds; tracing uses its own debug information"
        )
    if not catalogue.is_release(binary.release):
        raise UserError(f"{binary.name} is {binary}: a catalogue of layouts cannot name this release")
    measured = _measured(binary, catalogue.shipped().members())
    if measured is None:
        raise UserError(f"the debug information of {binary.name} was not found: {_debug_symbols(binary)}")
    release = binary.release
    before = known.layouts.get(release, {})
    if contradictions := catalogue.contradictions(before, measured.structs):
        raise UserError(
            f"{binary.name} contradicts the known layout of {binary}, so it is not added: "
            f"{'; '.join(contradictions)}; tracing uses its own debug information"
        )
    added = Catalogue({release: measured.structs})
    new = known.filled_from(added)
    if new == known:
        return [f"{binary} is known already, and {binary.name} agrees ({measured.source})"]
    _write(target, own.filled_from(added))
    lines = [f"{binary} added to {target}, from {binary.name} ({measured.source})"]
    if binary.is_fork:
        lines.append(
            f"it is used for all builds of {binary}, and right only for builds with the same configure options: "
            "a fork's signature does not show all of them"
        )
    nearest = release if before else known.last_before(release)
    if nearest is not None:
        changes = catalogue.differences(known.layouts[nearest], new.layouts[release])
        lines += [f"differences from the known layout of {nearest}:", *(f"  {line}" for line in changes or ["none"])]
    return lines


def _write(path: Path, content: Catalogue) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content.text(), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the layouts to {path}: {error.strerror}") from error


def list_releases(path: Path) -> list[str]:
    """Returns a line for each known release: its version, and the catalogues that have it.

    Raises:
        UserError: The user's catalogue at `path` cannot be read.
    """
    places = {"shipped": catalogue.shipped(), str(path): catalogue.load(path)}
    releases = catalogue.known(path).layouts
    width = max(map(len, releases)) + 3
    return [
        f"{release:<{width}}{', '.join(place for place, held in places.items() if release in held.layouts)}"
        for release in releases
    ]

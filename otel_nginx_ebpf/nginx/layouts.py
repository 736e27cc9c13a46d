"""Where nginx keeps its facts: the byte offsets of struct members in one binary, and how they are known."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.catalogue import Catalogue
from otel_nginx_ebpf.nginx.debug_files import debug_files
from otel_nginx_ebpf.nginx.dwarf import SIZEOF, DwarfError, Structs, read_structs

_log = logging.getLogger(__name__)

_DEBUG_SYMBOLS = (
    "install its debug symbols (Debian: nginx-dbgsym or nginx-core-dbgsym; nginx.org: nginx-dbg or nginx-debuginfo), "
    "or set DEBUGINFOD_URLS to a server that has them"
)
_DEBUG_SYMBOLS_OF_FORK = (
    "install its debug symbols, run a build that is not stripped, or set DEBUGINFOD_URLS to a server that has them"
)

# nginx's largest has 1.5 KB. A container's debug information may say anything, and BPF maps get members of these sizes.
_STRUCT_BYTES_MAX = 16 << 10

# What not every build has: HTTP/2, TLS, and members that came with nginx 1.15.8, 1.17.6 and 1.23.0.
_OPTIONAL_STRUCTS = ("ngx_http_v2_",)
_OPTIONAL_MEMBERS = {
    ("ngx_connection_s", "proxy_protocol"),
    ("ngx_connection_s", "ssl"),
    ("ngx_http_upstream_state_t", "bytes_sent"),
    ("ngx_table_elt_t", "next"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes by struct and member; `sizeof` is the struct's size.

    Absent is what the build does not have, and what is not known of its release: HTTP/2's structs of most.
    """

    structs: Structs
    source: str
    """For people: `DWARF`, `debug file PATH`, `debuginfod`, `catalogue 1.22.1`, `catalogue 1.26.3 (assumed)`,
    `catalogue 1.28.0 without PCRE`."""
    assumed: bool = False
    """Whether it is that of an older release of the same branch: to be believed only once nginx's memory agrees."""


def layout_for(binary: Binary, known: Catalogue | None = None) -> Layout:
    """The layout of a binary: by its debug information, else by its exact release and what its options take out of it.

    Stable branches receive changes that move members, so a release stands for itself only. The newest known one of a
    branch also stands, assumed, for those that come after it. nginx's layouts stand for no fork.

    Args:
        binary: May be a /proc/PID/exe, whose debug files are then looked for in the process's root directory as well.
        known: Layouts by release; without it `catalogue.known()`.

    Raises:
        UserError: None is known; or the user's catalogue cannot be read.
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
            f"{binary.name} ({binary}) {reason}, so that its release does not tell its struct layout, and its debug "
            f"information was not found: {_debug_symbols(binary)}"
        )
    assumed = binary.release not in known.layouts
    release = known.before_in_branch(binary.release) if assumed else binary.release
    if release is None:
        fork = ", and need not be nginx's" if binary.is_fork else ""
        raise UserError(
            f"the struct layout of {binary} ({binary.name}) is not known{fork}, nor that of an earlier release "
            f"of its branch, and its debug information was not found: {_debug_symbols(binary)}; "
            "or add the release from a build that has them with `otel-nginx-ebpf layouts add BINARY`"
        )
    structs = {
        struct: {member: offset for member, offset in offsets.items() if member in members[struct]}
        for struct, offsets in known.layouts[release].items()
        if struct in members
    }
    if lacking := _lacking(structs, members):
        raise UserError(
            f"the struct layout of {release} that is known does not have {', '.join(lacking)}: "
            "add the release again with `otel-nginx-ebpf layouts add BINARY`"
        )
    lacks = f" without {' and '.join(binary.signature.lacks)}" if binary.signature.lacks else ""
    source = f"catalogue {release}{lacks}{' (assumed)' if assumed else ''}"
    return Layout(binary.signature.layout(structs), source, assumed)


def _debug_symbols(binary: Binary) -> str:
    """The next step for a binary whose debug information was not found."""
    return _DEBUG_SYMBOLS_OF_FORK if binary.is_fork else _DEBUG_SYMBOLS


def _unlike_others(binary: Binary) -> str:
    """Why a build does not have the layout of other builds of its release; empty where it has."""
    signature = binary.signature
    if not signature.is_understood:
        return "has no module signature that this program understands"
    if not signature.with_compat:
        return "was configured without --with-compat"
    if signature.contradicts_itself:
        return "has a module signature without some of what --with-compat brings about"
    return f"was configured without {' and '.join(signature.lacks)}" if signature.lacks else ""


def _lacking(structs: Structs, members: Mapping[str, set[str]]) -> list[str]:
    """Which members a layout lacks of those that every build has."""
    return [
        f"{struct}.{member}"
        for struct in sorted(members)
        for member in sorted(members[struct])
        if member not in structs.get(struct, {})
        and not struct.startswith(_OPTIONAL_STRUCTS)
        and (struct, member) not in _OPTIONAL_MEMBERS
    ]


def _measured(binary: Binary, members: Mapping[str, set[str]]) -> Layout | None:
    """The layout by the first debug information that is whole."""
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
    """Says so where a build is not like its release; what the build says of itself holds."""
    if binary.with_compat and not binary.signature.lacks and binary.release in known.layouts:
        contradictions = catalogue.contradictions(known.layouts[binary.release], measured.structs)
        if contradictions:
            _log.warning(
                "%s is not laid out as %s is, says its debug information (%s), which is believed: %s",
                binary.name,
                binary,
                measured.source,
                "; ".join(contradictions),
            )


def add_release(path: Path, target: Path, shipped: Catalogue | None = None) -> list[str]:
    """Measures the release of a binary by its debug information and adds it to a user's catalogue.

    Args:
        path: The binary.
        target: The catalogue's file, made when it is not there.
        shipped: What need not be added; without it `catalogue.shipped()`.

    Returns:
        Lines for the user: what was added, and how it differs from the nearest known release.

    Raises:
        UserError: It cannot be measured, is not configured --with-compat, contradicts what is known of its release, or
            the catalogue cannot be written.
    """
    binary = Binary(path)
    own = catalogue.load(target)
    known = (catalogue.shipped() if shipped is None else shipped).filled_from(own)
    if reason := _unlike_others(binary):
        raise UserError(
            f"{binary.name} {reason}: its layout is not that of other builds; it is traced by its own debug information"
        )
    if not catalogue.is_release(binary.release):
        raise UserError(f"{binary.name} is {binary}: not a release that a catalogue of layouts can name")
    measured = _measured(binary, catalogue.shipped().members())
    if measured is None:
        raise UserError(f"the debug information of {binary.name} was not found: {_debug_symbols(binary)}")
    release = binary.release
    before = known.layouts.get(release, {})
    if contradictions := catalogue.contradictions(before, measured.structs):
        raise UserError(
            f"{binary.name} is not laid out as {binary} is known to be, so it is not added: "
            f"{'; '.join(contradictions)}; it is traced by its own debug information"
        )
    added = Catalogue({release: measured.structs})
    new = known.filled_from(added)
    if new == known:
        return [f"{binary} is known already, and {binary.name} agrees ({measured.source})"]
    _write(target, own.filled_from(added))
    lines = [f"{binary} added to {target}, from {binary.name} ({measured.source})"]
    if binary.is_fork:
        lines.append(
            f"it stands for builds of {binary} with the same configure options: not all show in a fork's signature"
        )
    nearest = release if before else known.last_before(release)
    if nearest is not None:
        changes = catalogue.differences(known.layouts[nearest], new.layouts[release])
        lines += [f"differences to what was known of {nearest}:", *(f"  {line}" for line in changes or ["none"])]
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
    """One line for each known release: its version, and which catalogue it is from.

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

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
    """For people: `DWARF`, `debug file PATH`, `debuginfod`, `catalogue 1.22.1`, `catalogue 1.26.3 (assumed)`."""
    assumed: bool = False
    """Whether it is that of an older release of the same branch: to be believed only once nginx's memory agrees."""


def layout_for(binary: Binary, known: Catalogue | None = None) -> Layout:
    """The layout of a binary: by its debug information, else by its exact release.

    Stable branches receive changes that move members, so a release stands for itself only. The newest known one of a
    branch also stands, assumed, for those that come after it.

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
    if not binary.with_compat:
        raise UserError(
            f"{binary.name} (nginx {binary.version}) was configured without --with-compat, so that its options decide "
            f"about its struct layout, and its debug information was not found: {_DEBUG_SYMBOLS}"
        )
    assumed = binary.version not in known.layouts
    release = known.before_in_branch(binary.version) if assumed else binary.version
    if release is None:
        raise UserError(
            f"the struct layout of nginx {binary.version} ({binary.name}) is not known, nor that of an earlier release "
            f"of its branch, and its debug information was not found: {_DEBUG_SYMBOLS}; or add the release from a "
            "build that has them with `otel-nginx-ebpf layouts add BINARY`"
        )
    structs = {
        struct: {member: offset for member, offset in offsets.items() if member in members[struct]}
        for struct, offsets in known.layouts[release].items()
        if struct in members
    }
    return Layout(structs, f"catalogue {release}{' (assumed)' if assumed else ''}", assumed)


def _measured(binary: Binary, members: Mapping[str, set[str]]) -> Layout | None:
    """The layout by the first debug information that is whole."""
    for file in debug_files(binary):
        try:
            structs = read_structs(file.content, members, file.alternate)
        except DwarfError as error:
            _log.warning("%s: the layout is not taken from %s: %s", binary.name, file.source, error)
            continue
        lacking = [
            f"{struct}.{member}"
            for struct in sorted(members)
            for member in sorted(members[struct])
            if member not in structs.get(struct, {})
            and not struct.startswith(_OPTIONAL_STRUCTS)
            and (struct, member) not in _OPTIONAL_MEMBERS
        ]
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
    if binary.with_compat and binary.version in known.layouts:
        contradictions = catalogue.contradictions(known.layouts[binary.version], measured.structs)
        if contradictions:
            _log.warning(
                "%s is not laid out as nginx %s is, says its debug information (%s), which is believed: %s",
                binary.name,
                binary.version,
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
    if not binary.with_compat:
        raise UserError(
            f"{binary.name} was configured without --with-compat: its layout is that of no other build; "
            "it is traced by its own debug information"
        )
    measured = _measured(binary, catalogue.shipped().members())
    if measured is None:
        raise UserError(f"the debug information of {binary.name} was not found: {_DEBUG_SYMBOLS}")
    before = known.layouts.get(binary.version, {})
    if contradictions := catalogue.contradictions(before, measured.structs):
        raise UserError(
            f"{binary.name} is not laid out as nginx {binary.version} is known to be, so it is not added: "
            f"{'; '.join(contradictions)}; it is traced by its own debug information"
        )
    added = Catalogue({binary.version: measured.structs})
    new = known.filled_from(added)
    if new == known:
        return [f"nginx {binary.version} is known already, and {binary.name} agrees ({measured.source})"]
    _write(target, own.filled_from(added))
    nearest = binary.version if before else known.last_before(binary.version) or next(iter(known.layouts))
    changes = catalogue.differences(known.layouts[nearest], new.layouts[binary.version])
    return [
        f"nginx {binary.version} added to {target}, from {binary.name} ({measured.source})",
        f"differences to what was known of {nearest}:",
        *(f"  {line}" for line in changes or ["none"]),
    ]


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
    return [
        f"{release:<10}{', '.join(place for place, held in places.items() if release in held.layouts)}"
        for release in catalogue.known(path).layouts
    ]

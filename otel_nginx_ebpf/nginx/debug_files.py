"""Where a binary's debug information may be: in itself, in a file of its own on this host or in its container, or on a
debuginfod server. What is offered is of that very build: its build-id says so, or the checksum in .gnu_debuglink."""

import logging
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from elftools.elf.elffile import ELFFile

from otel_nginx_ebpf.nginx import debuginfod
from otel_nginx_ebpf.nginx.binary import Binary, read_build_id

_log = logging.getLogger(__name__)

_DEBUG_DIRECTORY = Path("/usr/lib/debug")
_DELETED = " (deleted)"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DebugFile:
    """An ELF file that may have debug information. Open until the next one is asked for."""

    source: str
    """`DWARF` (the binary itself), `debug file PATH` or `debuginfod`."""
    content: BinaryIO
    alternate: BinaryIO | None
    """The file that it shares entries with by .gnu_debugaltlink."""


@dataclass(frozen=True, slots=True)
class _Link:
    """A reference to another file by `.gnu_debuglink` or `.gnu_debugaltlink`."""

    name: Path
    checksum: int = 0
    build_id: str = ""


def debug_files(binary: Binary) -> Iterator[DebugFile]:
    """What may have a binary's debug information, the most trustworthy first; a server is asked last."""
    roots, path = _roots(binary.path), _path_in_root(binary.path)
    link: _Link | None = None
    with ExitStack() as stack:
        if (own := _opened(binary.path)) is not None:
            stack.enter_context(own)
            link = _debug_link(own)
            yield DebugFile("DWARF", own, _alternate(own, _below(roots[0], path.parent), roots, stack))
    for candidate in _candidates(binary.build_id, link, path.parent, roots):
        with ExitStack() as stack:
            content = _opened(candidate)
            if content is None:
                continue
            stack.enter_context(content)
            if _belongs(content, binary.build_id, link):
                alternate = _alternate(content, candidate.parent, roots, stack)
                yield DebugFile(f"debug file {candidate}", content, alternate)
            else:
                _log.debug("%s is not of the build %s", candidate, binary.name)
    if binary.build_id and (downloaded := debuginfod.fetch(binary.build_id)) is not None:
        with ExitStack() as stack:
            file = BytesIO(downloaded)
            if _belongs(file, binary.build_id, None):
                yield DebugFile("debuginfod", file, _alternate(file, _below(roots[0], path.parent), roots, stack))
            else:
                _log.warning("what debuginfod gave for %s (build-id %s) is not of it", binary.name, binary.build_id)


def _roots(path: Path) -> tuple[Path, ...]:
    """The root directory of the process that a /proc/PID/exe belongs to, which may be a container's; then ours."""
    ours = Path("/")
    if path.parts[1:2] != ("proc",) or path.name != "exe":
        return (ours,)
    its = path.parent / "root"
    try:
        return (ours,) if its.samefile(ours) else (its, ours)
    except OSError:
        return (ours,)


def _path_in_root(path: Path) -> Path:
    """Where the binary lies, seen from its process's root directory."""
    if path.parts[1:2] != ("proc",):
        return path.resolve()
    try:
        seen_from_ours = Path(os.readlink(path).removesuffix(_DELETED))
        root = Path(os.readlink(path.parent / "root"))
    except OSError:
        return path
    # A chroot's path shows in both; in a mount namespace of its own the root is / to us too.
    return "/" / seen_from_ours.relative_to(root) if seen_from_ours.is_relative_to(root) else seen_from_ours


def _candidates(build_id: str, link: _Link | None, directory: Path, roots: tuple[Path, ...]) -> Iterator[Path]:
    for root in roots:
        if build_id:
            yield _below(root, _by_build_id(build_id))
        if link is not None:
            for folder in (directory, directory / ".debug", _below(_DEBUG_DIRECTORY, directory)):
                yield _below(root, folder / link.name.name)


def _by_build_id(build_id: str) -> Path:
    return _DEBUG_DIRECTORY / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/") if path.is_absolute() else root / path


def _opened(path: Path) -> BinaryIO | None:
    """None: there is no such file, or it is none to read. A container may have put a pipe there, which would wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def _belongs(file: BinaryIO, build_id: str, link: _Link | None) -> bool:
    """Whether a debug file is of the build that looks for it."""
    try:
        its_build_id = read_build_id(ELFFile(file))
    except Exception as error:  # pyelftools raises whatever it stumbles over in a damaged file
        _log.warning("%s cannot be read: %s", getattr(file, "name", "a debug file"), error)
        return False
    if build_id and its_build_id:
        return its_build_id == build_id
    return link is not None and _checksum(file) == link.checksum


def _checksum(file: BinaryIO) -> int:
    """As in .gnu_debuglink: the CRC-32 of the whole file."""
    file.seek(0)
    checksum = 0
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _section(file: BinaryIO, name: str) -> bytes:
    """Empty where there is no such section, or the file is damaged."""
    try:
        section = ELFFile(file).get_section_by_name(name)
        return bytes(section.data()) if section is not None and section["sh_size"] < os.sysconf("SC_PAGE_SIZE") else b""
    except Exception as error:  # as above
        _log.debug("no %s: %s", name, error)
        return b""


def _debug_link(file: BinaryIO) -> _Link | None:
    """The file's name, padded with zeros to four bytes, and its checksum."""
    data = _section(file, ".gnu_debuglink")
    name = data.partition(b"\0")[0]
    return _Link(Path(os.fsdecode(name)), checksum=int.from_bytes(data[-4:], "little")) if name else None


def _alternate(file: BinaryIO, directory: Path, roots: tuple[Path, ...], stack: ExitStack) -> BinaryIO | None:
    """The file that dwz moved shared entries to: its name, from the linking file's directory, and its build-id."""
    name, _, build_id = _section(file, ".gnu_debugaltlink").partition(b"\0")
    if not name:
        return None
    named = Path(os.fsdecode(name))
    candidates = [_below(root, named) for root in roots] if named.is_absolute() else [directory / named]
    candidates += [_below(root, _by_build_id(build_id.hex())) for root in roots]
    for candidate in candidates:
        if (found := _opened(candidate)) is not None:
            stack.enter_context(found)
            if _belongs(found, build_id.hex(), None):
                return found
    _log.warning("the debug information's shared part %s is missing", named)
    return None

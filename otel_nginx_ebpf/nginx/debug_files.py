"""Finds a binary's debug information: in the binary, in a debug file on this host or in its container, or on a
debuginfod server. Each file found belongs to exactly this build, by its build-id or the checksum in .gnu_debuglink."""

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
    """An ELF file that may have debug information. It stays open until the next file is requested."""

    source: str
    """`DWARF` (the binary itself), `debug file PATH` or `debuginfod`."""
    content: BinaryIO
    alternate: BinaryIO | None
    """The file that holds the shared entries (.gnu_debugaltlink)."""


@dataclass(frozen=True, slots=True)
class _Link:
    """A reference to another file by `.gnu_debuglink` or `.gnu_debugaltlink`."""

    name: Path
    checksum: int = 0
    build_id: str = ""


def debug_files(binary: Binary) -> Iterator[DebugFile]:
    """Yields the files that may have a binary's debug information, the most trustworthy first, a server's file last."""
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
                _log.debug("%s does not belong to this build of %s", candidate, binary.name)
    if binary.build_id and (downloaded := debuginfod.fetch(binary.build_id)) is not None:
        with ExitStack() as stack:
            file = BytesIO(downloaded)
            if _belongs(file, binary.build_id, None):
                yield DebugFile("debuginfod", file, _alternate(file, _below(roots[0], path.parent), roots, stack))
            else:
                _log.warning(
                    "the file from debuginfod does not belong to %s (build-id %s)", binary.name, binary.build_id
                )


def _roots(path: Path) -> tuple[Path, ...]:
    """Returns the root directory of the process of a /proc/PID/exe, if it is another root, and then this process's."""
    ours = Path("/")
    if path.parts[1:2] != ("proc",) or path.name != "exe":
        return (ours,)
    its = path.parent / "root"
    try:
        return (ours,) if its.samefile(ours) else (its, ours)
    except OSError:
        return (ours,)


def _path_in_root(path: Path) -> Path:
    """Returns the binary's path as its process sees it."""
    if path.parts[1:2] != ("proc",):
        return path.resolve()
    try:
        seen_from_ours = Path(os.readlink(path).removesuffix(_DELETED))
        root = Path(os.readlink(path.parent / "root"))
    except OSError:
        return path
    # In a chroot both links begin with the chroot's path. For another mount namespace the root reads as /.
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
    """Opens a regular file. Returns None if the file does not exist or cannot be read.

    A container may have put a pipe at the path; a read of the pipe would block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


def _belongs(file: BinaryIO, build_id: str, link: _Link | None) -> bool:
    """Tells whether a debug file belongs to the build with this build-id, or with this link."""
    try:
        its_build_id = read_build_id(ELFFile(file))
    except Exception as error:  # pyelftools raises arbitrary exceptions for a damaged file
        _log.warning("%s cannot be read: %s", getattr(file, "name", "a debug file"), error)
        return False
    if build_id and its_build_id:
        return its_build_id == build_id
    return link is not None and _checksum(file) == link.checksum


def _checksum(file: BinaryIO) -> int:
    """Returns the CRC-32 of the whole file, as .gnu_debuglink has it."""
    file.seek(0)
    checksum = 0
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _section(file: BinaryIO, name: str) -> bytes:
    """Returns a section's bytes; empty if the section is missing or large, or the file is damaged."""
    try:
        section = ELFFile(file).get_section_by_name(name)
        return bytes(section.data()) if section is not None and section["sh_size"] < os.sysconf("SC_PAGE_SIZE") else b""
    except Exception as error:  # arbitrary, as in _belongs
        _log.debug("no %s: %s", name, error)
        return b""


def _debug_link(file: BinaryIO) -> _Link | None:
    """Reads .gnu_debuglink: a file's name, padded with zeros to four bytes, and the file's checksum."""
    data = _section(file, ".gnu_debuglink")
    name = data.partition(b"\0")[0]
    return _Link(Path(os.fsdecode(name)), checksum=int.from_bytes(data[-4:], "little")) if name else None


def _alternate(file: BinaryIO, directory: Path, roots: tuple[Path, ...], stack: ExitStack) -> BinaryIO | None:
    """Opens the file to which dwz moved shared entries (.gnu_debugaltlink). Returns None if there is no such file.

    The section holds the file's name, relative to `directory`, and its build-id.
    """
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

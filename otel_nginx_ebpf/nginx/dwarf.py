"""Reads struct layouts from a file's DWARF, and stops as soon as it has found them.

The file may come from a container or from the network. Reading it ends, whatever it contains.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from typing import BinaryIO

from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.die import DIE
from elftools.dwarf.dwarf_expr import DWARFExprParser
from elftools.dwarf.dwarfinfo import DWARFInfo
from elftools.elf.elffile import ELFFile

SIZEOF = "sizeof"
"""The key of a struct's size among the offsets of its members."""

# nginx with a static OpenSSL has about 40 MB. A file with more than this limit is damaged or hostile.
_DEBUG_BYTES_MAX = 512 << 20
# Processor time. All debug information of nginx takes 4 s.
_TIME_LIMIT_S = 20.0

# The longest chain of typedefs. A longer chain is a circle.
_TYPEDEFS_MAX = 8

_REFERENCES_IN_UNIT = {f"DW_FORM_ref{kind}" for kind in ("1", "2", "4", "8", "_udata")}

Structs = dict[str, dict[str, int]]
"""Offsets by struct and member: in bytes, or in bits for a bit-field, which is named `member:width`."""


class DwarfError(Exception):
    """Debug information that cannot be used. The text says why."""


def read_structs(
    file: BinaryIO, wanted: Mapping[str, Collection[str]], alternate: BinaryIO | None = None
) -> dict[str, dict[str, int]]:
    """Finds the wanted members in the debug information of an ELF file.

    Args:
        file: The ELF file. It must be seekable; its position does not matter.
        wanted: Members by struct. A struct is named by its tag or its typedef, a bit-field as `member:width`.
        alternate: The file to which dwz moved shared entries (.gnu_debugaltlink).

    Returns:
        Offsets by struct and member; empty if the file has no DWARF.

    Raises:
        DwarfError: The debug information is damaged, takes too long to read, or keeps types in separate units
            (-fdebug-types-section).
    """
    try:
        dwarf = _dwarf(file)
        if dwarf is None:
            return {}
        if alternate is not None:
            dwarf.supplementary_dwarfinfo = _dwarf(alternate)
        return _Reader(wanted).read(dwarf)
    except DwarfError:
        raise
    except Exception as error:  # pyelftools raises arbitrary exceptions for damaged data
        raise DwarfError(f"damaged debug information: {type(error).__name__} {error}".rstrip()) from error


def _dwarf(file: BinaryIO) -> DWARFInfo | None:
    """Opens the debug information of a file; None if the file has none.

    Checks its size first, because pyelftools reads all of it into memory. Raises `DwarfError` if it is too large.
    """
    elf = ELFFile(file)
    file_bytes = file.seek(0, 2)
    debug_bytes = 0
    for section in elf.iter_sections():
        if not section.name.startswith((".debug_", ".zdebug_", ".gnu_debugaltlink")):
            continue
        if section["sh_type"] == "SHT_NOBITS":
            return None
        if section["sh_offset"] + section["sh_size"] > file_bytes:
            raise DwarfError(f"damaged debug information: {section.name} passes the end of the file")
        debug_bytes += section.data_size
        if section.name.startswith(".zdebug_"):
            file.seek(section["sh_offset"] + len(b"ZLIB"))
            debug_bytes += int.from_bytes(file.read(8), "big")
    if debug_bytes > _DEBUG_BYTES_MAX:
        raise DwarfError(f"{debug_bytes >> 20} MiB of debug information, more than nginx has")
    if not elf.has_dwarf_info(strict=True):
        return None
    return elf.get_dwarf_info(relocate_dwarf_sections=elf["e_type"] == "ET_REL", follow_links=False)


class _Reader:
    def __init__(self, wanted: Mapping[str, Collection[str]]) -> None:
        self._wanted = wanted
        self._found: Structs = {}
        self._deadline_s = time.thread_time() + _TIME_LIMIT_S

    @property
    def _missing(self) -> set[str]:
        return self._wanted.keys() - self._found.keys()

    def read(self, dwarf: DWARFInfo) -> Structs:
        """Finds the wanted structs. Reads the units of nginx's HTTP code first: each of them has nearly all structs.

        Units that dwz has made have no name. They are small, because they hold each entry only once.
        """
        unnamed, others = [], []
        of_http = False
        for unit in self._units(dwarf):
            name = _text(unit.get_top_DIE(), "DW_AT_name")
            if not name:
                unnamed.append(unit)
            elif "http/" not in name:
                others.append(unit)
            else:
                of_http = True
                if any(_may_define(name, struct) for struct in self._missing):
                    self._read_unit(unit)
                    if not self._missing:
                        return self._found
        if dwarf.supplementary_dwarfinfo is not None:
            unnamed += self._units(dwarf.supplementary_dwarfinfo)
        for unit in unnamed if of_http else unnamed + others:
            self._read_unit(unit)
        return self._found

    def _units(self, dwarf: DWARFInfo) -> Iterator[CompileUnit]:
        for unit in dwarf.iter_CUs():
            self._check_time()
            yield unit

    def _check_time(self) -> None:
        if time.thread_time() > self._deadline_s:
            raise DwarfError(f"reading the debug information takes more than {_TIME_LIMIT_S:.0f} s")

    def _read_unit(self, unit: CompileUnit) -> None:
        for entry in self._children(unit.get_top_DIE()):
            if not self._missing:
                return
            if entry.tag not in ("DW_TAG_structure_type", "DW_TAG_typedef"):
                continue
            name = _text(entry, "DW_AT_name")
            if name in self._missing and (struct := _struct(entry)) is not None:
                self._found[name] = self._members(name, struct)

    def _members(self, name: str, struct: DIE) -> dict[str, int]:
        size = _number(struct, "DW_AT_byte_size")
        members = {SIZEOF: size}
        for entry in self._children(struct):
            if entry.tag != "DW_TAG_member":
                continue
            member = _text(entry, "DW_AT_name")
            if "DW_AT_bit_size" not in entry.attributes:
                members[member] = _member_offset(entry)
            elif (field := f"{member}:{_number(entry, 'DW_AT_bit_size')}") in self._wanted[name]:
                members[field] = _bit_offset(entry)
        found = {member: members[member] for member in self._wanted[name] if member in members}
        for member, offset in found.items():
            if member != SIZEOF and not 0 <= offset < (size * 8 if is_bit_field(member) else size):
                raise DwarfError(f"damaged debug information: {name}.{member} at {offset} of {size} bytes")
        return found

    def _children(self, parent: DIE) -> Iterator[DIE]:
        """Yields the direct children. pyelftools' own iterator follows sibling references even backwards, for ever."""
        unit = parent.cu
        offset, depth = parent.offset + parent.size, 0
        while parent.has_children and offset < unit.cu_offset + unit.size:
            self._check_time()
            entry = unit.get_DIE_from_refaddr(offset)
            offset += entry.size
            if entry.is_null():
                depth -= 1
                if depth < 0:
                    return
                continue
            if depth == 0:
                yield entry
            if entry.has_children:
                sibling = _sibling(entry)
                if sibling is not None and sibling >= offset:
                    offset = sibling
                else:
                    depth += 1


def is_bit_field(member: str) -> bool:
    """Tells whether a member is a bit-field, whose offset is in bits."""
    return ":" in member


def _may_define(unit: str, struct: str) -> bool:
    """Tells whether a source file of nginx's HTTP code may have a struct.

    Only the module of HTTP/2 or HTTP/3 has the structs of that version.
    """
    version = struct.removeprefix("ngx_http_")[:3]
    return f"http/{version[:2]}/" in unit if version in ("v2_", "v3_") else True


def _text(entry: DIE, attribute: str) -> str:
    value = entry.attributes[attribute].value if attribute in entry.attributes else b""
    # The value is not bytes if the string is in an alternate file that is missing.
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _number(entry: DIE, attribute: str) -> int:
    value = entry.attributes[attribute].value
    if not isinstance(value, int):
        raise DwarfError(f"damaged debug information: {attribute} is not a number")
    return value


def _sibling(entry: DIE) -> int | None:
    attribute = entry.attributes.get("DW_AT_sibling")
    if attribute is None or attribute.form not in _REFERENCES_IN_UNIT:
        return None
    return int(entry.cu.cu_offset + attribute.value)


def _struct(entry: DIE) -> DIE | None:
    """Returns the struct that an entry names; None for a declaration without members or another kind of type."""
    for _ in range(_TYPEDEFS_MAX):
        if entry.tag == "DW_TAG_structure_type":
            return None if "DW_AT_declaration" in entry.attributes else entry
        if entry.tag != "DW_TAG_typedef" or "DW_AT_type" not in entry.attributes:
            return None
        entry = entry.get_DIE_from_attribute("DW_AT_type")
    return None


def _member_offset(member: DIE) -> int:
    """Returns a member's offset in bytes (DW_AT_data_member_location).

    The attribute is a number or, up to DWARF 3, the expression `DW_OP_plus_uconst number`.
    """
    attribute = member.attributes.get("DW_AT_data_member_location")
    if attribute is None:
        raise DwarfError("damaged debug information: a member of a struct has no offset")
    if isinstance(attribute.value, int):
        return attribute.value
    (operation,) = DWARFExprParser(member.cu.structs).parse_expr(attribute.value)
    if operation.op_name != "DW_OP_plus_uconst":
        raise DwarfError(f"a member's offset is {operation.op_name}, which C compilers do not write")
    return int(operation.args[0])


def _bit_offset(member: DIE) -> int:
    """Returns a bit-field's offset in bits: DW_AT_data_bit_offset.

    Up to DWARF 4: DW_AT_bit_offset, which counts from the highest bit of the integer that the field is in.
    """
    if "DW_AT_data_bit_offset" in member.attributes:
        return _number(member, "DW_AT_data_bit_offset")
    unit_bits = 8 * _number(member, "DW_AT_byte_size")
    from_highest = _number(member, "DW_AT_bit_offset") + _number(member, "DW_AT_bit_size")
    return 8 * _member_offset(member) + unit_bits - from_highest

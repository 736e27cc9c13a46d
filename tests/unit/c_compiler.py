"""Runs gcc: to learn the layout of structs from its debug information, and to run C code."""

import ctypes
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from elftools.dwarf.die import DIE
from elftools.elf.elffile import ELFFile

CROSS = "aarch64-linux-gnu-gcc"
"""Makes code for arm64 on any machine."""

# Behind the compiler's own headers: other libraries' headers, which are the same for all machines.
_LIBRARIES = ("/usr/include", f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}")
CROSS_WITH_LIBRARIES = (CROSS, *(flag for folder in _LIBRARIES for flag in ("-idirafter", folder)))


def compile_object(source: str, include: Sequence[Path] = (), compiler: Sequence[str] = ("gcc",)) -> bytes:
    """The object file of a C text, with debug information."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "object.o"
        compiled = subprocess.run(
            [*compiler, "-g", "-c", "-x", "c", *(f"-I{path}" for path in include), "-o", target, "-"],
            input=source.encode(),
            capture_output=True,
            check=False,
        )
        assert compiled.returncode == 0, compiled.stderr.decode()
        return target.read_bytes()


def compile_library(source: str, include: Sequence[Path] = ()) -> ctypes.CDLL:
    """The functions of a C text, to be called. Warnings are errors, undefined behaviour ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library.so"
        compiled = subprocess.run(
            [
                *("gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-x", "c"),
                *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
                *(f"-I{path}" for path in include),
                "-o",
                target,
                "-",
            ],
            input=source.encode(),
            capture_output=True,
            check=False,
        )
        assert compiled.returncode == 0, compiled.stderr.decode()
        return ctypes.CDLL(str(target))


class DebugInfo:
    """Structs by name, as DWARF describes them."""

    def __init__(self, object_file: bytes) -> None:
        dwarf = ELFFile(BytesIO(object_file)).get_dwarf_info()
        self._structs: dict[str, DIE] = {}
        for unit in dwarf.iter_CUs():
            for entry in unit.iter_DIEs():
                if entry.tag == "DW_TAG_structure_type" and "DW_AT_byte_size" in entry.attributes:
                    self._add(entry, entry)
                if entry.tag == "DW_TAG_typedef" and "DW_AT_type" in entry.attributes:
                    target = entry.get_DIE_from_attribute("DW_AT_type")
                    if target.tag == "DW_TAG_structure_type" and "DW_AT_byte_size" in target.attributes:
                        self._add(entry, target)

    def _add(self, named: DIE, struct: DIE) -> None:
        if "DW_AT_name" in named.attributes:
            self._structs[named.attributes["DW_AT_name"].value.decode()] = struct

    def size(self, name: str) -> int:
        return int(self._structs[name].attributes["DW_AT_byte_size"].value)

    def offsets(self, name: str) -> dict[str, int]:
        """Members and their offsets in bytes, in order; of bit-fields in bits, as `member:width`."""
        members: dict[str, int] = {}
        for child in self._structs[name].iter_children():
            told = child.attributes
            if child.tag != "DW_TAG_member" or "DW_AT_name" not in told:
                continue
            member = told["DW_AT_name"].value.decode()
            if "DW_AT_data_bit_offset" in told:
                members[f"{member}:{told['DW_AT_bit_size'].value}"] = told["DW_AT_data_bit_offset"].value
            elif "DW_AT_data_member_location" in told:
                members[member] = told["DW_AT_data_member_location"].value
        return members

"""Reads an nginx binary, stripped or not: version, build, symbols and the instructions where a probe can sit."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import capstone
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.machine import MACHINES, Handling, Machine
from otel_nginx_ebpf.nginx.signature import Signature

NGINX = "nginx"

# The product and its release, as in the texts of `-v`, the error log's first line and the Server header (NGINX_VER,
# ANGIE_VER, TENGINE_VER). A fork may contain nginx's texts too. Unknown product names count only in the text of `-v`.
_IDENTITY = re.compile(
    rb"\0(?:nginx version: ([\w.-]{1,64})|(?:\w{1,64} version: |Server: )?(nginx|Angie|freenginx|openresty|Tengine))"
    rb"/([0-9]{1,8}(?:\.[0-9]{1,8}){1,3})(?=[ \r\n\0])"
)
# Angie's signature begins with its name.
_SIGNATURE = re.compile(rb"\0(?:\w+,)?\d,\d,\d,([01]{34,})\0")
_CONFIGURE = re.compile(rb"configure arguments:([^\0\n]*)")

# The longest prologue seen before a usable instruction is 11 bytes on x86-64. Later instructions have overwritten the
# arguments.
_PROLOGUE_BYTES = 64

_FUNCTION_BYTES_MAX = 65536

# Elf64_Sym.
_SYMBOL_BYTES = 24

_DISASSEMBLERS = {
    "x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64),
    "aarch64": (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM),
}


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction for a uprobe: if there is one, an instruction that the kernel need not step."""

    function: str
    address: int
    """The virtual address in the binary."""
    file_offset: int
    displacement: int
    """The distance from the function's entry, in bytes."""
    instruction: str
    handling: Handling

    def __str__(self) -> str:
        return f"{self.function}+{self.displacement} ({self.instruction})"


class NoSiteError(Exception):
    """A function is not exported, or has no instruction to probe at low cost. The text says which."""


class Binary:
    """An nginx executable. `path` may be a /proc/PID/exe link; `name`, for people, is then the link's target.

    Raises:
        UserError: The file is not an ELF executable for a machine of `MACHINES`, or is not nginx.
        TemporaryError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.parent / path.readlink()) if path.is_symlink() else str(path)
        try:
            with path.open("rb") as file:
                self._read(ELFFile(file), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise TemporaryError(f"cannot read {self.name}: {error.strerror}") from error
        except UserError:
            raise
        except Exception as error:  # pyelftools raises arbitrary exceptions for a damaged file
            raise UserError(f"{self.name} is not an executable this program understands: {error}") from error

    def _read(self, elf: ELFFile, file_bytes: int) -> None:
        self.machine = self._machine_of(elf.get_machine_arch())
        if elf.num_segments() * elf.structs.Elf_Phdr.sizeof() > file_bytes:
            raise ELFError("a damaged table of segments")
        self._segments: list[tuple[int, int, int, bytes]] = []
        loaded_bytes = 0
        for segment in elf.iter_segments("PT_LOAD"):
            loaded_bytes += segment["p_filesz"]
            if segment["p_offset"] + segment["p_filesz"] > file_bytes or loaded_bytes > 2 * file_bytes:
                raise ELFError("a segment passes the file's end, or many overlap")
            self._segments.append((segment["p_vaddr"], segment["p_filesz"], segment["p_offset"], segment.data()))
        self.symbols: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        symbol_bytes = 0
        for section in elf.iter_sections():
            if isinstance(section, SymbolTableSection):
                symbol_bytes += section["sh_size"]
                if section["sh_entsize"] != _SYMBOL_BYTES or symbol_bytes > file_bytes:
                    raise ELFError("a damaged symbol table")
                for symbol in section.iter_symbols():
                    if symbol["st_shndx"] != "SHN_UNDEF" and symbol.name.startswith("ngx_"):
                        self.symbols[symbol.name] = symbol["st_value"]
                        self._sizes[symbol.name] = symbol["st_size"]
        rodata = b"\0".join(data for _, _, _, data in self._segments)
        self.product, self.version = self._identity(rodata)
        signature = _SIGNATURE.search(rodata)
        configure = _CONFIGURE.search(rodata)
        self.configure_arguments = configure[1].decode("utf-8", "replace").strip() if configure else ""
        self.signature = Signature(signature[1].decode() if signature else "")
        self.build_id = read_build_id(elf)

    def _machine_of(self, elf_name: str) -> Machine:
        for machine in MACHINES:
            if machine.elf == elf_name:
                return machine
        known = " and ".join(machine.title for machine in MACHINES)
        raise UserError(f"{self.name} is built for {elf_name}; only {known} are supported so far")

    def _identity(self, rodata: bytes) -> tuple[str, str]:
        """Returns the product, which is nginx or a fork, and its release.

        Raises:
            UserError: The binary is neither, or its functions cannot be found.
        """
        said = {(match[1] or match[2]).decode(): match[3].decode() for match in _IDENTITY.finditer(rodata)}
        product = next((product for product in said if product != NGINX), NGINX)
        if product in said and not self.symbols:
            raise UserError(
                f"{self.name} is {product} without symbols, so its functions cannot be found: it is linked statically "
                "and stripped; run a build that is linked dynamically or not stripped"
            )
        if "ngx_http_core_module" not in self.symbols:
            raise UserError(f"{self.name} is not an nginx with the http module: give nginx's own binary or process")
        if product not in said:
            raise UserError(
                f"{self.name} is built from nginx's sources but does not say which release it is; "
                "run a build whose -v prints its name and version, such as nginx/1.28.0"
            )
        return product, said[product]

    @property
    def is_fork(self) -> bool:
        """Tells whether this is a fork of nginx, whose structs may differ from nginx's."""
        return self.product != NGINX

    @property
    def release(self) -> str:
        """The release's name in a catalogue of layouts, such as `1.22.1` or `angie-1.12.1`."""
        return f"{self.product.lower()}-{self.version}" if self.is_fork else self.version

    @property
    def with_compat(self) -> bool:
        """Tells whether modules of other builds fit (`--with-compat`)."""
        return self.signature.with_compat

    def __str__(self) -> str:
        return f"{self.product} {self.version}"

    def address(self, symbol: str) -> int:
        """Returns the virtual address of an exported symbol. Raises `NoSiteError` if the symbol is not exported."""
        try:
            return self.symbols[symbol]
        except KeyError:
            raise NoSiteError(f"{symbol} is not exported") from None

    @cached_property
    def _disassembler(self) -> capstone.Cs:
        disassembler = capstone.Cs(*_DISASSEMBLERS[self.machine.name])
        disassembler.detail = True
        return disassembler

    def _instructions(self, address: int, code_bytes: int) -> Iterator[tuple[capstone.CsInsn, int]]:
        for start, size, offset, data in self._segments:
            if start <= address < start + size:
                code = data[address - start : address - start + code_bytes]
                for instruction in self._disassembler.disasm(code, address):
                    yield instruction, offset + instruction.address - start

    def _is_jumped_to(self, site: Site) -> bool:
        """Tells whether the function itself jumps behind its entry and no farther than to the site, as in a loop.

        A hit there need not be a call.
        """
        if not site.displacement:
            return False
        entry = site.address - site.displacement
        size = min(self._sizes[site.function], _FUNCTION_BYTES_MAX)
        return any(
            operand.type == capstone.CS_OP_IMM and entry < operand.imm <= site.address
            for instruction, _ in self._instructions(entry, size)
            if capstone.CS_GRP_BRANCH_RELATIVE in instruction.groups
            for operand in instruction.operands
        )

    def site(self, function: str, arguments: int) -> Site:
        """Returns the first instruction of `function` that is cheap to probe before its arguments are overwritten.

        On arm64 functions may have no such instruction, so there an instruction that the kernel steps will do.

        Args:
            function: The function's name.
            arguments: How many of its arguments must still be in their registers.

        Raises:
            NoSiteError: The function is not exported, or has no such instruction.
        """
        entry = self.address(function)
        watched = set().union(*self.machine.argument_registers[:arguments])
        stepped: Site | None = None
        for instruction, file_offset in self._instructions(entry, _PROLOGUE_BYTES):
            text = f"{instruction.mnemonic} {instruction.op_str}".strip()
            handling = self.machine.handling(bytes(instruction.bytes))
            if handling and (handling != "stepped" or (self.machine.may_step and not stepped)):
                site = Site(function, instruction.address, file_offset, instruction.address - entry, text, handling)
                if not self._is_jumped_to(site):
                    if handling != "stepped":
                        return site
                    stepped = site
            written = {instruction.reg_name(each) for each in instruction.regs_access()[1]}
            leaves = {capstone.CS_GRP_CALL, capstone.CS_GRP_JUMP, capstone.CS_GRP_RET} & set(instruction.groups)
            if handling is None or leaves or watched & written:
                where = f"before `{text}`"
                break
        else:
            where = f"in its first {_PROLOGUE_BYTES} bytes"
        if stepped is None:
            raise NoSiteError(f"{function} has no instruction to probe cheaply {where}")
        return stepped


def read_build_id(elf: ELFFile) -> str:
    """Returns the build-id in hexadecimal digits; empty if the file has none.

    The note's owner counts too: SystemTap uses the same number for other notes.
    """
    for section in elf.iter_sections():
        if isinstance(section, NoteSection):
            for note in section.iter_notes():
                if (note["n_name"], note["n_type"]) == ("GNU", "NT_GNU_BUILD_ID"):
                    return str(note["n_desc"])
    return ""

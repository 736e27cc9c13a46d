"""Reads an nginx binary, stripped or not: version, build, symbols and the instructions where a probe can sit."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import capstone
from capstone import x86_const
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from otel_nginx_ebpf.errors import TemporaryError, UserError
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

# The longest prologue seen before a usable instruction is 11 bytes. Later instructions have overwritten the arguments.
_PROLOGUE_BYTES = 64

# Elf64_Sym.
_SYMBOL_BYTES = 24

_ARGUMENT_REGISTERS = (
    {x86_const.X86_REG_RDI, x86_const.X86_REG_EDI, x86_const.X86_REG_DI, x86_const.X86_REG_DIL},
    {x86_const.X86_REG_RSI, x86_const.X86_REG_ESI, x86_const.X86_REG_SI, x86_const.X86_REG_SIL},
)


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction that the kernel can emulate for a uprobe, without single-stepping (arch/x86/kernel/uprobes.c)."""

    function: str
    address: int
    """The virtual address in the binary."""
    file_offset: int
    displacement: int
    """The distance from the function's entry, in bytes."""
    instruction: str

    def __str__(self) -> str:
        return f"{self.function}+{self.displacement} ({self.instruction})"


class NoSiteError(Exception):
    """A function is not exported, or has no instruction to probe at low cost. The text says which."""


class Binary:
    """An nginx executable. `path` may be a /proc/PID/exe link; `name`, for people, is then the link's target.

    Raises:
        UserError: The file is not an ELF executable for x86-64, or is not nginx.
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
        if elf.get_machine_arch() != "x64":
            raise UserError(f"{self.name} is built for {elf.get_machine_arch()}; only x86-64 is supported so far")
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
        symbol_bytes = 0
        for section in elf.iter_sections():
            if isinstance(section, SymbolTableSection):
                symbol_bytes += section["sh_size"]
                if section["sh_entsize"] != _SYMBOL_BYTES or symbol_bytes > file_bytes:
                    raise ELFError("a damaged symbol table")
                for symbol in section.iter_symbols():
                    if symbol["st_shndx"] != "SHN_UNDEF" and symbol.name.startswith("ngx_"):
                        self.symbols[symbol.name] = symbol["st_value"]
        rodata = b"\0".join(data for _, _, _, data in self._segments)
        self.product, self.version = self._identity(rodata)
        signature = _SIGNATURE.search(rodata)
        configure = _CONFIGURE.search(rodata)
        self.configure_arguments = configure[1].decode("utf-8", "replace").strip() if configure else ""
        self.signature = Signature(signature[1].decode() if signature else "")
        self.build_id = read_build_id(elf)

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
        disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        disassembler.detail = True
        return disassembler

    def _instructions(self, address: int) -> Iterator[tuple[capstone.CsInsn, int]]:
        for start, size, offset, data in self._segments:
            if start <= address < start + size:
                code = data[address - start : address - start + _PROLOGUE_BYTES]
                for instruction in self._disassembler.disasm(code, address):
                    yield instruction, offset + instruction.address - start

    def site(self, function: str, arguments: int) -> Site:
        """Returns the first instruction of `function` that is cheap to probe before its arguments are overwritten.

        Args:
            function: The function's name.
            arguments: How many of its arguments must still be in their registers.

        Raises:
            NoSiteError: The function is not exported, or has no such instruction.
        """
        entry = self.address(function)
        watched = set().union(*_ARGUMENT_REGISTERS[:arguments])
        for instruction, file_offset in self._instructions(entry):
            text = f"{instruction.mnemonic} {instruction.op_str}".strip()
            if _is_emulated(instruction):
                return Site(function, instruction.address, file_offset, instruction.address - entry, text)
            written = instruction.regs_access()[1]
            leaves = {capstone.CS_GRP_CALL, capstone.CS_GRP_JUMP, capstone.CS_GRP_RET} & set(instruction.groups)
            if leaves or watched & set(written):
                raise NoSiteError(f"{function} has no instruction to probe cheaply before `{text}`")
        raise NoSiteError(f"{function} has no instruction to probe cheaply in its first {_PROLOGUE_BYTES} bytes")


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


def _is_emulated(instruction: capstone.CsInsn) -> bool:
    """Tells whether the kernel emulates an instruction (branch_setup_xol_ops, push_setup_xol_ops).

    It emulates push %reg, jcc, jmp rel, call rel32 and the one-byte nop.
    """
    code = bytes(instruction.bytes)
    if 0x50 <= code[0] <= 0x57 or (code[0] == 0x41 and 0x50 <= code[1] <= 0x57):
        return True
    if code[0] in (0x90, 0xE8, 0xE9, 0xEB) or 0x70 <= code[0] <= 0x7F:
        return True
    return code[0] == 0x0F and 0x80 <= code[1] <= 0x8F

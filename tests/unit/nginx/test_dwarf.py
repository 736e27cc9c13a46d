"""Struct layouts from gcc's debug information, compared with what the compiled program itself says."""

import json
import subprocess
import zlib
from collections.abc import Sequence
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from otel_nginx_ebpf.nginx.dwarf import DwarfError, read_structs

# All the ways in which nginx declares structs, and one that only some units have.
SOURCE = """
#include <stddef.h>
#include <stdio.h>
#include <stdint.h>
#include <string.h>

typedef struct inner_s inner_t;
typedef struct { size_t len; unsigned char *data; } str_t;
struct outer_s { uint32_t signature; inner_t *inner; str_t uri; unsigned flag:1; unsigned other:7;
    unsigned wide:16; char tail[3]; unsigned last:3; };
typedef struct outer_s outer_t;
typedef outer_t again_t;
struct inner_s { char c; double d; void (*handler)(outer_t *o); };
typedef struct { unsigned char big[70000]; int after; } large_t;
struct declared_s;
typedef enum { ONE } not_a_struct_t;

outer_t outer;
again_t again;
inner_t inner;
large_t large;
struct declared_s *declared;
not_a_struct_t number;

/* The first bit that changes with the field. */
#define SAY_BIT(field, width, all) \\
    memset(&outer, 0, sizeof(outer)); \\
    outer.field = all; \\
    printf("\\"outer_s.%s:%d\\": %d, ", #field, width, first_bit(&outer, sizeof(outer)))
static int first_bit(const void *bytes, int size)
{
    for (int bit = 0; bit < size * 8; bit++)
        if (((const unsigned char *)bytes)[bit / 8] >> bit % 8 & 1)
            return bit;
    return -1;
}
#define SAY(type, member) printf("\\"%s.%s\\": %zu, ", #type, #member, offsetof(type, member))
int main(void)
{
    printf("{");
    SAY_BIT(flag, 1, 1);
    SAY_BIT(other, 7, 127);
    SAY_BIT(wide, 16, 65535);
    SAY_BIT(last, 3, 7);
    SAY(struct outer_s, signature);
    SAY(struct outer_s, inner);
    SAY(struct outer_s, uri);
    SAY(struct outer_s, tail);
    SAY(struct inner_s, c);
    SAY(struct inner_s, d);
    SAY(struct inner_s, handler);
    SAY(str_t, data);
    SAY(again_t, uri);
    SAY(large_t, after);
    printf("\\"struct outer_s.sizeof\\": %zu, \\"large_t.sizeof\\": %zu}", sizeof(struct outer_s), sizeof(large_t));
    return 0;
}
"""

WANTED = {
    "outer_s": (
        "signature",
        "inner",
        "uri",
        "tail",
        "sizeof",
        "flag:1",
        "other:7",
        "wide:16",
        "last:3",
        "flag",
        "wide:15",
        "no_such_member",
    ),
    "inner_s": ("c", "d", "handler"),
    "str_t": ("data",),
    "again_t": ("uri",),
    "large_t": ("after", "sizeof"),
    "declared_s": ("sizeof",),
    "not_a_struct_t": ("sizeof",),
    "no_such_struct": ("sizeof",),
}


def compiled(directory: Path, *flags: str, source: str = SOURCE, name: str = "program") -> Path:
    target = directory / name
    subprocess.run(["gcc", *flags, "-x", "c", "-o", target, "-"], input=source.encode(), check=True)
    return target


def measured(path: Path) -> dict[str, dict[str, int]]:
    with path.open("rb") as file:
        return read_structs(file, WANTED)


def flat(structs: dict[str, dict[str, int]]) -> dict[str, int]:
    return {f"{struct}.{member}": offset for struct, members in structs.items() for member, offset in members.items()}


def told_by(program: Path) -> dict[str, int]:
    """What offsetof says when the program runs."""
    told: dict[str, int] = json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    return {name.removeprefix("struct "): offset for name, offset in told.items()}


@pytest.mark.parametrize(
    "flags",
    [
        ("-gdwarf-2",),
        ("-gdwarf-2", "-gstrict-dwarf"),
        ("-gdwarf-3",),
        ("-gdwarf-4",),
        ("-gdwarf-5",),
        ("-gdwarf-4", "-gdwarf64"),
        ("-gdwarf-5", "-O3", "-flto"),
        ("-g", "-gz=zlib"),
        ("-g", "-gz=zlib-gnu"),
        ("-g", "-static"),
    ],
    ids=" ".join,
)
def test_offsets_are_those_of_the_compiled_program(tmp_path: Path, flags: Sequence[str]) -> None:
    program = compiled(tmp_path, *flags)
    assert flat(measured(program)) == told_by(program)


def test_type_units_are_refused_or_left_out_and_never_misread(tmp_path: Path) -> None:
    program = compiled(tmp_path, "-gdwarf-4", "-fdebug-types-section")
    assert flat(measured(program)).items() < told_by(program).items()
    with pytest.raises(DwarfError, match="Signature"):
        measured(compiled(tmp_path, "-gdwarf-5", "-fdebug-types-section"))


def test_a_file_without_debug_information_tells_nothing(tmp_path: Path) -> None:
    assert measured(compiled(tmp_path)) == {}
    program = compiled(tmp_path, "-g")
    subprocess.run(["strip", "--only-keep-debug", "-o", tmp_path / "kept", program], check=True)
    assert measured(tmp_path / "kept") == measured(program) != {}
    subprocess.run(["strip", "--strip-debug", program], check=True)
    assert measured(program) == {}


def test_what_dwz_moved_to_an_alternate_file_is_found_there(tmp_path: Path) -> None:
    first, second = (compiled(tmp_path, "-g", name=name) for name in ("first", "second"))
    expected = measured(first)
    subprocess.run(["dwz", "-m", "alternate", "-M", "alternate", first, second], cwd=tmp_path, check=True)
    assert measured(first) != expected
    with first.open("rb") as file, (tmp_path / "alternate").open("rb") as alternate:
        assert read_structs(file, WANTED, alternate) == expected


def test_units_that_dwz_shares_within_a_file_are_read(tmp_path: Path) -> None:
    program = compiled(tmp_path, "-g", "-static")
    expected = measured(program)
    subprocess.run(["dwz", program], check=True)
    assert measured(program) == expected


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compiled(tmp_path_factory.mktemp("dwarf"), "-g", "-gz=none").read_bytes()


def places(raw: bytes) -> list[tuple[int, int]]:
    """Where debug information and what leads to it are in the file: offsets and sizes in bytes."""
    names = (".debug_info", ".debug_abbrev", ".debug_str", ".debug_line_str")
    sections = [
        (section["sh_offset"], section["sh_size"])
        for section in ELFFile(BytesIO(raw)).iter_sections()
        if section.name in names
    ]
    assert len(sections) == len(names)
    return [(0, 64), *sections, (len(raw) - 2400, 2400)]


@settings(deadline=timedelta(seconds=25), max_examples=200)
@given(data=st.data())
def test_reading_damaged_debug_information_ends(raw: bytes, data: st.DataObject) -> None:
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 8))):
        offset, size = data.draw(st.sampled_from(places(raw)))
        at = offset + data.draw(st.integers(0, size - 1))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        damaged[at : at + len(damage)] = damage
    del damaged[data.draw(st.one_of(st.none(), st.integers(0, len(damaged)))) :]
    try:
        found = read_structs(BytesIO(bytes(damaged)), WANTED)
    except DwarfError:
        return
    assert found.keys() <= WANTED.keys()
    for struct, members in found.items():
        assert members.keys() <= set(WANTED[struct])
        assert all(offset >= 0 for offset in members.values())


@example(b"")
@example(b"\x7fELF")
@given(st.binary(max_size=200))
def test_what_is_no_elf_file_is_refused(content: bytes) -> None:
    with pytest.raises(DwarfError, match="damaged"):
        read_structs(BytesIO(content), WANTED)


@pytest.mark.parametrize("back", [0, 1, 100], ids="{} bytes back".format)
def test_siblings_in_a_circle_end(raw: bytes, back: int) -> None:
    elf = ELFFile(BytesIO(raw))
    start = elf.get_section_by_name(".debug_info")["sh_offset"]
    damaged = bytearray(raw)
    circles = 0
    for unit in elf.get_dwarf_info().iter_CUs():
        for entry in unit.iter_DIEs():
            if (sibling := entry.attributes.get("DW_AT_sibling")) is not None:
                target = max(entry.offset - unit.cu_offset - back, 0)
                damaged[start + sibling.offset : start + sibling.offset + 4] = target.to_bytes(4, "little")
                circles += 1
    assert circles > 3
    assert read_structs(BytesIO(bytes(damaged)), WANTED) == read_structs(BytesIO(raw), WANTED)


def section_header(raw: bytes, name: str) -> int:
    """The offset in bytes of a section's header (Elf64_Shdr)."""
    elf = ELFFile(BytesIO(raw))
    return int(elf["e_shoff"] + elf.get_section_index(name) * elf["e_shentsize"])


def test_a_section_that_passes_the_file_s_end_is_refused(raw: bytes) -> None:
    damaged = bytearray(raw)
    size_at = section_header(raw, ".debug_info") + 0x20
    damaged[size_at : size_at + 8] = (1 << 60).to_bytes(8, "little")
    with pytest.raises(DwarfError, match="passes the end of the file"):
        read_structs(BytesIO(bytes(damaged)), WANTED)


def test_a_section_that_would_fill_the_memory_is_refused(raw: bytes) -> None:
    """A compressed section (SHF_COMPRESSED) of a few bytes that says it has 2^40 of them, all zero."""
    header = section_header(raw, ".debug_str")
    damaged = bytearray(raw)
    content = (1).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little") + (1).to_bytes(8, "little")
    content += zlib.compress(bytes(1 << 20))
    damaged[header + 8 : header + 16] = (0x800).to_bytes(8, "little")
    damaged[header + 0x18 : header + 0x20] = len(damaged).to_bytes(8, "little")
    damaged[header + 0x20 : header + 0x28] = len(content).to_bytes(8, "little")
    with pytest.raises(DwarfError, match="MiB of debug information"):
        read_structs(BytesIO(bytes(damaged) + content), WANTED)


def test_offsets_outside_of_their_struct_are_refused(raw: bytes) -> None:
    elf = ELFFile(BytesIO(raw))
    start = elf.get_section_by_name(".debug_info")["sh_offset"]
    damaged = bytearray(raw)
    for unit in elf.get_dwarf_info().iter_CUs():
        for entry in unit.iter_DIEs():
            name = entry.attributes.get("DW_AT_name")
            if entry.tag == "DW_TAG_member" and name is not None and name.value == b"handler":
                damaged[start + entry.attributes["DW_AT_data_member_location"].offset] = 0x7F
    assert damaged != raw
    with pytest.raises(DwarfError, match=r"inner_s\.handler at 127 of 24 bytes"):
        read_structs(BytesIO(bytes(damaged)), WANTED)

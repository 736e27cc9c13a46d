"""The kernel program's structs, enums and limits, parsed from the text of `probes/record.h`, which declares them."""

import re
import struct
from collections.abc import Collection
from importlib.resources import files
from itertools import groupby

HEADER_TEXT = (files("otel_nginx_ebpf.probes") / "record.h").read_text(encoding="utf-8")

_FORMATS = {
    "__u8": "B",
    "__u16": "H",
    "__u32": "I",
    "__s32": "i",
    "__u64": "Q",
    "__s64": "q",
}


class CStruct:
    """A struct of `probes/record.h`: its fields in order, and its packed little-endian format."""

    def __init__(self, name: str, header_text: str = HEADER_TEXT) -> None:
        body = re.search(rf"^struct {name} {{(.*?)^}};", header_text, re.DOTALL | re.MULTILINE)
        if body is None:
            raise ValueError(f"record.h declares no struct {name}")
        self.name = name
        self.fields: tuple[tuple[str, str], ...] = tuple(re.findall(r"^\s+(__\w+) (\w+);", body[1], re.MULTILINE))
        self.struct = struct.Struct("<" + "".join(_FORMATS[kind] for kind, _ in self.fields))
        self.size = self.struct.size

    def offset(self, field: str) -> int:
        """Returns where a field begins, in bytes."""
        names = [name for _, name in self.fields]
        return struct.calcsize("<" + "".join(_FORMATS[kind] for kind, _ in self.fields[: names.index(field)]))

    def picking(self, numbers: Collection[str], skipped: Collection[str] = ()) -> struct.Struct:
        """Returns the format that unpacks `numbers` as numbers, in the struct's order, and leaves `skipped` out.

        What lies between them is unpacked as bytes: one value for each run of other fields.
        """
        unknown = {*numbers, *skipped} - {name for _, name in self.fields}
        if unknown:
            raise ValueError(f"struct {self.name} has no {', '.join(sorted(unknown))}")
        formats = []
        for wanted, run in groupby(self.fields, lambda field: (field[1] in numbers, field[1] in skipped)):
            kinds = "".join(_FORMATS[kind] for kind, _ in run)
            letter = "x" if wanted[1] else "s"
            formats.append(kinds if wanted[0] else f"{struct.calcsize('<' + kinds)}{letter}")
        return struct.Struct("<" + "".join(formats))


def c_enum(name: str, header_text: str = HEADER_TEXT) -> dict[str, int]:
    """Returns the members of an enum of `probes/record.h`, and their values."""
    body = re.search(rf"^enum {name} {{(.*?)^}};", header_text, re.DOTALL | re.MULTILINE)
    if body is None:
        raise ValueError(f"record.h declares no enum {name}")
    return {member: int(value) for member, value in re.findall(r"^\s+(\w+) = (\d+),", body[1], re.MULTILINE)}


REQUEST_RECORD = CStruct("request_record")
UPSTREAM_ATTEMPT = CStruct("upstream_attempt")
STRING_HEADER = CStruct("string_header")
STRING_KINDS = c_enum("string_kind")
LIMITS = c_enum("limit")

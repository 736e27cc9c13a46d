"""Makes executables to damage: small ones that look like nginx to the reader, and nginx itself."""

import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path

from elftools.elf.elffile import ELFFile
from matrix.builds import NO_COMPAT, obtain

WANTED = {"ngx_connection_s": {"data", "fd", "log", "sizeof"}, "ngx_str_t": {"len", "data"}, "ngx_log_t": {"sizeof"}}

_SOURCE = """
struct ngx_connection_s { void *data; int fd; struct ngx_log_s *log; unsigned tls:1; };
typedef struct { unsigned long len; unsigned char *data; } ngx_str_t;
struct ngx_log_s { ngx_str_t name; struct ngx_connection_s *connection; };
typedef struct ngx_log_s ngx_log_t;
const char version[] = "\\0nginx version: nginx/1.22.1\\0configure arguments: --with-compat\\0\\0008,4,8,000111\\0";
ngx_log_t ngx_http_core_module;
struct ngx_connection_s *ngx_http_create_request(struct ngx_connection_s *c) { c->fd++; return c; }
int ngx_http_free_request(ngx_str_t *s) { return s->len ? ngx_http_free_request(s) + 1 : 0; }
"""

_FLAGS = (
    ("-gdwarf-2",),
    ("-gdwarf-5",),
    ("-gdwarf-4", "-gdwarf64"),
    ("-g", "-gz=zlib"),
    (),
)


def small_executables() -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nginx.c"
        path.write_text(_SOURCE)
        shared = ("-shared", "-nostdlib", "-Wl,-z,noseparate-code", "-Wl,--build-id", "-Wl,--hash-style=gnu")
        for flags in _FLAGS:
            subprocess.run(["gcc", "-O1", *shared, *flags, "-o", "nginx", path.name], cwd=folder, check=True)
            yield (Path(folder) / "nginx").read_bytes()
        subprocess.run(["objcopy", "--add-gnu-debuglink=nginx.c", "nginx"], cwd=folder, check=True)
        yield (Path(folder) / "nginx").read_bytes()


_WITHOUT, _WITH_DEBUG_INFORMATION = range(2)


@cache
def _file(which: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return nginx's bytes, and the places that the program reads: offsets and sizes in bytes."""
    path = Path("/usr/sbin/nginx") if which == _WITHOUT else obtain(NO_COMPAT) / "nginx"
    raw = path.read_bytes()
    elf = ELFFile(BytesIO(raw))
    headers = [(0, 64), (elf["e_phoff"], elf["e_phnum"] * 56), (elf["e_shoff"], elf["e_shnum"] * 64)]
    sections = [
        (section["sh_offset"], section["sh_size"])
        for section in elf.iter_sections()
        if section["sh_type"] != "SHT_NOBITS"
        and section["sh_size"]
        and section.name.startswith(
            (".dyn", ".note", ".gnu_debug", ".debug_info", ".debug_abbrev", ".debug_str", ".text")
        )
    ]
    return raw, headers + sections


def damages() -> Iterator[bytes]:
    """Yield inputs: a byte for the file, then eight bytes for each damage (place, offset in it, new bytes)."""
    for which, place in product((_WITHOUT, _WITH_DEBUG_INFORMATION), range(12)):
        yield bytes([which]) + bytes([place]) + (40).to_bytes(3, "little") + b"\xff\xff\xff\x7f"


def damaged(data: bytes) -> bytes:
    """Apply an input in the format of `damages`. A place that does not exist cuts the file."""
    raw, places = _file(data[0] % 2 if data else _WITHOUT)
    changed = bytearray(raw)
    for start in range(1, len(data) - 7, 8):
        place, at, what = (
            data[start],
            int.from_bytes(data[start + 1 : start + 4], "little"),
            data[start + 4 : start + 8],
        )
        if place >= len(places):
            del changed[at * len(changed) >> 24 :]
            continue
        offset, size = places[place]
        at = offset + at % size
        changed[at : at + 4] = what[: max(len(changed) - at, 0)]
    return bytes(changed)

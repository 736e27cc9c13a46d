"""Checks requests of a live worker with `probes/layout.h`, the text of the kernel program, compiled by gcc.

It reads the worker's memory while the requests are in flight, by the offsets of any layout.
"""

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

from elftools.elf.elffile import ELFFile

from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.dwarf import is_bit_field
from otel_nginx_ebpf.nginx.layouts import layout_for
from otel_nginx_ebpf.planner.sites import OBJECTS
from otel_nginx_ebpf.traces.abi import c_enum
from tests.unit.c_compiler import compile_library

PROBES = Path(__file__).parents[2] / "probes"
FACTS = {value: name.removeprefix("FACT_").lower() for name, value in c_enum("layout_fact").items()}

Structs = Mapping[str, Mapping[str, int]]

_SOURCE = r"""
#define _GNU_SOURCE
#include <linux/types.h>
#define NULL ((void *)0)
long pread(int fd, void *to, unsigned long bytes, long at);
int memory;
u64 offsets[@COUNT@];
@DEFINES@

static inline int bpf_probe_read_user(void *to, u32 bytes, const void *from)
{
    if (pread(memory, to, bytes, (long)from) == (long)bytes)
        return 0;
    __builtin_memset(to, 0, bytes);
    return -1;
}

#include "record.h"
#include "layout.h"
#include "layout_upstream.h"

static struct layout_look look;
static u8 request[4096] __attribute__((aligned(16))), connection[1024] __attribute__((aligned(16)));

u64 contradicted(u64 r, u64 core_module, u64 cached_time, u64 current_msec)
{
    __builtin_memset(&look, 0, sizeof(look));
    look.r = r;
    look.cached_time = word_at(cached_time);
    look.current_msec = word_at(current_msec);
    look.core_module_index = word_at(core_module + OFFSET_ngx_module_s__ctx_index);
    bpf_probe_read_user(request, SIZEOF_ngx_http_request_s, (void *)r);
    look.c = OF_R(u64, connection);
    expect(&look, OF_R(u32, signature) == 0x50545448 && OF_R(u64, main) == r, FACT_REQUEST);
    expect(&look, bpf_probe_read_user(connection, SIZEOF_ngx_connection_s, (void *)look.c) == 0, FACT_CONNECTION);
    if (look.contradicted)
        return look.contradicted;
    look_at_connection(&look, connection);
    look_at_headers(&look, request);
    look_at_request_line(&look, request);
    look_at_configuration(&look, request);
    if (OF_R(u64, upstream))
        look_at_upstream(&look, request, connection);
    if (OF_R(u64, stream))
        look_at_stream(&look, request);
    return look.contradicted;
}
"""


class Worker:
    """A worker of a live nginx. Checks the facts of its requests by any layout."""

    def __init__(self, pid: int) -> None:
        executable = Path(f"/proc/{pid}/exe")
        binary = Binary(executable)
        self.structs: Structs = layout_for(binary).structs
        self._pid = pid
        with executable.open("rb") as file:
            lowest_address = next(ELFFile(file).iter_segments("PT_LOAD"))["p_vaddr"]
        load_address = self._mappings(binary.name)[0][0] - lowest_address
        self._addresses = [load_address + binary.address(name) for name in OBJECTS]
        names = [
            (struct, member)
            for struct, members in self.structs.items()
            for member in members
            if not is_bit_field(member)
        ]
        self._index = {name: number for number, name in enumerate(names)}
        defines = "\n".join(
            f"#define {f'SIZEOF_{struct}' if member == 'sizeof' else f'OFFSET_{struct}__{member}'} offsets[{number}]"
            for (struct, member), number in self._index.items()
        )
        source = _SOURCE.replace("@COUNT@", str(len(names))).replace("@DEFINES@", defines)
        self._library = compile_library(source, [PROBES / "stub_headers" / "include", PROBES])
        self._library.contradicted.restype = ctypes.c_uint64
        self._offsets = (ctypes.c_uint64 * len(names)).in_dll(self._library, "offsets")
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        ctypes.c_int.in_dll(self._library, "memory").value = self._memory

    def close(self) -> None:
        os.close(self._memory)

    def _mappings(self, name: str) -> list[tuple[int, int]]:
        text = Path(f"/proc/{self._pid}/maps").read_text()
        found = re.findall(r"^(\w+)-(\w+) \S+ \S+ \S+ \d+ +(.*)$", text, re.MULTILINE)
        return [(int(begin, 16), int(end, 16)) for begin, end, path in found if path == name]

    def main_requests(self) -> list[int]:
        """Return the addresses of all main requests in flight. An ended request has no pool (ngx_http_free_request)."""
        main, pool = self.structs["ngx_http_request_s"]["main"], self.structs["ngx_http_request_s"]["header_in"] - 8
        found = []
        for begin, end in self._mappings("[heap]"):
            heap = os.pread(self._memory, end - begin, begin)
            at = heap.find(b"HTTP\0\0\0\0")
            while at >= 0:
                is_main = heap[at + main : at + main + 8] == (begin + at).to_bytes(8, "little")
                if is_main and heap[at + pool : at + pool + 8] != bytes(8):
                    found.append(begin + at)
                at = heap.find(b"HTTP\0\0\0\0", at + 8)
        return found

    def contradicted(self, request: int, structs: Structs | None = None) -> set[str]:
        """Return the facts that a request contradicts, by a layout; without `structs`, by the worker's own layout."""
        for (struct, member), number in self._index.items():
            self._offsets[number] = (structs or self.structs)[struct][member]
        bits = self._library.contradicted(*map(ctypes.c_uint64, (request, *self._addresses)))
        return {name for value, name in FACTS.items() if bits >> value & 1}

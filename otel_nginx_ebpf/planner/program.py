"""Writes the text of the kernel program for one nginx binary: its constants, then the C files of `probes/`."""

import os
from collections.abc import Mapping
from importlib.resources import files

from otel_nginx_ebpf.machine import this_machine
from otel_nginx_ebpf.nginx.dwarf import is_bit_field

_HEADERS = (
    "helpers.h",
    "record.h",
    "metrics.h",
    "trace_context.h",
    "telling.h",
    "layout.h",
    "layout_upstream.h",
    "text.h",
)
_OF_THE_SOCKET = ("telling.h", "tellings.c", "upstream_connections.c", "socket_propagation.c")
"""Only with --propagate on the socket."""
_BCC_PAGE_BYTES = 4096
"""PAGE_SIZE of `probes/stub_headers`, on every machine."""
_SOURCES = (
    "maps.c",
    "histograms.c",
    "tellings.c",
    "processes.c",
    "layout.c",
    "names.c",
    "beginnings.c",
    "answers.c",
    "sent_request.c",
    "attempts.c",
    "upstream_connections.c",
    "error_log.c",
    "turns.c",
    "sockets.c",
    "rules.c",
    "trace_headers.c",
    "propagation.c",
    "socket_propagation.c",
    "adoption.c",
    "endings.c",
    "metrics.c",
    "progress.c",
    "handshakes.c",
    "http2.c",
    "strings.c",
    "taken_attempts.c",
    "captured_headers.c",
    "requests.c",
)

_HEADERS_READ = (
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-request-id",
    "forwarded",
    "x-forwarded-proto",
    "x-forwarded-host",
    "content-type",
    "content-length",
    "last-modified",
)


def ngx_hash(name: str) -> int:
    """Computes ngx_hash_key (ngx_hash.c), which nginx stores with each header's name."""
    key = 0
    for byte in name.encode():
        key = (key * 31 + byte) % 2**64
    return key


def program_text(
    layout: Mapping[str, Mapping[str, int]],
    constants: Mapping[str, int],
    *,
    rules_text: str,
    follow_all: bool,
    follow_forks: bool,
    pid_namespace: tuple[int, int] | None,
    active_requests_max: int,
    ring_buffer_bytes: int,
) -> str:
    """Returns the program as C text for BCC.

    Args:
        layout: Member offsets by struct and member (`nginx.dwarf.Structs`); `sizeof` is the struct's size.
        constants: More constants by name: addresses in the binary (`SITE_…`, `ADDRESS_…`) and settings.
        rules_text: The function that matches rules.
        follow_all: Trace every process that hits a probe. Otherwise trace the loader's pids and their children.
        follow_forks: nginx shares this process's pid namespace, so the result of fork is the child's pid here too.
        pid_namespace: Device and inode of this process's pid namespace; None if it is the host's own.
        active_requests_max: How many requests may be in flight at once.
        ring_buffer_bytes: The ring buffer's size, a power of two and at least a page.
    """
    defined = dict(constants)
    for struct, members in layout.items():
        for member, offset in members.items():
            if is_bit_field(member):
                name = f"BIT_{struct}__{member.partition(':')[0]}"
            else:
                name = f"SIZEOF_{struct}" if member == "sizeof" else f"OFFSET_{struct}__{member}"
            defined[name] = offset
    defined |= {
        "FOLLOW_ALL": int(follow_all),
        "FOLLOW_FORKS": int(follow_forks),
        "ACTIVE_REQUESTS_MAX": active_requests_max,
        "RING_BUFFER_PAGES": ring_buffer_bytes // _BCC_PAGE_BYTES,
    }
    if pid_namespace is not None:
        device, defined["PID_NAMESPACE_INODE"] = pid_namespace
        defined["PID_NAMESPACE_DEVICE"] = os.major(device) << 20 | os.minor(device)  # the kernel's own dev_t
    for header in _HEADERS_READ:
        name, padded = header.replace("-", "_"), header.encode()[:16].ljust(16, b"\0")
        defined |= {
            f"HASH_{name}": ngx_hash(header),
            f"LENGTH_{name}": len(header),
            f"NAME_LOW_{name}": int.from_bytes(padded[:8], "little"),
            f"NAME_HIGH_{name}": int.from_bytes(padded[8:], "little"),
        }
    probes = files("otel_nginx_ebpf.probes")
    return "\n".join(
        [
            "#include <linux/types.h>",
            # Hexadecimal, because C then takes a number that needs all 64 bits as unsigned.
            *(f"#define {name} {value:#x}" for name, value in defined.items()),
            *(
                (rules_text if name == "rules.c" and defined["RULES"] else "")
                + (probes / name).read_text(encoding="utf-8")
                for name in (this_machine().header, *_HEADERS, *_SOURCES)
                if defined.get("PROPAGATE_SOCKET") or name not in _OF_THE_SOCKET
            ),
        ]
    )

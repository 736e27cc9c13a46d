"""Makes forks from nginx's source, as far as a tracer can see them: their names, and how their structs differ.

No package registry has the sources of Tengine, Angie, freenginx or OpenResty. So this module edits nginx's own source.
It sets the fork's names and version. It adds room in the structs for the fork's own members, removes members that the
fork lacks, and moves members that the fork has elsewhere. With nginx 1.26 as the source, the members that this program
reads then lie where Tengine 3.2.0, Angie 1.12.1, freenginx 1.27.2 and OpenResty 1.31.3.1 have them on x86-64.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class More:
    """Room for members that only the fork has: before the member `before`, or at the end of the struct."""

    struct: str
    octets: int
    before: str = ""


@dataclass(frozen=True)
class Moved:
    """A member that the fork has before the member `before`, or at the end of the struct."""

    struct: str
    member: str
    before: str = ""


@dataclass(frozen=True)
class Absent:
    """A member that the fork does not have."""

    struct: str
    member: str


@dataclass(frozen=True)
class Fork:
    """The changes that turn nginx's source into a fork."""

    name: str
    """The name at the beginning of the fork's version."""
    names: tuple[tuple[str, str, str], ...]
    """File, a text in it, and its replacement. `{nginx}` stands for the source's version."""
    members: tuple[More | Moved | Absent, ...]
    without: tuple[str, ...] = ()
    """Options of `configure` that the fork does not have."""
    executable: str = "nginx"

    def apply(self, source: Path) -> None:
        """Edit nginx's source. Raise ValueError if it differs too much from the source that the fork began with."""
        text = (source / "src/core/nginx.h").read_text()
        (nginx,) = re.findall(r'#define NGINX_VERSION +"(.*)"', text)
        for file, old, new in self.names:
            _edit(source / file, old, new.replace("{nginx}", nginx))
        for member in self.members:
            _edit_struct(source, member)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{path} has no `{old}`")
    path.write_text(text.replace(old, new))


def _edit_struct(source: Path, change: More | Moved | Absent) -> None:
    """Edit the declaration of a struct. Find it by its tag or its typedef."""
    name = re.escape(change.struct)
    declaration = re.compile(
        rf"^struct {name} {{\n(.*?)^}};|^typedef struct {{\n((?:(?!^}}).)*?)^}} {name};", re.M | re.S
    )
    for path in sorted(source.glob("src/**/*.h")):
        text = path.read_text()
        if found := declaration.search(text):
            group = 1 if found[1] is not None else 2
            start, end = found.span(group)
            path.write_text(text[:start] + _edited(found[group], change) + text[end:])
            return
    raise ValueError(f"nginx declares no {change.struct}")


def _edited(members: str, change: More | Moved | Absent) -> str:
    def line(member: str) -> re.Match[str] | None:
        return re.search(rf"^ +\w[^;\n]*?\b{member};\n", members, re.M)

    added = ""
    if isinstance(change, More):
        added = f"    u_char  {change.before or 'end'}_of_fork[{change.octets}];\n"
    elif found := line(change.member):
        members = members[: found.start()] + members[found.end() :]
        added = found[0] if isinstance(change, Moved) else ""
    if isinstance(change, Absent):
        return members
    if not change.before:
        return members + added
    if (following := line(change.before)) is None:
        raise ValueError(f"{change.struct} has no {change.before}")
    return members[: following.start()] + added + members[following.start() :]


_NGINX_H, _NGINX_C = "src/core/nginx.h", "src/core/nginx.c"
_VERSION = '"nginx/" NGINX_VERSION'
_TOLD = '"nginx version: " NGINX_VER_BUILD NGX_LINEFEED'
_SERVER = ("src/http/ngx_http_header_filter_module.c", '"Server: " NGINX_VER CRLF')

TENGINE = Fork(
    "Tengine",
    names=(
        (_NGINX_C, _TOLD, f'"Tengine version: Tengine/3.2.0" NGX_LINEFEED {_TOLD}'),
        (*_SERVER, '"Server: Tengine/3.2.0" CRLF'),
    ),
    members=(
        Absent("ngx_connection_s", "quic"),
        More("ngx_peer_connection_s", 8, before="log"),
        More("ngx_peer_connection_s", 8),
        More("ngx_http_headers_in_t", 8, before="host"),
        More("ngx_http_headers_in_t", 8, before="x_forwarded_for"),
        More("ngx_http_headers_out_t", 8, before="content_length_n"),
        More("ngx_http_request_s", 64, before="method"),
        More("ngx_http_request_s", 16, before="uri"),
        Absent("ngx_http_request_s", "v3_parse"),
        More("ngx_http_request_s", 24),
        More("ngx_http_upstream_s", 8, before="start_time"),
        More("ngx_http_upstream_s", 16),
        More("ngx_http_upstream_state_t", 40, before="response_length"),
        More("ngx_http_upstream_srv_conf_s", 40, before="host"),
    ),
    without=("--with-http_v3_module",),
)

ANGIE = Fork(
    "Angie",
    names=(
        (
            _NGINX_C,
            f"    ngx_write_stderr({_TOLD});",
            '    ngx_write_stderr("Angie version: Angie/1.12.1" NGX_LINEFEED);\n'
            f"    if (ngx_show_configure) ngx_write_stderr({_TOLD});",
        ),
        (*_SERVER, '"Server: Angie/1.12.1" CRLF'),
        ("src/core/ngx_module.h", "    ngx_value(NGX_PTR_SIZE)", '    "Angie," ngx_value(NGX_PTR_SIZE)'),
        ("src/os/unix/ngx_setproctitle.c", '"nginx: "', '"angie: "'),
        ("src/os/unix/ngx_process_cycle.c", '"master process"', '"master process v1.12.1 #1"'),
        ("src/os/unix/ngx_process_cycle.c", '"worker process', '"worker process #1'),
        # Angie does not call getsockopt for a kept-alive connection.
        ("src/http/ngx_http_upstream.c", "!u->request_sent &&", "!u->request_sent && !u->peer.cached &&"),
    ),
    members=(
        Moved("ngx_log_s", "disk_full_time"),
        More("ngx_log_s", 96),
        More("ngx_peer_connection_s", 16, before="tries"),
        More("ngx_peer_connection_s", 24, before="data"),
        More("ngx_peer_connection_s", 8, before="local"),
        More("ngx_http_headers_in_t", 8, before="host"),
        More("ngx_http_headers_in_t", 8, before="x_forwarded_for"),
        Moved("ngx_http_headers_out_t", "content_offset", before="content_length_n"),
        More("ngx_http_request_s", 8, before="request_length"),
        More("ngx_http_request_s", 8),
        More("ngx_http_upstream_s", 8, before="start_time"),
        More("ngx_http_upstream_s", 16),
        More("ngx_http_upstream_state_t", 8, before="status"),
        More("ngx_http_upstream_state_t", 8, before="peer"),
    ),
    executable="angie",
)

FREENGINX = Fork(
    "freenginx",
    names=(
        (_NGINX_H, _VERSION, '"freenginx/1.27.2"'),
        (_NGINX_C, _TOLD, _TOLD.replace("nginx", "freenginx", 1)),
    ),
    members=(
        Moved("ngx_log_s", "disk_full_time"),
        More("ngx_http_headers_in_t", 8, before="host"),
    ),
)

OPENRESTY = Fork(
    "openresty",
    names=((_NGINX_H, _VERSION, '"openresty/{nginx}.1"'),),
    members=(
        More("ngx_peer_connection_s", 8, before="log"),
        More("ngx_peer_connection_s", 8),
        More("ngx_http_headers_in_t", 8, before="host"),
        More("ngx_http_headers_in_t", 8, before="x_forwarded_for"),
        More("ngx_http_headers_out_t", 8, before="content_length_n"),
        More("ngx_http_request_s", 8),
        More("ngx_http_upstream_s", 24, before="headers_in"),
        More("ngx_http_upstream_s", 8, before="start_time"),
        More("ngx_http_upstream_s", 16),
    ),
)

"""How options and the machine change the layout of a --with-compat build: our rule against gcc on nginx's headers."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from matrix.builds import BuildError, apt_flags, run_apt, unpack_release
from unit.c_compiler import CROSS_WITH_LIBRARIES, compile_object
from unit.nginx_structs import configure, measure

from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.layouts import CACHE
from otel_nginx_ebpf.nginx.signature import Signature

OPTIONS = {"PCRE": "NGX_PCRE", "the HTTP cache": "NGX_HTTP_CACHE"}

# Mirrors drop Debian 11 one day, so CI does without it.
SUITES = (*(() if os.environ.get("CI") else ("bullseye",)), "bookworm", "trixie", "sid")


@pytest.fixture(scope="module", params=SUITES)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of a Debian release's nginx, configured."""
    directory = tmp_path_factory.mktemp(request.param)
    try:
        return old_sources(directory) if request.param == "bullseye" else packaged_sources(directory, request.param)
    except BuildError as error:
        pytest.skip(f"{error}; with a Debian mirror this test configures nginx")


def packaged_sources(directory: Path, suite: str) -> Path:
    unpack(directory, suite, "nginx-dev")
    tree = directory / "usr/share/nginx/src"
    configure(tree)
    return tree


def old_sources(directory: Path) -> Path:
    """nginx as Debian 11 has it, which has no package of its headers, and needs the first PCRE."""
    unpack(directory, "bullseye", "libpcre3-dev")
    tree = unpack_release("bullseye", "nginx", directory)
    (library,) = directory.glob("usr/lib/*/libpcre.a")
    configure(tree, f"--with-cc-opt=-I{directory}/usr/include", f"--with-ld-opt=-L{library.parent}")
    (tree / "objs/pcre.h").symlink_to(directory / "usr/include/pcre.h")
    return tree


def unpack(directory: Path, suite: str, package: str) -> None:
    run_apt([*apt_flags(suite), "download", package], directory)
    (file,) = directory.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", file, directory], check=True)


def release_of(sources: Path) -> str:
    version = re.search(r'NGINX_VERSION +"(.*)"', (sources / "src/core/nginx.h").read_text())
    assert version
    return version[1]


def test_the_catalogue_is_right_on_arm64(sources: Path) -> None:
    """gcc for arm64 reads what `configure` found on this machine. The sizes in that are checked; not its functions."""
    text = (sources / "objs/ngx_auto_config.h").read_text()
    sizes = dict(re.findall(r"^#define NGX_(PTR|SIG_ATOMIC_T|TIME_T)_SIZE +(\d+)$", text, re.MULTILINE))
    assert len(sizes) == 3
    types = {"PTR": "void *", **{name: name.lower() for name in sizes if name != "PTR"}}
    checks = "".join(f'_Static_assert(sizeof({types[name]}) == {size}, "");\n' for name, size in sizes.items())
    compile_object("#include <signal.h>\n#include <sys/types.h>\n" + checks, compiler=CROSS_WITH_LIBRARIES)

    release = release_of(sources)
    shipped = catalogue.shipped()
    # A release that is newer than the catalogue is compared with this machine's compiler alone.
    layout = {
        struct: members
        for struct, members in (shipped.layouts.get(release) or shipped.members()).items()
        if struct != CACHE
    }
    measured, digits = measure(sources, layout, CROSS_WITH_LIBRARIES)
    assert (measured, digits) == measure(sources, layout)
    for struct in layout.keys() & shipped.layouts.get(release, {}).keys():
        members = shipped.layouts[release][struct]
        assert {member: measured[struct][member] for member in members} == members, (release, struct)


def test_a_variant_is_laid_out_as_the_compiler_does(sources: Path) -> None:
    shipped = catalogue.shipped()
    configured = sources / "objs/ngx_auto_config.h"
    text = configured.read_text()
    whole, digits = measure(sources, shipped.members())
    assert Signature(digits).lacks == ()
    # A release that is newer than the catalogue shows the rule just as well.
    layout = shipped.layouts.get(release_of(sources)) or {
        struct: {member: whole[struct][member] for member in members if member in whole[struct]}
        for struct, members in shipped.members().items()
    }
    for lacks in ((), ("PCRE",), ("the HTTP cache",), ("PCRE", "the HTTP cache")):
        absent = [f"#define {OPTIONS[option]} " for option in lacks]
        lines = [line for line in text.splitlines() if not line.replace("  ", " ").startswith(tuple(absent))]
        assert len(lines) == len(text.splitlines()) - len(lacks)
        configured.write_text("\n".join(lines) + "\n")
        there = {struct for struct in layout if struct != "ngx_http_cache_s" or "the HTTP cache" not in lacks}
        measured, digits = measure(sources, there)
        signature = Signature(digits)
        assert signature.lacks == lacks
        assert signature.tells_layout
        for struct, members in signature.layout(layout).items():
            if struct in there:
                assert {member: measured[struct][member] for member in members} == members, (struct, lacks)


def test_members_beside_those_of_a_layout(sources: Path) -> None:
    """The kernel program reads members of ngx_http_headers_out_t at a distance from members that a layout has."""
    (measured, _) = measure(sources, ["ngx_http_headers_out_t", "ngx_table_elt_t"])
    headers_out = measured["ngx_http_headers_out_t"]
    text = (Path(__file__).parents[2] / "probes" / "captured_headers.c").read_text()
    told = re.findall(r"^#define OUT_(\w+) \(OFFSET_ngx_http_headers_out_t__(\w+) ([+-]) (\d+)\)$", text, re.MULTILINE)
    found: dict[str, list[int]] = {}
    for name, member, sign, distance in told:
        found.setdefault(name.lower(), []).append(headers_out[member] + int(sign + distance))
    has_next = "next" in measured["ngx_table_elt_t"]
    assert {name: offsets[0 if has_next else -1] for name, offsets in found.items()} == {
        name: headers_out[name]
        for name in ("content_length", "location", "last_modified", "content_type", "last_modified_time")
    }

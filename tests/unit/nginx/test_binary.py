"""What the program reads from an nginx binary: from Debian's binary, and from damaged copies of it."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx.binary import Binary, NoSiteError
from otel_nginx_ebpf.nginx.debug_files import debug_files
from otel_nginx_ebpf.nginx.layouts import CACHE, layout_for
from otel_nginx_ebpf.planner.sites import BOUNDARIES, Boundary
from unit.c_compiler import CROSS_WITH_LIBRARIES
from unit.nginx_structs import configure, measure

NGINX = Path("/usr/sbin/nginx")
# Debian's nginx-dev: the sources that the package was built from, configured as it was.
NGINX_SOURCES = Path("/usr/share/nginx/src")


@pytest.fixture(scope="module")
def binary() -> Binary:
    return Binary(NGINX)


def test_version_and_build_are_those_nginx_prints(binary: Binary) -> None:
    printed = subprocess.run([NGINX, "-V"], capture_output=True, text=True, check=True).stderr
    assert f"nginx version: nginx/{binary.version}\n" in printed
    assert f"configure arguments: {binary.configure_arguments}" in printed
    assert binary.with_compat == ("--with-compat" in printed)
    notes = subprocess.run(["readelf", "-n", NGINX], capture_output=True, text=True, check=True).stdout
    assert f"Build ID: {binary.build_id}" in notes


def test_another_owners_note_of_the_same_number_is_no_build_id(tmp_path: Path) -> None:
    """NT_GNU_BUILD_ID is 3, as is NT_STAPSDT: SystemTap's probes in what is linked statically."""
    build_id, stap = (pack("<III", 4, 20, 3) + owner for owner in (b"GNU\0", b"stp\0"))
    content = NGINX.read_bytes()
    assert content.count(build_id) == 1
    copy = tmp_path / "nginx"
    copy.write_bytes(content.replace(build_id, stap))
    binary = Binary(copy)
    assert binary.build_id == ""
    assert [file.source for file in debug_files(binary)] == ["DWARF"]


@pytest.mark.parametrize(
    ("boundary", "function"), [(boundary, function) for boundary in BOUNDARIES for function in boundary.functions]
)
def test_a_site_is_an_emulated_instruction_before_any_call(binary: Binary, boundary: Boundary, function: str) -> None:
    site = binary.site(function, boundary.arguments)
    assert site.address == binary.address(site.function) + site.displacement
    listing = subprocess.run(
        [
            "objdump",
            "-d",
            f"--start-address={site.address - site.displacement}",
            f"--stop-address={site.address + 8}",
            NGINX,
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    before, at = [], None
    for address, text in re.findall(r"^ +([0-9a-f]+):\t[0-9a-f ]+\t(.+)$", listing, re.MULTILINE):
        if int(address, 16) == site.address:
            at = text
            break
        before.append(text)
    assert at is not None
    assert at.startswith(("push ", "j", "call ", "nop"))
    assert not any(text.startswith(("call", "j", "ret")) for text in before)


def test_a_function_that_is_not_exported_has_no_site(binary: Binary) -> None:
    with pytest.raises(NoSiteError, match="ngx_no_such_function is not exported"):
        binary.site("ngx_no_such_function", 1)


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = tmp_path_factory.mktemp("nginx") / "src"
    shutil.copytree(NGINX_SOURCES, sources)
    configure(sources)
    return sources


@pytest.mark.parametrize("compiler", [("gcc",), CROSS_WITH_LIBRARIES], ids=["here", "arm64"])
def test_the_layout_is_what_the_compiler_makes_of_nginx_sources(
    binary: Binary, configured: Path, compiler: tuple[str, ...]
) -> None:
    layout = layout_for(binary).structs
    if compiler != ("gcc",):
        layout = {struct: members for struct, members in layout.items() if struct != CACHE}
    measured, _ = measure(configured, layout, compiler)
    for struct, members in layout.items():
        assert {member: measured[struct][member] for member in members} == members, struct


_DAMAGED_BYTES = 4096


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, _DAMAGED_BYTES - 1), damage=st.binary(min_size=1, max_size=64), whole=st.booleans())
def test_a_damaged_binary_is_refused_or_read(tmp_path: Path, at: int, damage: bytes, whole: bool) -> None:
    raw = NGINX.read_bytes()
    raw = raw[:at] + damage + (raw[at + len(damage) :] if whole else b"")
    path = tmp_path / "nginx"
    path.write_bytes(raw)
    with suppress(UserError, NoSiteError):
        assert Binary(path).site(BOUNDARIES[0].functions[0], 1).displacement >= 0


# Offsets in Elf64_Ehdr, and in Elf64_Shdr.
E_PHOFF, E_SHOFF, E_PHENTSIZE, E_PHNUM, E_SHENTSIZE, E_SHNUM = 0x20, 0x28, 0x36, 0x38, 0x3A, 0x3C
SH_SIZE, SH_INFO = 0x20, 0x2C


def number(raw: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(raw[at : at + size], "little")


def put(raw: bytearray, at: int, value: int, size: int = 8) -> None:
    raw[at : at + size] = value.to_bytes(size, "little")


def endless_sections(raw: bytearray) -> None:
    """2^60 sections, which all lie at one place."""
    put(raw, E_SHENTSIZE, 0, 2)
    put(raw, E_SHNUM, 0, 2)
    put(raw, number(raw, E_SHOFF) + SH_SIZE, 1 << 60)


def endless_segments(raw: bytearray) -> None:
    """2^32 segments (PN_XNUM), which all lie at one place."""
    put(raw, E_PHOFF, 0)
    put(raw, E_PHENTSIZE, 0, 2)
    put(raw, E_PHNUM, 0xFFFF, 2)
    put(raw, number(raw, E_SHOFF) + SH_INFO, 0xFFFFFFFF, 4)


def overlapping_segments(raw: bytearray) -> None:
    """60,000 segments, each with all of the file."""
    everything = bytearray(pack("<IIQQQQQQ", 1, 5, 0, 0, 0, len(raw), len(raw), 0))
    put(raw, E_PHOFF, len(raw))
    put(raw, E_PHNUM, 60_000, 2)
    raw += everything * 60_000


def overlapping_symbols(raw: bytearray) -> None:
    """60,000 symbol tables at one place."""
    sections = [number(raw, E_SHOFF) + 64 * index for index in range(number(raw, E_SHNUM, 2))]
    table = next(raw[at : at + 64] for at in sections if number(raw, at + 4, 4) == 11)
    first = raw[sections[0] : sections[-1] + 64]
    put(raw, E_SHOFF, len(raw))
    put(raw, E_SHNUM, 60_000, 2)
    raw += first + table * (60_000 - len(sections))


@pytest.mark.parametrize("damage", [endless_sections, endless_segments, overlapping_segments, overlapping_symbols])
def test_tables_that_would_take_all_time_or_memory_are_refused(
    tmp_path: Path, damage: Callable[[bytearray], None]
) -> None:
    raw = bytearray(NGINX.read_bytes())
    damage(raw)
    path = tmp_path / "nginx"
    path.write_bytes(raw)
    before_s = time.thread_time()
    with pytest.raises(UserError, match=r"damaged|overlap|Too small e_shentsize"):
        Binary(path)
    assert time.thread_time() - before_s < 20


def renamed(path: Path, *changes: tuple[bytes, bytes]) -> Path:
    """Debian's nginx with other texts in the same places."""
    raw = NGINX.read_bytes()
    for old, new in changes:
        assert old in raw
        raw = raw.replace(old, new.ljust(len(old), b"\0"))
    path.write_bytes(raw)
    return path


RELEASE = subprocess.run([NGINX, "-v"], capture_output=True, text=True).stderr.strip().partition("nginx/")[2]
SAYS = tuple(f"{before}nginx/{RELEASE}".encode() for before in ("nginx version: ", "\0", "Server: "))


@pytest.mark.parametrize(
    ("texts", "product", "version", "release"),
    [
        (SAYS, "nginx", RELEASE, RELEASE),
        (
            (b"Angie version: Angie/1.12.1", b"\0Angie/1.12.1", b"Server: Angie/1.12.1"),
            "Angie",
            "1.12.1",
            "angie-1.12.1",
        ),
        # Angie's -V tells nginx's release as well, Tengine's error log nginx's instead.
        ((SAYS[0], SAYS[1], b"Server: Angie/1.12.1"), "Angie", "1.12.1", "angie-1.12.1"),
        ((SAYS[0], SAYS[1], b"Server: Tengine/3.2"), "Tengine", "3.2", "tengine-3.2"),
        ((SAYS[0], b"\0Tengine/3.2", SAYS[2]), "Tengine", "3.2", "tengine-3.2"),
        ((b"nginx version: mine/8.8", *SAYS[1:]), "mine", "8.8", "mine-8.8"),
        ((b"nginx version: openresty/1.", *SAYS[1:]), "nginx", RELEASE, RELEASE),
    ],
)
def test_a_fork_is_known_by_the_name_that_it_gives_itself(
    tmp_path: Path, texts: tuple[bytes, ...], product: str, version: str, release: str
) -> None:
    binary = Binary(renamed(tmp_path / "nginx", *zip(SAYS, texts, strict=True)))
    assert (binary.product, binary.version, binary.release) == (product, version, release)
    assert (binary.is_fork, str(binary)) == (product != "nginx", f"{product} {version}")
    if binary.is_fork:
        with pytest.raises(UserError, match=f"{product} {version} .*may differ from nginx's, .*layouts add BINARY"):
            layout_for(binary)


def test_what_does_not_say_its_release_is_not_taken_for_another_program(tmp_path: Path) -> None:
    silent = renamed(tmp_path / "nginx", *((text, b"\0") for text in SAYS))
    with pytest.raises(UserError, match="built from nginx's sources but does not say which release"):
        Binary(silent)


def test_angie_s_signature_begins_with_its_name(tmp_path: Path) -> None:
    raw = NGINX.read_bytes()
    signature = re.search(rb"8,4,8,[01]{34}\0", raw)
    assert signature
    assert (
        Binary(renamed(tmp_path / "nginx", (b"\0" + signature[0], b"\0Angie," + signature[0][:-7]))).signature.lacks
        == ()
    )


def test_what_is_no_nginx_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/sleep is not an nginx"):
        Binary(Path("/usr/bin/sleep"))
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        Binary(tmp_path / "absent")
    text = tmp_path / "script"
    text.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="is not an executable"):
        Binary(text)

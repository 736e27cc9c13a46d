"""Struct layouts: the catalogue, and from where the program takes the layout of a real build."""

import logging
import os
import pwd
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st
from matrix.builds import NO_COMPAT, BuildError, CompiledBuild, obtain

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.catalogue import Catalogue
from otel_nginx_ebpf.nginx.layouts import Layout, add_release, layout_for

PROGRAM = Path(sys.executable).with_name("otel-nginx-ebpf")
DEBIANS = Path("/usr/sbin/nginx")

WITH_DEBUG_INFO = CompiledBuild("debug", "-g -O1")


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DEBUGINFOD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DEBUGINFOD_CACHE_PATH", str(tmp_path / "debuginfod"))
    monkeypatch.setenv(catalogue.PATH_VARIABLE, str(tmp_path / "own.json"))


def built(build: CompiledBuild) -> Path:
    try:
        return obtain(build) / "nginx"
    except BuildError as error:
        pytest.skip(f"{error}; with a Debian mirror this test compiles nginx once")


@pytest.fixture(scope="module")
def whole() -> Path:
    """A --with-compat build with its debug information in it."""
    return built(WITH_DEBUG_INFO)


@pytest.fixture(scope="module")
def without_compat() -> Path:
    return built(NO_COMPAT)


class Split:
    """A binary and its separate debug file, made as distributions make them."""

    def __init__(self, whole: Path, directory: Path, name: str = "nginx") -> None:
        directory.mkdir(exist_ok=True)
        self.binary = directory / name
        self.debug = directory / f"{name}.debug"
        subprocess.run(["objcopy", "--only-keep-debug", whole, self.debug], check=True)
        subprocess.run(
            ["objcopy", "--strip-debug", f"--add-gnu-debuglink={self.debug}", whole, self.binary], check=True
        )
        self.build_id = Binary(self.binary).build_id


@pytest.fixture
def split(whole: Path, tmp_path: Path) -> Split:
    """Both files lie side by side, so that the test must take the debug file away where it is not to be found."""
    return Split(whole, tmp_path / "split")


@pytest.fixture(scope="module")
def measured(whole: Path) -> Layout:
    return layout_for(Binary(whole), Catalogue())


# --- the catalogue


def test_the_shipped_catalogue_has_every_release_once_in_canonical_form() -> None:
    text = (Path(catalogue.__file__).with_name("layouts.json")).read_text(encoding="utf-8")
    shipped = catalogue.parse(text)
    assert shipped.text() == text
    releases = list(shipped.layouts)
    assert len(releases) == 99
    assert (releases[0], releases[-1]) == ("1.14.0", "1.31.4")
    members = shipped.members()
    for release, layout in shipped.layouts.items():
        lacking = {
            (struct, member) for struct in members for member in members[struct] if member not in layout.get(struct, {})
        }
        allowed = {
            (struct, member) for struct, member in lacking if struct.startswith(("ngx_http_v2_", "ngx_http_cache_s"))
        }
        assert lacking - allowed <= {
            ("ngx_connection_s", "proxy_protocol"),
            ("ngx_http_request_s", "limit_conn_status:2"),
            ("ngx_http_request_s", "limit_req_status:3"),
            ("ngx_http_upstream_state_t", "bytes_sent"),
            ("ngx_table_elt_t", "next"),
        }, release
        for struct, offsets in layout.items():
            size = offsets.get("sizeof", 1 << 16)
            in_bytes = {member: offset // 8 if ":" in member else offset for member, offset in offsets.items()}
            assert all(0 <= offset < size for member, offset in in_bytes.items() if member != "sizeof"), struct


def test_a_release_stands_for_itself_only() -> None:
    """1.16.1 has what 1.17.0 has not: members of stable branches move by backported changes."""
    layouts = catalogue.parse(
        '{"about": "", "releases": ["1.16.0", "1.16.1", "1.17.0"],'
        ' "structs": {"s": {"fixed": 8, "moved": {"1.16.0": 0, "1.16.1": 16, "1.17.0": null}}}}'
    ).layouts
    assert layouts == {
        "1.16.0": {"s": {"fixed": 8, "moved": 0}},
        "1.16.1": {"s": {"fixed": 8, "moved": 16}},
        "1.17.0": {"s": {"fixed": 8}},
    }


names = st.sampled_from(["a", "b", "sizeof"])
releases = st.builds("{}.{}.{}".format, *[st.integers(0, 12)] * 3)
layouts = st.dictionaries(names, st.dictionaries(names, st.integers(0, 3), min_size=1))


@given(st.builds(Catalogue, st.dictionaries(releases, layouts)))
def test_a_catalogue_reads_as_it_was_written(content: Catalogue) -> None:
    assert catalogue.parse(content.text()) == content
    assert list(catalogue.parse(content.text()).layouts) == list(content.layouts)


@given(*[st.builds(Catalogue, st.dictionaries(releases, layouts, max_size=3))] * 2)
def test_filling_keeps_what_is_there_and_adds_the_rest(first: Catalogue, second: Catalogue) -> None:
    def facts(content: Catalogue) -> dict[tuple[str, str, str], int]:
        return {
            (release, struct, member): offset
            for release, layout in content.layouts.items()
            for struct, offsets in layout.items()
            for member, offset in offsets.items()
        }

    assert facts(first.filled_from(second)) == facts(second) | facts(first)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "Invalid JSON"),
        ("[]", "the file"),
        ('{"about": "", "releases": ["1.22.1"], "structs": {"s": {"m": "8"}}}', r"structs\.s\.m"),
        ('{"about": "", "releases": ["one"], "structs": {}}', r"releases\.0"),
        ('{"about": "", "releases": ["1.22.1", "1.9.1"], "structs": {}}', "not sorted by version"),
        ('{"about": "", "releases": ["1.22.1"], "structs": {"s": {"m": {"1.22.2": 8}}}}', r"s\.m: release 1\.22\.2"),
    ],
)
def test_what_is_no_catalogue_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"own.json holds no layouts: .*{complaint}"):
        layout_for(Binary(DEBIANS))


def test_a_catalogue_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read the layouts in .*own\.json"):
        layout_for(Binary(DEBIANS))


def test_a_user_without_a_home_directory_has_no_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user id that /etc/passwd does not list."""

    def unlisted(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for name in ("HOME", "XDG_DATA_HOME", catalogue.PATH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unlisted)
    assert catalogue.known() == catalogue.shipped()


# --- by release


def test_debian_s_stripped_binary_has_the_layout_of_its_release() -> None:
    binary = Binary(DEBIANS)
    layout = layout_for(binary)
    assert (layout.source, layout.assumed) == (f"catalogue {binary.version}", False)
    assert layout.structs == catalogue.shipped().layouts[binary.version]


def known_without(*taken: str) -> Catalogue:
    return Catalogue({release: held for release, held in catalogue.shipped().layouts.items() if release not in taken})


def branch_of(binary: Binary) -> list[str]:
    """The releases of the binary's branch up to its own, which the shipped catalogue must have to the last."""
    branch = str(binary.version).rpartition(".")[0]
    known = [release for release in catalogue.shipped().layouts if release.rpartition(".")[0] == branch]
    return known[: known.index(str(binary.version)) + 1]


def test_a_newer_release_of_a_known_branch_is_assumed_to_be_like_the_last_known_one() -> None:
    binary = Binary(DEBIANS)
    older = branch_of(binary)[:-1]
    layout = layout_for(binary, known_without(binary.version))
    assert (layout.source, layout.assumed) == (f"catalogue {older[-1]} (assumed)", True)
    assert layout.structs == catalogue.shipped().layouts[older[-1]]


def test_an_unknown_branch_is_refused_with_what_would_help() -> None:
    binary = Binary(DEBIANS)
    said = rf"nginx {re.escape(str(binary.version))} .*nginx-dbgsym.*DEBUGINFOD_URLS.*layouts add BINARY"
    with pytest.raises(UserError, match=said):
        layout_for(binary, known_without(*branch_of(binary)))


def test_a_user_s_catalogue_counts_only_where_the_shipped_one_has_nothing(tmp_path: Path) -> None:
    binary = Binary(DEBIANS)
    own = Catalogue({str(binary.version): {"ngx_log_s": {"data": 8}, "unheard_of": {"member": 1}}})
    (tmp_path / "own.json").write_text(own.text())
    assert layout_for(binary).structs == catalogue.shipped().layouts[binary.version]


# --- by debug information


def test_debug_information_says_what_the_catalogue_says(whole: Path, measured: Layout) -> None:
    assert (measured.source, measured.assumed) == ("DWARF", False)
    assert measured.structs == catalogue.shipped().layouts[Binary(whole).version]


def test_debug_information_is_read_in_time(whole: Path) -> None:
    binary = Binary(whole)
    begin_s = time.process_time()
    layout_for(binary)
    assert time.process_time() - begin_s < 5


def test_debug_information_is_believed_over_the_catalogue(
    whole: Path, measured: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    version = Binary(whole).version
    other = Catalogue({version: {"ngx_log_s": {"data": 48}}})
    assert layout_for(Binary(whole), other) == measured
    assert f"contradicts the known layout of nginx {version}" in caplog.text
    assert "ngx_log_s.data: 48 → 40" in caplog.text


def test_no_word_where_build_and_catalogue_agree(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout_for(Binary(whole))
    assert caplog.text == ""


def test_a_build_without_compat_is_read_from_its_debug_information_or_refused(
    without_compat: Path, tmp_path: Path
) -> None:
    binary = Binary(without_compat)
    assert not binary.with_compat
    layout = layout_for(binary)
    assert layout.source == "DWARF"
    compatible = catalogue.shipped().layouts[binary.version]
    assert layout.structs["ngx_http_request_s"] != compatible["ngx_http_request_s"]
    stripped = tmp_path / "nginx"
    subprocess.run(["strip", "--strip-debug", "-o", stripped, without_compat], check=True)
    with pytest.raises(UserError, match=r"without --with-compat.*nginx-dbgsym.*DEBUGINFOD_URLS"):
        layout_for(Binary(stripped))


@pytest.mark.parametrize("folder", [".", ".debug"])
def test_a_debug_file_is_found_by_its_link(split: Split, measured: Layout, folder: str) -> None:
    place = split.binary.parent / folder / split.debug.name
    place.parent.mkdir(exist_ok=True)
    split.debug.rename(place)
    layout = layout_for(Binary(split.binary))
    assert layout.source == f"debug file {place.resolve()}"
    assert layout.structs == measured.structs


def test_a_debug_file_is_found_by_checksum_where_there_is_no_build_id(whole: Path, tmp_path: Path) -> None:
    anonymous = tmp_path / "anonymous"
    subprocess.run(["objcopy", "--remove-section=.note.gnu.build-id", whole, anonymous], check=True)
    split = Split(anonymous, tmp_path / "split")
    assert split.build_id == ""
    assert layout_for(Binary(split.binary)).source == f"debug file {split.debug}"
    with split.debug.open("ab") as file:
        file.write(b"\0")
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")


def test_a_debug_file_of_another_build_is_left_alone(split: Split, without_compat: Path) -> None:
    subprocess.run(["objcopy", "--only-keep-debug", without_compat, split.debug], check=True)
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")


@pytest.mark.parametrize("kind", ["pipe", "directory", "empty", "text", "half"])
def test_what_is_no_debug_file_is_passed_over(split: Split, kind: str) -> None:
    raw = split.debug.read_bytes()
    split.debug.unlink()
    if kind == "pipe":
        os.mkfifo(split.debug)
    elif kind == "directory":
        split.debug.mkdir()
    else:
        split.debug.write_bytes({"empty": b"", "text": b"no ELF\n" * 99, "half": raw[: len(raw) // 2]}[kind])
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")


def test_damaged_debug_information_is_passed_over(
    split: Split, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    section = tmp_path / "abbreviations"
    section.write_bytes(b"\xff" * 4096)
    subprocess.run(["objcopy", f"--update-section=.debug_abbrev={section}", split.debug], check=True)
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")
    assert f"the layout is not taken from debug file {split.debug}: damaged" in caplog.text


def test_debug_information_that_lacks_a_struct_is_passed_over(split: Split, caplog: pytest.LogCaptureFixture) -> None:
    raw = split.debug.read_bytes()
    assert b"\0ngx_http_request_s\0" in raw
    split.debug.write_bytes(raw.replace(b"\0ngx_http_request_s\0", b"\0xgx_http_request_s\0"))
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")
    assert f"not taken from debug file {split.debug}: no ngx_http_request_s.connection, ngx_" in caplog.text


def test_debug_information_with_an_enormous_struct_is_passed_over(
    split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    raw = bytearray(split.debug.read_bytes())
    with split.debug.open("rb") as file:
        elf = ELFFile(file)
        unit = next(
            unit
            for unit in elf.get_dwarf_info().iter_CUs()
            if b"http/" in unit.get_top_DIE().attributes["DW_AT_name"].value  # the first that is read
        )
        sizes = [
            entry.attributes["DW_AT_byte_size"].offset
            for entry in unit.iter_DIE_children(unit.get_top_DIE())
            if entry.tag == "DW_TAG_structure_type"
            and "DW_AT_byte_size" in entry.attributes
            and "DW_AT_name" in entry.attributes
            and entry.attributes["DW_AT_name"].value == b"ngx_http_request_s"
        ]
        at = elf.get_section_by_name(".debug_info")["sh_offset"] + sizes[0]
    raw[at : at + 2] = b"\xff\xff"
    split.debug.write_bytes(raw)
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")
    assert f"not taken from debug file {split.debug}: too large: ngx_http_request_s" in caplog.text


def test_debug_information_without_nginx_s_structs_is_passed_over(
    split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (split.binary, split.debug):
        subprocess.run(["objcopy", "--remove-section=.note.gnu.build-id", path], check=True)
    subprocess.run(["gcc", "-g", "-x", "c", "-o", split.debug, "-"], input=b"int main(void) { return 0; }", check=True)
    subprocess.run(["objcopy", "--remove-section=.note.gnu.build-id", split.debug], check=True)
    subprocess.run(["objcopy", "--remove-section=.gnu_debuglink", split.binary], check=True)
    subprocess.run(["objcopy", f"--add-gnu-debuglink={split.debug}", split.binary], check=True)
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")
    assert caplog.text == ""


def test_what_dwz_has_shared_between_files_is_found_by_name_and_build_id(
    whole: Path, tmp_path: Path, measured: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    split = Split(whole, tmp_path / "split")
    other = Split(whole, tmp_path / "split", "other")
    shared = tmp_path / "split" / "shared"
    subprocess.run(["dwz", "-m", "shared", "-M", "shared", split.debug, other.debug], cwd=shared.parent, check=True)
    assert layout_for(Binary(split.binary)) == Layout(measured.structs, f"debug file {split.debug}")
    shared.unlink()
    assert layout_for(Binary(split.binary)).source.startswith("catalogue")
    assert "shared part shared is missing" in caplog.text


@contextmanager
def running_in(root: Path, binary: Path) -> Iterator[int]:
    """The pid of a process that runs `binary` with `root` as its root directory: nginx that waits for its
    configuration to come through a pipe."""
    place = root / "usr/sbin/nginx"
    place.parent.mkdir(parents=True)
    shutil.copy(binary, place)
    for line in subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout.splitlines():
        for library in (word for word in line.split() if word.startswith("/")):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    os.mkfifo(root / "configuration")
    as_root = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
    process = subprocess.Popen([*as_root, "chroot", root, "/usr/sbin/nginx", "-c", "/configuration"])
    try:
        deadline_s = time.monotonic() + 20
        while not os.path.samefile(f"/proc/{process.pid}/exe", place):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("by", ["build-id", "link"])
def test_a_debug_file_is_found_in_the_root_directory_of_the_process(
    split: Split, measured: Layout, tmp_path: Path, by: str
) -> None:
    root = tmp_path / "root"
    with running_in(root, split.binary) as pid:
        binary = Binary(Path(f"/proc/{pid}/exe"))
        assert layout_for(binary).source.startswith("catalogue")
        identity = split.build_id
        name = f".build-id/{identity[:2]}/{identity[2:]}.debug" if by == "build-id" else f"usr/sbin/{split.debug.name}"
        place = root / "usr/lib/debug" / name
        place.parent.mkdir(parents=True)
        split.debug.rename(place)
        layout = layout_for(binary)
        assert layout.source == f"debug file /proc/{pid}/root/usr/lib/debug/{name}"
        assert layout.structs == measured.structs


# --- debuginfod


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def debuginfod(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server's URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def sending(content: bytes, length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        with suppress(ConnectionError):  # the client has read enough
            request.wfile.write(content)

    return answer


def failing(code: int, location: str | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        if location is not None:
            request.send_header("Location", location)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@pytest.fixture
def remote(split: Split) -> tuple[Split, bytes]:
    """A binary whose debug file is nowhere on this machine, and that file."""
    content = split.debug.read_bytes()
    split.debug.unlink()
    return split, content


def test_debuginfod_is_asked_once_and_then_its_cache(
    remote: tuple[Split, bytes], measured: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    split, content = remote
    with debuginfod(failing(404)) as (empty, asked_first), debuginfod(sending(content)) as (full, asked):
        monkeypatch.setenv("DEBUGINFOD_URLS", f"ima:enforcing {empty} {full}/")
        assert layout_for(Binary(split.binary)) == Layout(measured.structs, "debuginfod")
        assert asked == asked_first == [f"/buildid/{split.build_id}/debuginfo"]
    assert layout_for(Binary(split.binary)) == Layout(measured.structs, "debuginfod")
    assert [path.name for path in (tmp_path / "debuginfod" / split.build_id).iterdir()] == ["debuginfo"]


def test_no_server_has_it(
    remote: tuple[Split, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with debuginfod(failing(404)) as (url, asked):
        monkeypatch.setenv("DEBUGINFOD_URLS", url)
        assert layout_for(Binary(remote[0].binary)).source.startswith("catalogue")
    assert len(asked) == 1
    assert caplog.text == ""


def drip(request: BaseHTTPRequestHandler) -> None:
    """Sends a byte now and then, until the client has had enough."""
    request.send_response(200)
    request.end_headers()
    with suppress(ConnectionError):
        while True:
            request.wfile.write(b"\x7f")
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (failing(500), "HTTP Error 500"),
        (failing(302, "ftp://127.0.0.1/debuginfo"), "ftp"),
        (failing(302, "file:///etc/passwd"), "file"),
        (sending(b"\x7fELF" * 1000, length=10_000), "ended before the file did"),
        (sending(bytes(300_000)), "more than 200000 bytes"),
        (drip, "takes too long"),
        (sending(b"no ELF file"), "cannot be read"),
        (sending(DEBIANS.read_bytes()[:150_000]), "cannot be read"),
    ],
    ids=["error", "to ftp", "to a file", "cut off", "too large", "too slow", "not ELF", "half of ELF"],
)
def test_a_server_that_gives_no_debug_file_is_warned_of(
    remote: tuple[Split, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Answer,
    complaint: str,
) -> None:
    monkeypatch.setenv("DEBUGINFOD_MAXSIZE", "200000")
    monkeypatch.setenv("DEBUGINFOD_MAXTIME", "1")
    with debuginfod(answer) as (url, asked):
        monkeypatch.setenv("DEBUGINFOD_URLS", url)
        assert layout_for(Binary(remote[0].binary)).source.startswith("catalogue")
    assert asked
    assert complaint in caplog.text
    assert [record.levelno for record in caplog.records if complaint in record.getMessage()] == [logging.WARNING]


def test_a_server_that_is_down_is_warned_of(
    remote: tuple[Split, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with debuginfod(failing(404)) as (url, asked):
        pass
    monkeypatch.setenv("DEBUGINFOD_URLS", url)
    assert layout_for(Binary(remote[0].binary)).source.startswith("catalogue")
    assert asked == []
    assert f"debuginfod server {url}: " in caplog.text


def test_another_build_s_file_from_a_server_is_refused(
    remote: tuple[Split, bytes],
    without_compat: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with debuginfod(sending(without_compat.read_bytes())) as (url, asked):
        monkeypatch.setenv("DEBUGINFOD_URLS", url)
        assert layout_for(Binary(remote[0].binary)).source.startswith("catalogue")
    assert asked
    assert "does not belong to" in caplog.text


# --- adding releases


def test_a_release_is_added_from_a_binary_and_then_known(whole: Path, tmp_path: Path, split: Split) -> None:
    split.debug.unlink()
    version = Binary(whole).version
    known = known_without(version).layouts
    branch = version.rpartition(".")[0]
    last = [release for release in known if release.startswith(f"{branch}.")][-1]
    before = Catalogue({**known, last: {name: held for name, held in known[last].items() if name != "ngx_log_s"}})
    with pytest.MonkeyPatch.context() as context:
        context.delenv(catalogue.PATH_VARIABLE)
        context.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        target = catalogue.own_path()
        assert target == tmp_path / "data" / "otel-nginx-ebpf" / "layouts.json"
        first, second, *changes = add_release(whole, target, before)
        assert first == f"nginx {version} added to {target}, from {whole} (DWARF)"
        assert second == f"differences from the known layout of {last}:"
        assert "  ngx_log_s.data: unknown → 40" in changes
        layout = layout_for(Binary(split.binary), before.filled_from(catalogue.load(target)))
    assert layout == Layout(catalogue.shipped().layouts[version], f"catalogue {version}")


def test_what_contradicts_the_catalogue_is_not_added(whole: Path, tmp_path: Path) -> None:
    other = Catalogue({Binary(whole).version: {"ngx_log_s": {"data": 48}}})
    with pytest.raises(UserError, match=r"is not added: ngx_log_s\.data: 48 → 40"):
        add_release(whole, tmp_path / "own.json", other)
    assert not (tmp_path / "own.json").exists()


def layouts_command(*arguments: str | Path) -> tuple[int, str, str]:
    done = subprocess.run([PROGRAM, "layouts", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_layouts_add_and_list_as_a_user_types_them(whole: Path, without_compat: Path, tmp_path: Path) -> None:
    version = Binary(whole).version
    code, out, err = layouts_command("add", whole)
    assert (code, out, err) == (0, f"nginx {version} is known already, and {whole} agrees (DWARF)\n", "")
    code, out, err = layouts_command("add", DEBIANS)
    assert (code, out) == (2, "")
    assert "nginx-dbgsym" in err
    code, out, err = layouts_command("add", without_compat)
    assert (code, out) == (2, "")
    assert "without --with-compat" in err
    own = tmp_path / "elsewhere.json"
    own.write_text(Catalogue({"1.22.1": {"ngx_log_s": {"data": 40}}, "1.99.0": {"ngx_log_s": {"data": 40}}}).text())
    code, out, err = layouts_command("list", "--catalogue", own)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 100
    assert "1.14.0    shipped" in lines
    assert f"1.22.1    shipped, {own}" in lines
    assert lines[-1] == f"1.99.0    {own}"
    (tmp_path / "file").write_text("")
    code, out, err = layouts_command("list", "--catalogue", tmp_path / "file" / "own.json")
    assert (code, out) == (2, "")
    assert "Not a directory" in err

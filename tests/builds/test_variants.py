"""Layouts of real builds that differ from their release: without PCRE, without the HTTP cache, and a fork."""

import subprocess
from pathlib import Path

import pytest
from matrix.builds import FORKS, NO_CACHE, NO_PCRE, BuildError, CompiledBuild, obtain

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.catalogue import Catalogue
from otel_nginx_ebpf.nginx.dwarf import is_bit_field
from otel_nginx_ebpf.nginx.layouts import add_release, layout_for, list_releases

ANGIE = next(fork for fork in FORKS if fork.name == "angie")


@pytest.fixture(autouse=True)
def _own_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
    monkeypatch.setenv(catalogue.PATH_VARIABLE, str(tmp_path / "own.json"))


def built(build: CompiledBuild) -> Path:
    try:
        return obtain(build) / "nginx"
    except BuildError as error:
        pytest.skip(f"{error}; with a Debian mirror this test compiles nginx once")


def stripped(whole: Path, directory: Path) -> Binary:
    target = directory / "stripped"
    subprocess.run(["strip", "--strip-all", "-o", target, whole.resolve()], check=True)
    return Binary(target)


@pytest.mark.parametrize(
    ("build", "lacks"), [(NO_PCRE, "PCRE"), (NO_CACHE, "the HTTP cache")], ids=lambda each: str(each)[:9]
)
def test_a_stripped_build_is_laid_out_as_its_debug_information_says(
    build: CompiledBuild, lacks: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = built(build)
    measured = layout_for(Binary(whole))
    assert measured.source == "DWARF"
    layout = layout_for(stripped(whole, tmp_path))
    assert layout.source == f"catalogue {Binary(whole).version} without {lacks}"
    assert layout.structs == {
        struct: {member: offset for member, offset in members.items() if not is_bit_field(member)}
        for struct, members in measured.structs.items()
    }
    assert layout.structs != catalogue.shipped().layouts[Binary(whole).version]
    # It is like its release without that, so there is nothing to say.
    assert caplog.text == ""
    with pytest.raises(UserError, match=f"was configured without {lacks}: its layout differs from other builds"):
        add_release(whole, tmp_path / "own.json")


def test_a_variant_of_a_later_release_is_assumed(tmp_path: Path) -> None:
    binary = stripped(built(NO_PCRE), tmp_path)
    shipped = catalogue.shipped()
    before = shipped.last_before(binary.version)
    assert before
    known = Catalogue({release: held for release, held in shipped.layouts.items() if release != binary.version})
    layout = layout_for(binary, known)
    assert (layout.source, layout.assumed) == (f"catalogue {before} without PCRE (assumed)", True)


def test_a_fork_is_laid_out_by_its_own_debug_information_or_its_own_release(tmp_path: Path) -> None:
    whole = built(ANGIE)
    binary = Binary(whole)
    assert (binary.product, binary.version, binary.with_compat) == ("Angie", "1.12.1", True)
    measured = layout_for(binary)
    assert measured.source == "DWARF"
    bare = stripped(whole, tmp_path)
    with pytest.raises(UserError, match=r"Angie 1\.12\.1 .*is not known and may differ from nginx's.*not stripped"):
        layout_for(bare)

    own = tmp_path / "own.json"
    # Without another release of Angie, there is nothing to compare with.
    assert add_release(whole, own) == [
        f"Angie 1.12.1 added to {own}, from {binary.name} (DWARF)",
        "it is used for all builds of Angie 1.12.1, and right only for builds with the same configure options: "
        "a fork's signature does not show all of them",
    ]
    layout = layout_for(bare)
    assert (layout.source, layout.assumed, layout.structs) == ("catalogue angie-1.12.1", False, measured.structs)
    assert list_releases(own)[-1] == f"angie-1.12.1   {own}"
    assert add_release(whole, own) == [f"Angie 1.12.1 is known already, and {binary.name} agrees (DWARF)"]


def test_a_fork_s_later_release_is_assumed_to_be_like_the_last_of_its_branch(tmp_path: Path) -> None:
    bare = stripped(built(ANGIE), tmp_path)
    structs = catalogue.shipped().layouts["1.31.2"]
    for earlier, source in (("angie-1.12.0", "catalogue angie-1.12.0 (assumed)"), ("angie-1.11.9", None)):
        known = catalogue.shipped().filled_from(Catalogue({earlier: structs}))
        if source is None:
            with pytest.raises(UserError, match="is not known"):
                layout_for(bare, known)
        else:
            assert layout_for(bare, known).source == source


def test_a_release_that_lacks_a_member_is_not_used(tmp_path: Path) -> None:
    bare = stripped(built(ANGIE), tmp_path)
    structs = {struct: dict(members) for struct, members in catalogue.shipped().layouts["1.31.2"].items()}
    del structs["ngx_http_request_s"]["main"]
    with pytest.raises(UserError, match=r"of angie-1\.12\.1 lacks ngx_http_request_s\.main: add .* again"):
        layout_for(bare, Catalogue({"angie-1.12.1": structs}))

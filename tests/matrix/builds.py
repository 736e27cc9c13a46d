"""The nginx builds that the end-to-end scenarios run against: of four Debian releases, with other flags, and of forks.

`obtain` puts a build into `.cache/nginx-builds/NAME/`, once:

    nginx   the executable; a fork whose executable has another name has a link with that name
    start   runs it with the given arguments; the process id of `start` becomes nginx's
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matrix.forks import ANGIE, FREENGINX, OPENRESTY, TENGINE, Fork

CACHE = Path(__file__).parents[2] / ".cache" / "nginx-builds"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The tree is nginx's whole file system but for the tests' directory, which lies at the same path inside and outside,
# in a mount namespace that ends with nginx. Only `exec`, so that one process id stays.
ENTER_TREE = """\
#!/bin/sh
set -e
tree=$(dirname "$0")/tree
temporary=${TMPDIR:-/tmp}
mkdir -p "$tree$temporary"
exec unshare --mount sh -c '
    mount --bind "$2" "$1$2"
    tree=$1
    shift 2
    exec chroot "$tree" /usr/sbin/nginx "$@"
' start "$tree" "$temporary" "$@"
"""

RUN_AS_IT_IS = """\
#!/bin/sh
exec "$(readlink -f "$(dirname "$0")/nginx")" "$@"
"""


class BuildError(Exception):
    """A build cannot be had here. The text says why, and the next step."""


@dataclass(frozen=True)
class DebianBuild:
    """nginx of a Debian release with that release's libraries, unpacked from packages; nothing gets installed."""

    name: str
    suite: str

    @property
    def description(self) -> str:
        return f"Debian's package of {self.suite}, with that release's libraries"

    def make(self, directory: Path) -> None:
        tree = directory / "tree"
        tree.mkdir()
        with tempfile.TemporaryDirectory() as name:
            wanted = ("nginx-core", "libnginx-mod-mail", "libnginx-mod-stream")
            download(self.suite, Path(name), "install", *wanted)
            for package in Path(name).glob("*.deb"):
                subprocess.run(["dpkg-deb", "--extract", package, tree], check=True)
        # What base-files and base-passwd would set up. Before Debian 13 libc itself brings /lib and /lib64.
        for merged in ("bin", "lib", "lib64", "sbin"):
            if not (tree / merged).exists():
                (tree / merged).symlink_to(f"usr/{merged}")
        (tree / "etc/passwd").write_text("root:x:0:0::/:\nnobody:x:65534:65534::/:\n")
        (tree / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (directory / "nginx").symlink_to("tree/usr/sbin/nginx")
        write_script(directory / "start", ENTER_TREE)


@dataclass(frozen=True)
class CompiledBuild:
    """nginx as its authors released it, compiled here, with this machine's compiler and libraries."""

    name: str
    compiler: str
    """Flags."""
    linker: str = ""
    """Flags."""
    compatible: bool = True
    """`--with-compat`: one layout for all builds of a version."""
    stripped: bool = False
    options: tuple[str, ...] = ()
    """More options of `configure`."""
    without: tuple[str, ...] = ()
    """Options that are left out."""
    fork: Fork | None = None

    @property
    def description(self) -> str:
        flags = f"`{self.compiler}`" + (f", linked with `{self.linker}`" if self.linker else "")
        compatible = "" if self.compatible else ", without `--with-compat`"
        options = f", with `{' '.join(self.options)}`" if self.options else ""
        fork = f", with the names and the struct layout of {self.fork.name}" if self.fork else ""
        return f"compiled with {flags}{compatible}{options}{fork}{', stripped' if self.stripped else ''}"

    def make(self, directory: Path) -> None:
        source = unpack_source(directory)
        without = self.without
        if self.fork:
            try:
                self.fork.apply(source)
            except ValueError as error:
                raise BuildError(f"{self.name}: {error}") from None
            without += self.fork.without
        configure = ["./configure", f"--with-cc-opt={self.compiler}", f"--with-ld-opt={self.linker}", *self.options]
        known = subprocess.run(["./configure", "--help"], cwd=source, capture_output=True, text=True).stdout
        configure += [option for option in OPTIONS if option.partition("=")[0] in known and option not in without]
        configure += ["--with-compat"] if self.compatible else []
        with (directory / "build.log").open("wb") as log:
            for command in (configure, ["make", f"-j{os.cpu_count()}"]):
                if subprocess.run(command, cwd=source, stdout=log, stderr=subprocess.STDOUT).returncode:
                    raise BuildError(f"{self.name}: `{shlex.join(command)}` failed; see {log.name}")
        binary = directory / (self.fork.executable if self.fork else "nginx")
        (source / "objs/nginx").rename(binary)
        if self.stripped:
            subprocess.run(["strip", "--strip-all", binary], check=True)
        shutil.rmtree(source)
        run_as_it_is(binary)


@dataclass(frozen=True)
class StrippedBuild:
    """Another build without symbols and debug information, where the program needs them."""

    name: str
    original: CompiledBuild
    refusal: str = field(default="", repr=False)
    """What the program must say where this build is out of its reach."""

    @property
    def description(self) -> str:
        return f"{self.original.name}, stripped"

    def make(self, directory: Path) -> None:
        original = (obtain(self.original) / "nginx").resolve()
        subprocess.run(["strip", "--strip-all", "-o", directory / original.name, original], check=True)
        run_as_it_is(directory / original.name)


# The Debian releases whose source package of nginx may be compiled, the preferred one first.
SOURCES = ("trixie", "bookworm", "sid")

# What the scenarios use, and a path that nginx would otherwise look for below --prefix before it reads its arguments.
OPTIONS = (
    "--error-log-path=stderr",
    "--with-threads",
    "--with-http_addition_module",
    "--with-http_auth_request_module",
    "--with-http_gunzip_module",
    "--with-http_realip_module",
    "--with-http_slice_module",
    "--with-http_ssl_module",
    "--with-http_stub_status_module",
    "--with-http_sub_module",
    "--with-http_v2_module",
    "--with-http_v3_module",
    "--with-mail",
    "--with-mail_ssl_module",
    "--with-stream",
    "--with-stream_realip_module",
    "--with-stream_ssl_module",
    "--with-stream_ssl_preread_module",
)

# dpkg-buildflags of Ubuntu 24.04, where they decide which functions exist and how they begin.
UBUNTU_COMPILER = (
    "-g -O2 -fno-omit-frame-pointer -mno-omit-leaf-frame-pointer -flto=auto -ffat-lto-objects -fstack-protector-strong"
    " -fstack-clash-protection -fcf-protection -fPIC -Wdate-time -D_FORTIFY_SOURCE=2"
)
UBUNTU_LINKER = "-Wl,-Bsymbolic-functions -flto=auto -ffat-lto-objects -Wl,-z,relro -Wl,-z,now -fPIC"

Build = DebianBuild | CompiledBuild | StrippedBuild

STATIC = CompiledBuild("static", "-O2", "-static")
NO_COMPAT = CompiledBuild("no-compat", "-g -O2", compatible=False)
NO_PCRE = CompiledBuild("no-pcre", "-g -O2", options=("--without-pcre", "--without-http_rewrite_module"))
NO_CACHE = CompiledBuild("no-cache", "-g -O2", options=("--without-http-cache",), without=("--with-http_slice_module",))
FORKS = tuple(CompiledBuild(fork.name.lower(), "-g -O2", fork=fork) for fork in (TENGINE, ANGIE, FREENGINX, OPENRESTY))

BUILDS: tuple[Build, ...] = (
    DebianBuild("debian-11", "bullseye"),
    DebianBuild("debian-12", "bookworm"),
    DebianBuild("debian-13", "trixie"),
    DebianBuild("debian-sid", "sid"),
    CompiledBuild("lto-cet", UBUNTU_COMPILER, UBUNTU_LINKER, stripped=True),
    CompiledBuild("o3", "-O3", stripped=True),
    CompiledBuild("o3-lto", "-O3 -flto=auto", "-flto=auto", stripped=True),
    CompiledBuild("no-pie", "-O2 -fno-pie", "-no-pie", stripped=True),
    STATIC,
    NO_COMPAT,
    *FORKS,
    StrippedBuild("static-stripped", STATIC, refusal="symbol"),
    StrippedBuild("no-compat-stripped", NO_COMPAT, refusal="--with-compat"),
    StrippedBuild("no-pcre-stripped", NO_PCRE),
    StrippedBuild("no-cache-stripped", NO_CACHE),
    *(StrippedBuild(f"{each.name}-stripped", each, refusal="may differ from nginx's") for each in FORKS),
)


def obtain(build: Build) -> Path:
    """The build's directory, made unless it is there already and made by the same recipe.

    Raises:
        BuildError: it cannot be downloaded or compiled.
    """
    directory = CACHE / build.name
    recipe = f"{build!r}\n"
    recipe_file = directory / "recipe"
    if recipe_file.exists() and recipe_file.read_text() == recipe:
        return directory
    print(f"matrix: making {build.name}", file=sys.stderr)
    partial = CACHE / f"{build.name}.partial"
    for leftover in (partial, directory):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    build.make(partial)
    (partial / "recipe").write_text(recipe)
    partial.rename(directory)
    return directory


def unpack_source(directory: Path) -> Path:
    """Unpacks nginx's own release and returns its directory.

    It takes the release of the first Debian suite whose tarball the mirror serves, and none of Debian's patches: on any
    day a mirror may lack a file of the newest package.

    Raises:
        BuildError: the mirror serves none of the tarballs.
    """
    problems = []
    for suite in SOURCES:
        with tempfile.TemporaryDirectory() as name:
            try:
                download(suite, Path(name), "source", "--tar-only", "nginx")
            except BuildError as error:
                problems.append(f"{suite}: {error}")
                continue
            (archive,) = Path(name).glob("*.orig.tar.?z")
            subprocess.run(["tar", "--extract", "--no-same-owner", "--file", archive], cwd=directory, check=True)
        (source,) = directory.glob("nginx-*")
        return source
    raise BuildError("\n".join(problems))


def download(suite: str, directory: Path, *command: str) -> None:
    """Puts into `directory` what apt fetches for `command` on a machine of that release with nothing installed.

    Raises:
        BuildError: apt cannot.
    """
    (directory / "partial").mkdir()
    flags = apt_flags(suite)
    fetch = [*flags, f"--option=Dir::Cache::archives={directory}", "--download-only", *command]
    try:
        run_apt(fetch, directory)
    except BuildError:  # the lists may be older than what the mirror serves by now
        run_apt([*flags, "update"], directory)
        run_apt(fetch, directory)


@functools.cache
def apt_flags(suite: str) -> tuple[str, ...]:
    """Options for an apt whose sources, lists and state are its own and up to date; the machine's are not touched."""
    apt = CACHE / "apt" / suite
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "nothing-installed").touch()
    sources = "\n".join(f"{kind} [signed-by={KEYRING}] {mirror()} {suite} main" for kind in ("deb", "deb-src"))
    (apt / "sources.list").write_text(sources + "\n")
    options = {
        "Dir::State": apt,
        "Dir::State::status": apt / "nothing-installed",
        "Dir::Cache": apt,
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Acquire::Languages": "none",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # the sandbox's own user may not be able to reach these directories
    }
    flags = tuple(f"--option={name}={value}" for name, value in options.items())
    run_apt([*flags, "update"], apt)
    return flags


def run_apt(arguments: Sequence[str], directory: Path) -> None:
    done = subprocess.run(["apt-get", "--quiet", "--yes", *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"apt-get {arguments[-1]} failed: {done.stderr.strip()}")


def mirror() -> str:
    """The Debian mirror that this machine uses.

    Raises:
        BuildError: apt does not know one.
    """
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format=$(REPO_URI)", "Created-By: Packages", "Label: Debian", "Component: main"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if not listed:
        raise BuildError("apt knows no Debian mirror here: run `apt-get update` on a Debian machine")
    return listed[0]


def run_as_it_is(binary: Path) -> None:
    if binary.name != "nginx":
        binary.with_name("nginx").symlink_to(binary.name)
    write_script(binary.with_name("start"), RUN_AS_IT_IS)


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)

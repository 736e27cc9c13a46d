"""Makes the nginx builds for the end-to-end scenarios: of four Debian releases, with other flags, musl, and of forks.

`obtain` puts a build into `.cache/nginx-builds/NAME/`, once:

    nginx   the executable, or a link to it if the fork's executable has another name
    start   runs nginx with the given arguments; the pid of `start` becomes nginx's pid
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matrix.forks import ANGIE, FREENGINX, OPENRESTY, TENGINE, Fork

CACHE = Path(__file__).parents[2] / ".cache" / "nginx-builds"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The tree is nginx's whole file system, except the tests' directory. That directory has the same path inside and
# outside, in a mount namespace that ends with nginx. The script uses only `exec`, so the pid stays the same.
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
    """A build is not available here. The text says why, and the next step."""


@dataclass(frozen=True)
class DebianBuild:
    """nginx of a Debian release with the libraries of that release, unpacked from packages without installing them."""

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
        # base-files and base-passwd would set this up. Before Debian 13 libc itself has /lib and /lib64.
        for merged in ("bin", "lib", "lib64", "sbin"):
            if not (tree / merged).exists():
                (tree / merged).symlink_to(f"usr/{merged}")
        (tree / "etc/passwd").write_text("root:x:0:0::/:\nnobody:x:65534:65534::/:\n")
        (tree / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (directory / "nginx").symlink_to("tree/usr/sbin/nginx")
        write_script(directory / "start", ENTER_TREE)


@dataclass(frozen=True)
class CompiledBuild:
    """nginx as its authors released it, compiled with this machine's compiler and libraries."""

    name: str
    compiler: str
    """The compiler's flags."""
    linker: str = ""
    """The linker's flags."""
    compatible: bool = True
    """Whether to build `--with-compat`, which gives all builds of a version one layout."""
    stripped: bool = False
    options: tuple[str, ...] = ()
    """Further options of `configure`."""
    without: tuple[str, ...] = ()
    """Options of `configure` to leave out."""
    fork: Fork | None = None
    musl: bool = False
    """Whether to build it against musl, as Alpine does, and not against glibc."""

    @property
    def description(self) -> str:
        flags = f"`{self.compiler}`" + (f", linked with `{self.linker}`" if self.linker else "")
        compatible = "" if self.compatible else ", without `--with-compat`"
        options = f", with `{' '.join(self.options)}`" if self.options else ""
        fork = f", with the names and the struct layout of {self.fork.name}" if self.fork else ""
        musl = ", against musl" if self.musl else ""
        return f"compiled with {flags}{compatible}{options}{fork}{musl}{', stripped' if self.stripped else ''}"

    def make(self, directory: Path) -> None:
        source = unpack_source(directory)
        without = self.without
        if self.fork:
            try:
                self.fork.apply(source)
            except ValueError as error:
                raise BuildError(f"{self.name}: {error}") from None
            without += self.fork.without
        compiler, linker, more = self.compiler, self.linker, list(self.options)
        if self.musl:
            libraries = obtain(MUSL_LIBRARIES).resolve()
            compiler += f" -I{libraries}/include -idirafter {libraries}/headers"
            linker += f" -L{libraries}/lib -Wl,-rpath,{libraries}/lib"
            more.append("--with-cc=musl-gcc")
        configure = ["./configure", f"--with-cc-opt={compiler}", f"--with-ld-opt={linker}", *more]
        known = subprocess.run(["./configure", "--help"], cwd=source, capture_output=True, text=True).stdout
        configure += [option for option in OPTIONS if option.partition("=")[0] in known and option not in without]
        configure += ["--with-compat"] if self.compatible else []
        run_logged(directory / "build.log", source, configure, MAKE)
        binary = directory / (self.fork.executable if self.fork else "nginx")
        (source / "objs/nginx").rename(binary)
        if self.stripped:
            subprocess.run(["strip", "--strip-all", binary], check=True)
        shutil.rmtree(source)
        run_as_it_is(binary)


@dataclass(frozen=True)
class StrippedBuild:
    """Another build, stripped of the symbols and debug information that the program needs."""

    name: str
    original: CompiledBuild
    refusal: str = field(default="", repr=False)
    """What the program must say if it cannot trace this build."""

    @property
    def description(self) -> str:
        return f"{self.original.name}, stripped"

    def make(self, directory: Path) -> None:
        original = (obtain(self.original) / "nginx").resolve()
        subprocess.run(["strip", "--strip-all", "-o", directory / original.name, original], check=True)
        run_as_it_is(directory / original.name)


@dataclass(frozen=True)
class MuslLibraries:
    """What nginx needs, compiled against Debian's musl, as shared and static libraries. Debian has only musl itself."""

    name: str = "musl-libraries"
    suite: str = "bookworm"

    def make(self, directory: Path) -> None:
        headers = directory / "headers"
        headers.mkdir()
        # The kernel's headers, which are below the C library's in /usr/include.
        include = Path("/usr/include")
        for name in ("linux", "asm-generic"):
            (headers / name).symlink_to(include / name)
        (headers / "asm").symlink_to(include / sysconfig.get_config_var("MULTIARCH") / "asm")
        environment = {**os.environ, "CC": f"musl-gcc -idirafter {headers}"}
        for package, configure, targets in (
            ("zlib", ["./configure"], ["install"]),
            ("pcre2", ["./configure", "--enable-jit"], ["install"]),
            (
                "openssl",
                ["./config", "--libdir=lib", "no-tests", "no-engine", "no-async"],
                ["build_libs", "install_dev"],
            ),
        ):
            source = unpack_release(self.suite, package, directory)
            commands = ([*configure, f"--prefix={directory}"], *([*MAKE, target] for target in targets))
            run_logged(directory / f"{package}.log", source, *commands, environment=environment)
            shutil.rmtree(source)
        # Debian's musl has no crypt, and no scenario has a password. nginx calls it for those that are hashed by it.
        (headers / "crypt.h").write_text("char *crypt(const char *key, const char *salt);\n")
        crypt = (
            "#include <errno.h>\n#include <stddef.h>\n"
            "char *crypt(const char *key, const char *salt) { (void)key; (void)salt; errno = ENOSYS; return NULL; }\n"
        )
        compile_crypt = ["musl-gcc", "-fPIC", "-c", "-x", "c", "-o", "crypt.o", "-"]
        subprocess.run(compile_crypt, cwd=directory, input=crypt.encode(), check=True)
        subprocess.run(["ar", "rcs", "lib/libcrypt.a", "crypt.o"], cwd=directory, check=True)


# The Debian releases whose source package of nginx may be compiled, in order of preference.
SOURCES = ("trixie", "bookworm", "sid")

# What the scenarios use. Without --error-log-path nginx would look below --prefix before it reads its arguments.
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

# The flags of Ubuntu 24.04's dpkg-buildflags that decide which functions exist and how they begin.
UBUNTU_COMPILER = (
    "-g -O2 -fno-omit-frame-pointer -mno-omit-leaf-frame-pointer -flto=auto -ffat-lto-objects -fstack-protector-strong"
    " -fstack-clash-protection -fcf-protection -fPIC -Wdate-time -D_FORTIFY_SOURCE=2"
)
UBUNTU_LINKER = "-Wl,-Bsymbolic-functions -flto=auto -ffat-lto-objects -Wl,-z,relro -Wl,-z,now -fPIC"

MAKE = ("make", f"-j{os.cpu_count()}")

Build = DebianBuild | CompiledBuild | StrippedBuild

MUSL_LIBRARIES = MuslLibraries()

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
    CompiledBuild("musl", "-Os -fPIE", "-pie", stripped=True, musl=True),
    CompiledBuild("musl-static", "-O2", "-static", musl=True),
    *FORKS,
    StrippedBuild("static-stripped", STATIC, refusal="symbol"),
    StrippedBuild("no-compat-stripped", NO_COMPAT, refusal="--with-compat"),
    StrippedBuild("no-pcre-stripped", NO_PCRE),
    StrippedBuild("no-cache-stripped", NO_CACHE),
    *(StrippedBuild(f"{each.name}-stripped", each, refusal="may differ from nginx's") for each in FORKS),
)


def obtain(build: Build | MuslLibraries) -> Path:
    """Return the build's directory. Make the build unless it exists and the recipe is the same.

    Raises:
        BuildError: The build cannot be downloaded or compiled.
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
    """Unpack nginx's own release without Debian's patches; return its directory.

    Takes the first Debian suite in `SOURCES` whose tarball the mirror serves, because a mirror may lack a file of the
    newest package on any day.

    Raises:
        BuildError: The mirror does not serve any of the tarballs.
    """
    problems = []
    for suite in SOURCES:
        try:
            return unpack_release(suite, "nginx", directory)
        except BuildError as error:
            problems.append(f"{suite}: {error}")
    raise BuildError("\n".join(problems))


def unpack_release(suite: str, package: str, directory: Path) -> Path:
    """Unpack the release that a Debian suite's package is made from, without Debian's patches; return its directory.

    Raises:
        BuildError: The mirror does not serve the tarball.
    """
    with tempfile.TemporaryDirectory() as name:
        download(suite, Path(name), "source", "--tar-only", package)
        (archive,) = Path(name).glob("*.orig.tar.*")
        subprocess.run(["tar", "--extract", "--no-same-owner", "--file", archive], cwd=directory, check=True)
    (source,) = (path for path in directory.glob(f"{package}-*") if path.is_dir())
    return source


def run_logged(log: Path, directory: Path, *commands: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run commands one after another.

    Raises:
        BuildError: A command failed.
        OSError: A command is not installed.
    """
    with log.open("wb") as output:
        for command in commands:
            done = subprocess.run(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                raise BuildError(f"`{shlex.join(command)}` failed; see {log}")


def download(suite: str, directory: Path, *command: str, architecture: str = "amd64") -> None:
    """Download into `directory` what apt fetches for `command` on a machine of that release without packages.

    Raises:
        BuildError: apt failed.
    """
    (directory / "partial").mkdir()
    flags = apt_flags(suite, architecture)
    fetch = [*flags, f"--option=Dir::Cache::archives={directory}", "--download-only", *command]
    try:
        run_apt(fetch, directory)
    except BuildError:  # the lists may be older than the mirror
        run_apt([*flags, "update"], directory)
        run_apt(fetch, directory)


@functools.cache
def apt_flags(suite: str, architecture: str = "amd64") -> tuple[str, ...]:
    """Return options for an apt with its own sources, lists and state, up to date. The machine's stay as they are."""
    apt = CACHE / "apt" / (suite if architecture == "amd64" else f"{suite}-{architecture}")
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
        "APT::Architecture": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # the sandbox's user may not reach these directories
    }
    flags = tuple(f"--option={name}={value}" for name, value in options.items())
    run_apt([*flags, "update"], apt)
    return flags


def run_apt(arguments: Sequence[str], directory: Path) -> None:
    done = subprocess.run(["apt-get", "--quiet", "--yes", *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"apt-get {arguments[-1]} failed: {done.stderr.strip()}")


def mirror() -> str:
    """Return the Debian mirror that this machine uses.

    Raises:
        BuildError: apt knows no mirror.
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

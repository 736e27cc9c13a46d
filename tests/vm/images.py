"""Makes a kernel and a root file system for a virtual machine, unpacked from Debian's packages.

Installs nothing on this machine and runs no maintainer script. Makes both once, in `.cache/vm/`.
"""

import importlib.metadata
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from matrix.builds import download

from vm.architectures import NATIVE, Architecture

CACHE = Path(__file__).parents[2] / ".cache" / "vm"

KERNELS = {
    "5.10": ("bullseye", "cloud-{}"),
    "6.1": ("bookworm", "cloud-{}"),
    "6.12": ("trixie", "cloud-{}"),
    "newest": ("sid", "cloud-{}"),
    "6.12-16k": ("trixie", "{}-16k"),
}
"""The Debian release that has each kernel, and its flavour there: for virtual machines, or with pages of 16K."""

# What a virtio disk and ext4 need, in the order of loading. Most kernels have some of them built in.
MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("crc16", "crc32c_generic", "mbcache", "jbd2", "ext4"),
)

# The guest runs this machine's virtual environment, so it needs the same Python release.
ROOT_SUITE = "bookworm"
ROOT_PACKAGES = (
    *("base-files", "base-passwd", "bash", "busybox-static", "coreutils", "dash", "debianutils", "diffutils"),
    *("findutils", "gcc", "grep", "gzip", "hostname", "iproute2", "libc6-dev", "libc-bin", "mount", "procps", "sed"),
    *("tar", "util-linux", "python3", "python3-bpfcc", "libpython3.11", "ca-certificates", "openssl", "nginx"),
    *("libnginx-mod-mail", "libnginx-mod-stream", "apache2-utils", "binutils", "fcgiwrap", "memcached"),
    *("uwsgi-core", "uwsgi-plugin-python3", "valgrind"),
)
ROOT_BYTES = 3 << 30


@dataclass(frozen=True)
class Kernel:
    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def busybox(self) -> Path:
        """A static busybox for the kernel's machine."""
        own = self.directory / "busybox"
        return own if own.exists() else Path("/bin/busybox")

    @property
    def modules(self) -> list[Path]:
        """The modules, in the order of loading."""
        return [path for name in MODULES if (path := self.directory / f"{name}.ko").exists()]

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return (self.directory / "release").read_text().strip()


def named(name: str, architecture: Architecture) -> str:
    return name if architecture.name == NATIVE else f"{name}-{architecture.name}"


def kernels_of(architecture: Architecture) -> list[str]:
    """Return the names of the kernels that Debian has for the architecture."""
    return [name for name, (_, flavour) in KERNELS.items() if architecture.name == "arm64" or flavour == "cloud-{}"]


def kernel(name: str, architecture: Architecture) -> Kernel:
    """Return the kernel. Raise `matrix.builds.BuildError` if its package is not available."""
    directory = CACHE / named(f"linux-{name}", architecture)
    if not directory.exists():
        with _made_whole(directory) as partial:
            suite, flavour = KERNELS[name]
            _unpack_kernel(suite, flavour.format(architecture.name), architecture.name, partial.path)
    return Kernel(directory)


def _unpack_kernel(suite: str, flavour: str, architecture: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        tree = Path(name, "tree")
        wanted = [f"linux-image-{flavour}", *(["busybox-static"] if architecture != NATIVE else [])]
        download(suite, Path(name), "install", *wanted, architecture=architecture)
        for package in (*Path(name).glob("linux-*.deb"), *Path(name).glob("busybox-*.deb")):
            subprocess.run(["dpkg-deb", "--extract", package, tree], check=True)
        for busybox in tree.glob("**/bin/busybox"):
            shutil.copy(busybox, directory / "busybox")
        (image,) = tree.rglob("vmlinuz*")
        shutil.copy(image, directory / "vmlinuz")
        (modules,) = (path for path in tree.rglob("lib/modules/*") if (path / "kernel").is_dir())
        (directory / "release").write_text(modules.name + "\n")
        for module in MODULES:
            for path in modules.rglob(f"{module}.ko*"):
                content = path.read_bytes()
                (directory / f"{module}.ko").write_bytes(lzma.decompress(content) if path.suffix == ".xz" else content)


def root_image(architecture: Architecture) -> Path:
    """Return an image of Debian with nginx and all that the tests need. Raise `BuildError` if a package is missing."""
    image = CACHE / f"{named('root', architecture)}.ext4"
    recipe = image.with_suffix(".packages")
    wanted = " ".join((ROOT_SUITE, *ROOT_PACKAGES)) + "\n"
    if not image.exists() or not recipe.exists() or recipe.read_text() != wanted:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            tree = Path(name, "tree")
            _unpack_root(Path(name), tree, architecture.name)
            image.unlink(missing_ok=True)
            make_image(tree, image, ROOT_BYTES)
        recipe.write_text(wanted)
    return image


def _unpack_root(packages: Path, tree: Path, architecture: str) -> None:
    print("vm: making the root file system", file=sys.stderr)
    download(ROOT_SUITE, packages, "install", *ROOT_PACKAGES, architecture=architecture)
    for merged in ("bin", "lib", "lib64", "sbin"):
        (tree / "usr" / merged).mkdir(parents=True)
        (tree / merged).symlink_to(f"usr/{merged}")
    for package in sorted(packages.glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as reader:
            unpack = ["tar", "--extract", "--keep-directory-symlink", "--directory", tree]
            subprocess.run(unpack, stdin=reader.stdout, check=True)
    # Maintainer scripts would set this up.
    for name in ("passwd", "group"):
        shutil.copy(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    if not (tree / "bin/sh").exists():
        (tree / "bin/sh").symlink_to("dash")
    for library in ("python3", "python3.11"):
        compile_all = [sys.executable, "-m", "compileall", "-q", "-s", tree, "-p", "/", tree / "usr/lib" / library]
        subprocess.run(compile_all, check=False)  # some files of the library do not compile, on purpose


def make_image(tree: Path, image: Path, size: int) -> None:
    """Make a file system with the content of `tree`, owned by root, of `size` bytes. Free space takes no disk."""
    partial = image.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    run = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, partial, str(size // 1024)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    partial.rename(image)


def exchange_native_packages(site_packages: Path, architecture: Architecture) -> None:
    """Put the wheels of another architecture into a copy of this virtual environment's packages.

    Packages without such a wheel are missing then.
    """
    for each in importlib.metadata.distributions():
        tags = re.findall(r"^Tag: .*-(\S+)$", each.read_text("WHEEL") or "", re.MULTILINE)
        if all(tag == "any" for tag in tags):
            continue
        for file in each.files or ():
            (site_packages / file).unlink(missing_ok=True)
        unpacked = CACHE / named("wheels", architecture) / f"{each.name}-{each.version}"
        if not unpacked.exists():
            with _made_whole(unpacked) as partial:
                install = [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--no-deps",
                ]
                install += ["--only-binary=:all:", f"--target={partial.path}", f"{each.name}=={each.version}"]
                install += [f"--platform={name}" for name in architecture.wheels]
                if subprocess.run(install, stderr=subprocess.DEVNULL).returncode:
                    print(f"vm: no {each.name} {each.version} for {architecture.name}", file=sys.stderr)
        shutil.copytree(unpacked, site_packages, dirs_exist_ok=True)


class _made_whole:
    """Gives a directory another name until it is complete."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory.with_name(f"{directory.name}.partial")

    def __enter__(self) -> "_made_whole":
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.path.rename(self._directory)

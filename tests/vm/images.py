"""Makes a kernel and a root file system for a virtual machine, unpacked from Debian's packages.

Installs nothing on this machine and runs no maintainer script. Makes both once, in `.cache/vm/`.
"""

import lzma
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from matrix.builds import download

CACHE = Path(__file__).parents[2] / ".cache" / "vm"

KERNELS = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "newest": "sid"}
"""The Debian release that has each kernel, in its build for virtual machines."""

# What a virtio disk needs, in the order of loading. Newer kernels have some of them built in.
MODULES = ("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")

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
    def modules(self) -> list[Path]:
        """The modules, in the order of loading."""
        return [path for name in MODULES if (path := self.directory / f"{name}.ko").exists()]

    @property
    def release(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return (self.directory / "release").read_text().strip()


def kernel(name: str) -> Kernel:
    """Return the kernel. Raise `matrix.builds.BuildError` if its package is not available."""
    directory = CACHE / f"linux-{name}"
    if not directory.exists():
        with _made_whole(directory) as partial:
            _unpack_kernel(KERNELS[name], partial.path)
    return Kernel(directory)


def _unpack_kernel(suite: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        tree = Path(name, "tree")
        download(suite, Path(name), "install", "linux-image-cloud-amd64")
        for package in Path(name).glob("linux-*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, tree], check=True)
        (image,) = tree.rglob("vmlinuz*")
        shutil.copy(image, directory / "vmlinuz")
        (modules,) = (path for path in tree.rglob("lib/modules/*") if (path / "kernel").is_dir())
        (directory / "release").write_text(modules.name + "\n")
        for module in MODULES:
            for path in modules.rglob(f"{module}.ko*"):
                content = path.read_bytes()
                (directory / f"{module}.ko").write_bytes(lzma.decompress(content) if path.suffix == ".xz" else content)


def root_image() -> Path:
    """Return an image of Debian with nginx and all that the tests need. Raise `BuildError` if a package is missing."""
    image = CACHE / "root.ext4"
    recipe = CACHE / "root.packages"
    wanted = " ".join((ROOT_SUITE, *ROOT_PACKAGES)) + "\n"
    if not image.exists() or not recipe.exists() or recipe.read_text() != wanted:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            tree = Path(name, "tree")
            _unpack_root(Path(name), tree)
            image.unlink(missing_ok=True)
            make_image(tree, image, ROOT_BYTES)
        recipe.write_text(wanted)
    return image


def _unpack_root(packages: Path, tree: Path) -> None:
    print("vm: making the root file system", file=sys.stderr)
    download(ROOT_SUITE, packages, "install", *ROOT_PACKAGES)
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

"""The kinds of machine that a guest can be, and what Debian, pip and qemu call them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    name: str
    """Debian's name."""
    qemu: tuple[str, ...]
    """The emulator and its machine."""
    console: str
    wheels: tuple[str, ...] = ()
    """pip's names for it. Empty: the guest can run this machine's virtual environment."""


ARCHITECTURES = {
    each.name: each
    for each in (
        # QEMU 7.2 sometimes computes wrong flags for cmpxchg16b, and newer kernels use it to allocate memory.
        Architecture("amd64", ("qemu-system-x86_64", "-cpu", "qemu64,-cx16"), "ttyS0"),
        # With QEMU's own algorithm for pointer authentication: the architecture's own is many times slower to emulate.
        Architecture(
            "arm64",
            ("qemu-system-aarch64", "-machine", "virt", "-cpu", "max,pauth-impdef=on"),
            "ttyAMA0",
            wheels=tuple(f"manylinux_2_{glibc}_aarch64" for glibc in (17, 24, 26, 27, 28, 31, 34, 35)),
        ),
    )
}
NATIVE = "amd64"

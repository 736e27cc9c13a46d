"""Runs a command of this checkout as root in a virtual machine with another kernel. It is slow, but needs no KVM.

The machine has a copy of the checkout at the same path. It throws away everything that the command writes, except files
in `RESULTS`. It has no network except loopback.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matrix.builds import BuildError

from vm.architectures import ARCHITECTURES, NATIVE, Architecture
from vm.images import CACHE, KERNELS, Kernel, exchange_native_packages, kernel, make_image, root_image

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path("/run/results")
CHECKOUT_BYTES = 2 << 30
RESULTS_BYTES = 256 << 20

# `mitigations` and `audit` only cost time here. The last two options spare the guest a wait for entropy and clock.
KERNEL_ARGUMENTS = "quiet panic=-1 mitigations=off audit=0 random.trust_cpu=on tsc=reliable"


class MachineError(Exception):
    """The guest did not finish the command."""


def run(
    name: str,
    command: Sequence[str],
    results: Path,
    seconds: float,
    kernel_arguments: str = "",
    architecture: Architecture = ARCHITECTURES[NATIVE],
) -> int:
    """Boot a kernel of `images.KERNELS`, run `command` in the checkout, and copy its results to `results`.

    The console goes to this process's output. Returns the command's exit code.

    Raises:
        matrix.builds.BuildError: A package is not available.
        MachineError: The command took longer than `seconds`, or the guest crashed.
    """
    linux, root = kernel(name, architecture), root_image(architecture)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        place = Path(directory)
        _pack_checkout(place, architecture)
        _pack_memory_disk(place, linux, command)
        handed_back = place / "results.tar"
        with handed_back.open("wb") as file:
            file.truncate(RESULTS_BYTES)
        disks = ((root, "on"), (place / "checkout.ext4", "off"), (handed_back, "off"))
        machine = [
            *("nice", "-n", "15", *architecture.qemu, "-accel", "tcg,thread=multi"),
            *("-smp", "2", "-m", "3G", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-kernel", linux.image, "-initrd", place / "memory-disk"),
            *("-append", f"console={architecture.console} {KERNEL_ARGUMENTS} {kernel_arguments}"),
        ]
        for image, throw_away in disks:
            machine += ["-drive", f"file={image},format=raw,if=virtio,snapshot={throw_away},cache=unsafe"]
        try:
            subprocess.run(machine, stdin=subprocess.DEVNULL, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            raise MachineError(f"the guest with Linux {linux.release} did not end within {seconds:.0f} s") from None
        except subprocess.CalledProcessError as error:
            raise MachineError(f"qemu failed with {error.returncode}") from None
        results.mkdir(parents=True, exist_ok=True)
        exit_code = results / "exit-code"
        exit_code.unlink(missing_ok=True)
        subprocess.run(["tar", "--extract", "--file", handed_back, "--directory", results], stderr=subprocess.DEVNULL)
        if not exit_code.exists():
            raise MachineError(f"the guest with Linux {linux.release} crashed")
    return int(exit_code.read_text())


def _pack_checkout(place: Path, architecture: Architecture) -> None:
    """Pack the files that git tracks or would track, and the virtual environment."""
    tree = place / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
    )
    names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    for name in names:
        if (REPOSITORY / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    subprocess.run(["cp", "--archive", "--link", REPOSITORY / ".venv", tree], check=True)
    if architecture.wheels:
        (site_packages,) = (tree / ".venv/lib").glob("python3.*/site-packages")
        exchange_native_packages(site_packages, architecture)
    make_image(tree, place / "checkout.ext4", CHECKOUT_BYTES)
    shutil.rmtree(tree)


def _pack_memory_disk(place: Path, linux: Kernel, command: Sequence[str]) -> None:
    tree = place / "memory"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy(linux.busybox, tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    shutil.copy(Path(__file__).with_name("init"), tree / "init")
    for module in linux.modules:
        shutil.copy(module, tree / "modules")
    (tree / "modules/order").write_text("\n".join(module.name for module in linux.modules))
    (tree / "checkout").write_text(str(REPOSITORY))
    (tree / "command").write_text(
        "export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8\n"
        f"cd {shlex.quote(str(REPOSITORY))} && {shlex.join(command)}\n"
    )
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))) + "\n"
    with (place / "memory-disk").open("wb") as archive:
        pack = ["/bin/busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(pack, cwd=tree, input=names.encode(), stdout=archive, stderr=subprocess.DEVNULL, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/vm/run", description=__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--arch", choices=ARCHITECTURES, default=NATIVE, help=f"the machine (default: {NATIVE})")
    parser.add_argument("command", nargs="+", help="the command, after `--`")
    parser.add_argument("--results", type=Path, default=CACHE / "results", help=f"where to copy files from {RESULTS}")
    parser.add_argument("--seconds", type=float, default=1800, help="how long the guest may take (default: 1800)")
    parser.add_argument("--append", default="", help="further arguments for the kernel, such as lockdown=integrity")
    arguments = parser.parse_args()
    try:
        return run(
            arguments.kernel,
            arguments.command,
            arguments.results,
            arguments.seconds,
            arguments.append,
            ARCHITECTURES[arguments.arch],
        )
    except (BuildError, MachineError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())

"""Builds the images with image/build, and runs containers of them."""

import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from e2e.nginx_server import wait_until

_BUILD = Path(__file__).parents[2] / "image" / "build"
# By default podman asks systemd for these, but systemd may not run here.
_GLOBAL = ("--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=file")
_RUN = ("--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096")


def build() -> "Podman":
    """Build the images if they are not there yet. Raise CalledProcessError if the build fails."""
    told = subprocess.run([_BUILD], check=True, stdout=subprocess.PIPE, text=True).stdout
    return Podman(told.split())


class Podman:
    def __init__(self, storage: Sequence[str]) -> None:
        self._command = ("podman", *storage, *_GLOBAL)

    def run(self, *arguments: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        ended = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=60, check=False)
        if check and ended.returncode:
            raise RuntimeError(f"podman {arguments[0]} failed: {ended.stderr}")
        return ended


class Container:
    """A container that runs until the end of the `with` statement."""

    def __init__(
        self, podman: Podman, image: str, *command: str, options: Sequence[str] = (), network: str = "host"
    ) -> None:
        self._podman = podman
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        try:
            podman.run("run", "--detach", "--name", self.name, f"--network={network}", *_RUN, *options, image, *command)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        self._podman.run("rm", "--force", "--ignore", "--time=5", self.name)

    def output(self) -> str:
        """Return everything that the container wrote so far, on both streams."""
        ended = self._podman.run("logs", self.name)
        return ended.stdout + ended.stderr

    def inspect(self, field: str) -> Any:
        return self._podman.run("inspect", "--format", f"{{{{{field}}}}}", self.name).stdout.strip()

    def is_running(self) -> bool:
        return bool(self.inspect(".State.Running") == "true")

    def exec(self, *command: str) -> str:
        return self._podman.run("exec", self.name, *command).stdout

    def succeeds(self, *command: str) -> bool:
        return self._podman.run("exec", self.name, *command, check=False).returncode == 0

    def is_healthy(self) -> bool:
        """Run the health check that the image declares; return its result."""
        return self._podman.run("healthcheck", "run", self.name, check=False).returncode == 0

    def stop(self, seconds: int | None = 20) -> int:
        """Stop the container with SIGTERM; return its exit code. None: wait as long as podman does by default."""
        self._podman.run("stop", *([] if seconds is None else [f"--time={seconds}"]), self.name)
        return int(self.inspect(".State.ExitCode"))

    def wait_until_it_says(self, text: str, seconds: float = 30) -> None:
        """Wait for `text` in the output. Raise AssertionError if the container ends without it."""

        def said() -> bool:
            running = self.is_running()
            found = text in self.output()
            assert found or running, f"ended without “{text}”: {self.output()}"
            return found

        wait_until(said, f"“{text}” from a container", seconds)

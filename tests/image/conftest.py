"""Builds the images once for the session."""

import os
import shutil

import pytest

from image.podman import Podman, build


@pytest.fixture(scope="session")
def podman() -> Podman:
    needed = ("buildah", "debootstrap", "podman", "runc")
    if os.geteuid() != 0 or not all(map(shutil.which, needed)):
        pytest.skip(f"needs root and {', '.join(needed)}; run it with `sudo make test`")
    return build()

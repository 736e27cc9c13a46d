"""The sdist and the wheel: what they contain, and that the wheel attaches to a real nginx from a clean environment."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.nginx_server import NginxServer, free_ports

import otel_nginx_ebpf

_CHECKOUT = Path(otel_nginx_ebpf.__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sdist and the wheel are, made from the files that git has here, and nothing else."""
    directory = tmp_path_factory.mktemp("dist")
    source = directory / "source"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=_CHECKOUT, check=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", directory, source], check=True)
    return directory


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, in an environment that has nothing but the wheel and its dependencies."""
    environment = tmp_path_factory.mktemp("environment")
    # The distribution's Python, whose BCC the loader uses.
    subprocess.run([Path(sys.base_prefix, "bin", "python3"), "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", wheel], check=True)
    return environment / "bin" / "otel-nginx-ebpf"


def _tracked(directory: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", directory], cwd=_CHECKOUT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def test_the_wheel_has_the_package_and_the_probes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}

    probes = {f"otel_nginx_ebpf/{name}" for name in _tracked("probes")}
    assert "otel_nginx_ebpf/probes/record.h" in probes
    assert packed == _tracked("otel_nginx_ebpf") | probes


def test_the_sdist_builds_without_a_checkout(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}

    # The wheel above was made from it.
    assert _tracked("otel_nginx_ebpf") | _tracked("probes") | {"LICENSE", "README.md", "pyproject.toml"} <= packed


def test_the_version_is_from_one_place(wheel: Path, installed: Path, tmp_path: Path) -> None:
    told = subprocess.run([installed, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert told == f"otel-nginx-ebpf {otel_nginx_ebpf.__version__}\n"
    assert wheel.name.split("-")[1] == otel_nginx_ebpf.__version__


@pytest.fixture
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NginxServer]:
    prefix = tmp_path_factory.mktemp("nginx")
    (port,) = free_ports(1)
    server = NginxServer(prefix, f"server {{ listen 127.0.0.1:{port}; return 204; }}")
    server.start([("127.0.0.1", port)])
    yield server
    server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="attaching needs root: run it with `sudo make test`")
def test_what_is_installed_attaches_to_a_running_nginx(installed: Path, nginx: NginxServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed, "run", "--dry-run", "--pid", str(nginx.pid)], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert re.match(rf"ready: nginx [0-9.]+ \(pid {nginx.pid}\), 1 worker, sites .*free_request", done.stderr)

"""What keeps the program from tracing: one clear line, exit code 2, and an unchanged nginx."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.agent_process import PROGRAM
from e2e.nginx_server import NGINX, NginxServer, free_ports, nginx_release


@pytest.fixture
def start(public_directory: Path) -> Iterator[Callable[[Path], NginxServer]]:
    """Starts an nginx that runs the given binary."""
    servers: list[NginxServer] = []

    def start_binary(binary: Path) -> NginxServer:
        address = ("127.0.0.1", free_ports(1)[0])
        prefix = binary.parent / "prefix"
        prefix.mkdir()
        server = NginxServer(prefix, f"server {{ listen {address[0]}:{address[1]}; }}", command=(binary,))
        server.start([address])
        servers.append(server)
        return server

    yield start_binary
    for server in servers:
        server.stop()


@pytest.fixture
def changed(public_directory: Path, tmp_path: Path) -> Iterator[Callable[[bytes, bytes], Path]]:
    """A copy of nginx in which some bytes are others, of the same length."""
    directory = public_directory / tmp_path.name
    directory.mkdir()

    def change(old: bytes, new: bytes) -> Path:
        assert len(old) == len(new)
        raw = NGINX.read_bytes()
        assert old in raw
        binary = directory / "nginx"
        binary.write_bytes(raw.replace(old, new))
        binary.chmod(0o755)
        return binary

    yield change
    shutil.rmtree(directory)


def refusal(*arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> str:
    """What the program says when it ends with 2: one line."""
    ended = subprocess.run(
        [*prefix, PROGRAM, "run", "--exporter", "json", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("otel-nginx-ebpf: ")
    return ended.stderr.strip()


def test_a_pid_that_is_not_nginx() -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        message = refusal("--pid", str(sleeper.pid))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "/sleep is not an nginx with the http module" in message


def test_a_binary_that_nobody_runs(changed: Callable[[bytes, bytes], Path]) -> None:
    assert "no process runs it; start nginx first" in refusal("--binary", str(changed(b"nginx", b"nginx")))


def test_no_usable_probe_site(changed: Callable[[bytes, bytes], Path], start: Callable[[Path], NginxServer]) -> None:
    """A build that does not export the function that every request ends with."""
    nginx = start(changed(b"\0ngx_http_free_request\0", b"\0ngx_http_free_requesX\0"))
    message = refusal("--pid", str(nginx.pid))
    assert "no usable probe site for “request ends”: ngx_http_free_request is not exported" in message


def test_an_unknown_release(changed: Callable[[bytes, bytes], Path], start: Callable[[Path], NginxServer]) -> None:
    nginx = start(changed(f"nginx/{nginx_release()}".encode(), f"nginx/9{nginx_release()[1:]}".encode()))
    message = refusal("--pid", str(nginx.pid))
    assert f"nginx 9{nginx_release()[1:]}" in message
    assert "layout" in message


def test_another_projects_bcc(
    start: Callable[[Path], NginxServer], changed: Callable[[bytes, bytes], Path], tmp_path: Path
) -> None:
    """PyPI's package of that name has nothing to do with BPF."""
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("")
    nginx = start(changed(b"nginx", b"nginx"))
    message = refusal("--pid", str(nginx.pid), PYTHONPATH=str(tmp_path))
    assert f"the package bcc at {tmp_path}/bcc is not BCC" in message
    assert "pip uninstall bcc" in message


def test_no_bcc(start: Callable[[Path], NginxServer], changed: Callable[[bytes, bytes], Path], tmp_path: Path) -> None:
    """An empty folder stands where the distribution's package is, in a mount namespace of the program's own."""
    nginx = start(changed(b"nginx", b"nginx"))
    hide = f'mount --bind {tmp_path} /usr/lib/python3/dist-packages && exec "$@"'
    message = refusal("--pid", str(nginx.pid), prefix=("unshare", "--mount", "sh", "-c", hide, "sh"))
    assert "BCC's Python bindings are not installed" in message
    assert "apt-get install python3-bpfcc" in message


@pytest.mark.parametrize("missing", ["bpf", "perfmon", "sys_ptrace"])
def test_a_missing_capability_is_named(missing: str) -> None:
    without = f"-sys_admin,-{missing}"
    message = refusal(prefix=("setpriv", "--bounding-set", without, "--inh-caps", without))
    assert f"not permitted to trace: CAP_{missing.upper()} missing" in message


def test_a_capture_file_without_space(
    changed: Callable[[bytes, bytes], Path], start: Callable[[Path], NginxServer]
) -> None:
    nginx = start(changed(b"nginx", b"nginx"))
    command = [PROGRAM, "record", "--pid", str(nginx.pid), "-o", "/dev/full"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "cannot write to the capture file: No space left on device; stopping" in ended.stderr

"""Runs servers of the protocols that nginx speaks to applications and caches: uwsgi, FastCGI, SCGI, memcached."""

import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO

from e2e.nginx_server import wait_until

UNPRIVILEGED = "nobody"


class UwsgiServer:
    """Runs uwsgi with gateway_app.py. Each protocol has a port; `addresses` has them by protocol."""

    def __init__(self, directory: Path) -> None:
        shutil.copy(Path(__file__).with_name("gateway_app.py"), directory)
        self._log = directory / "uwsgi.log"
        protocols = ("uwsgi", "fastcgi", "scgi")
        sockets = [argument for protocol in protocols for argument in (f"--{protocol}-socket", "127.0.0.1:0")]
        command = ["uwsgi", "--plugin", "python3", "--wsgi", "gateway_app", "--need-app", "--threads", "8", *sockets]
        with self._log.open("wb") as log:
            self._process = _start([*command, "--uid", UNPRIVILEGED, "--die-on-term"], log, directory)
        wait_until(lambda: "spawned uWSGI worker" in self._log.read_text(), "uwsgi to start")
        addresses = re.findall(r"bound to TCP address (\S+) ", self._log.read_text())
        self.addresses = dict(zip(protocols, addresses, strict=True))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Fcgiwrap:
    """Runs fcgiwrap, which keeps FastCGI connections open (uwsgi does not), with a script for each request."""

    def __init__(self, directory: Path) -> None:
        own = _own_directory(directory, "fcgiwrap")
        path = own / "socket"
        self.script = own / "answer"
        self.script.write_text("#!/bin/sh\nsleep 0.02\nprintf 'Content-Type: text/plain\\r\\n\\r\\nxxxxx'\n")
        self.script.chmod(0o755)
        with (own / "log").open("wb") as log:
            command = ["fcgiwrap", "-s", f"unix:{path}"]
            self._process = _start(command, log, own, user=UNPRIVILEGED)
        self.address = f"unix:{path}"
        wait_until(path.exists, "fcgiwrap to listen")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Memcached:
    def __init__(self, directory: Path) -> None:
        own = self._own = _own_directory(directory, "memcached")
        path = own / "socket"
        with (own / "log").open("wb") as log:
            self._process = _start(["memcached", "-s", str(path), "-a", "0666", "-u", UNPRIVILEGED], log, own)
        self.address = f"unix:{path}"
        self._client = socket.socket(socket.AF_UNIX)
        wait_until(lambda: self._client.connect_ex(str(path)) == 0, "memcached to listen")

    def store(self, key: str, value: bytes) -> None:
        self._client.sendall(f"set {key} 0 0 {len(value)}\r\n".encode() + value + b"\r\n")
        assert self._client.recv(100) == b"STORED\r\n"

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._own)


def _own_directory(directory: Path, name: str) -> Path:
    """Make a directory where an unprivileged server can create its socket."""
    own = directory / name
    own.mkdir()
    shutil.chown(own, UNPRIVILEGED)
    return own


def _start(command: list[str], log: IO[bytes], directory: Path, user: str | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, user=user
    )

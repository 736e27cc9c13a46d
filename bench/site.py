"""Starts the nginx under load: one worker with a processor of its own, and an upstream without probes."""

import re
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from e2e.nginx_server import NGINX, NginxServer, free_ports
from e2e.upstreams import make_certificate

from bench.machine import NGINX_CPU, cpu_ns

_BODY = b"x" * 120 + b"\n"

_UPSTREAM = "server {{ listen 127.0.0.1:{port}; keepalive_requests 100000000; return 200 {body}; }}"

_HTTP = """
{directives}
keepalive_requests 100000000;
keepalive_timeout 600;
upstream application {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000; }}
upstream retried {{ server 127.0.0.1:{dead} weight=100 max_fails=0; server 127.0.0.1:{upstream}; }}
ssl_certificate {directory}/certificate.pem;
ssl_certificate_key {directory}/key.pem;
server {{
    listen 127.0.0.1:{plain};
    listen 127.0.0.1:{tls} ssl http2;
    root {directory};
    location /static/ {{ alias {directory}/html/; }}
    location /proxied/ {{ proxy_pass http://application; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    location /closing/ {{ proxy_pass http://127.0.0.1:{upstream}; }}
    location /retried/ {{ proxy_pass http://retried; }}
    location /missing/ {{ return 404; }}
    location /broken/ {{ proxy_pass http://127.0.0.1:{dead}; }}
    location = /served {{ stub_status; }}
}}
"""


class Module(NamedTuple):
    """A dynamic module of nginx, and what nginx.conf has in `http` for it."""

    path: Path
    directives: str


class ModuleError(Exception):
    """nginx does not take the module or its directives; the text is nginx's."""


class Counts(NamedTuple):
    """What a worker has done since its start."""

    requests: int
    cpu_ns: int
    """Processor time of all its threads."""
    main_thread_cpu_ns: int
    """Processor time of the thread that serves requests."""


class Scenario(NamedTuple):
    """A kind of request. A turn makes `requests` requests, which takes about a second."""

    path: str
    http2: bool
    tls: bool
    requests: int
    answer: str = "2xx"


BROKEN = Scenario("/broken/page", False, False, 20_000, "5xx")
"""The peer refuses the connection, and nginx logs that."""

SCENARIOS = {
    "static": Scenario("/static/page.html", False, False, 60_000),
    "proxied": Scenario("/proxied/page", False, False, 40_000),
    "proxied-closing": Scenario("/closing/page", False, False, 20_000),
    "static-tls": Scenario("/static/page.html", False, True, 50_000),
    "static-h2": Scenario("/static/page.html", True, True, 50_000),
    "proxied-h2": Scenario("/proxied/page", True, True, 40_000),
}


NAMED_SCENARIOS = {**SCENARIOS, "broken": BROKEN}
"""The above, and those that are only measured if somebody names them."""


class Site:
    """The nginx under load and its upstream. All users must be able to read and search `directory`.

    Raises ModuleError if nginx does not start with the module.
    """

    def __init__(self, directory: Path, module: Module | None = None) -> None:
        self.plain_port, self.tls_port, upstream_port, dead_port = free_ports(4)
        make_certificate(directory)
        (directory / "key.pem").chmod(0o644)
        (directory / "html").mkdir()
        (directory / "html" / "page.html").write_bytes(_BODY)
        prefixes = directory / "nginx", directory / "upstream"
        for prefix in prefixes:
            prefix.mkdir()
        # Copies of the binary: a uprobe belongs to a file, so it would hit every process that runs this file.
        traced, untraced = (shutil.copy(NGINX, prefix / "nginx") for prefix in prefixes)
        self._upstream = NginxServer(
            prefixes[1], _UPSTREAM.format(port=upstream_port, body=_BODY.decode().strip()), command=[untraced]
        )
        http = _HTTP.format(
            directory=directory,
            plain=self.plain_port,
            tls=self.tls_port,
            upstream=upstream_port,
            dead=dead_port,
            directives=module.directives if module else "",
        )
        main = f"worker_cpu_affinity {1 << NGINX_CPU:b};"
        if module:
            main = f"load_module {module.path.resolve()};\n{main}"
        self.nginx = NginxServer(prefixes[0], http, main=main, command=[traced])
        if module:
            _examine(traced, prefixes[0])
        self._upstream.start([("127.0.0.1", upstream_port)])
        self.nginx.start([("127.0.0.1", self.plain_port)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nginx.stop()
        self._upstream.stop()

    @property
    def worker(self) -> int:
        return self.nginx.worker_pids()[0]

    def url(self, scenario: Scenario) -> str:
        scheme, port = ("https", self.tls_port) if scenario.tls else ("http", self.plain_port)
        return f"{scheme}://127.0.0.1:{port}{scenario.path}"

    def counts(self) -> Counts:
        """Return the requests that the worker has served, by nginx's own count, and its processor time.

        The count includes the request that asks for it. So the difference between two calls is exact: it includes the
        second call's request and its time.
        """
        with socket.create_connection(("127.0.0.1", self.plain_port)) as connection:
            connection.sendall(b"GET /served HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        # “server accepts handled requests\n A H R \n”
        requests, worker = int(answer.partition("requests\n")[2].split()[2]), self.worker
        return Counts(requests, cpu_ns(worker), cpu_ns(worker, str(worker)))


def _examine(nginx: Path | str, prefix: Path) -> None:
    command: list[Path | str] = [nginx, "-p", prefix, "-c", "nginx.conf", "-t"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", done.stderr)
        raise ModuleError(said[1] if said else f"nginx -t ended with {done.returncode}")

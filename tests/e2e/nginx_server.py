"""Runs a private nginx with its own prefix, ports and logs. Workers run as nginx's unprivileged default user."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from e2e.http1_client import Address, family_of

# A directory of tests/matrix/builds.py, to use its nginx instead of the machine's.
BUILD = os.environ.get("OTEL_NGINX_EBPF_TEST_NGINX")
NGINX = Path(BUILD, "nginx") if BUILD else Path("/usr/sbin/nginx")
START = Path(BUILD, "start") if BUILD else NGINX

PATIENCE = float(os.environ.get("OTEL_NGINX_EBPF_TEST_PATIENCE", "1"))
"""How many times longer everything may take than on a real machine. An emulated machine (tests/vm) needs this."""

# nginx logs every variable as a JSON string. An empty string means that nginx has no value.
LOG_VARIABLES = """
    msec request_time status bytes_sent request_length connection connection_requests pid
    request request_method request_uri uri server_protocol request_completion
    remote_addr remote_port http_user_agent host ssl_protocol
    upstream_addr upstream_status upstream_connect_time upstream_header_time upstream_response_time
    upstream_bytes_sent upstream_bytes_received upstream_cache_status
    limit_req_status limit_conn_status
    http_traceparent http_b3 http_x_b3_traceid http_forwarded http_x_forwarded_proto
"""

LogLine = dict[str, str]


@functools.cache
def nginx_version(start: Path = START) -> tuple[int, ...]:
    """Return nginx's version. Empty without nginx, because pytest also collects tests that it will skip."""
    told = re.search(r"(?:nginx|openresty)/([0-9.]+)", nginx_build(start))
    return tuple(int(number) for number in told[1].split(".")) if told else ()


def nginx_release() -> str:
    """Return nginx's release, such as `1.22.1`."""
    return ".".join(map(str, nginx_version()))


@functools.cache
def nginx_build(start: Path = START) -> str:
    """Return what `nginx -V` says: version and configure arguments. Empty without nginx."""
    return subprocess.run([start, "-V"], capture_output=True, text=True, check=True).stderr if start.exists() else ""


@functools.cache
def _unknown_variables() -> set[str]:
    unknown = {"upstream_cache_status"} if "--without-http-cache" in nginx_build() else set()
    return unknown | ({"limit_req_status", "limit_conn_status"} if nginx_version() < (1, 17, 6) else set())


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Poll `condition` until it is true. Raise TimeoutError, with `what`, after `seconds` times PATIENCE."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


_given_ports: set[int] = set()


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return TCP ports that were free a moment ago, and that no earlier call returned."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            sockets.append(socket.socket(family))
            sockets[-1].bind((host, 0))
            port = sockets[-1].getsockname()[1]
            # The kernel may return the port again, as nobody listens on it yet. Two servers would then be one.
            if port not in _given_ports:
                _given_ports.add(port)
                ports.append(port)
    finally:
        for each in sockets:
            each.close()
    return ports


def parse_log_line(line: bytes) -> LogLine:
    """Parse an access log line. Bytes that are not UTF-8 become `\\xNN`, as the program writes them."""
    # nginx's escape=json does not change bytes above 0x7f, so a line may not be UTF-8.
    fields: dict[str, str] = json.loads(line.decode("utf-8", "surrogateescape"))
    return {
        name: value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for name, value in fields.items()
    }


class AccessLog:
    """An access log that grows while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0
        self.lines: list[LogLine] = []

    def poll(self) -> list[LogLine]:
        """Return all lines so far. An incomplete last line waits for the next call."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole) + len(newline)
            self.lines += [parse_log_line(line) for line in whole.splitlines() if newline]
        return self.lines


class NginxServer:
    """Runs nginx under `prefix`. All users must be able to read and search `prefix`.

    `http` is the text inside `http {}`; each server in it has `access_log logs/NAME.log json;`. `main` is the text at
    the top of the file. `command` starts nginx; nginx's options follow it. `connections` is for each worker.
    """

    def __init__(
        self,
        prefix: Path,
        http: str,
        workers: int = 1,
        main: str = "",
        command: Sequence[str | Path] = (START,),
        connections: int = 1024,
    ) -> None:
        self.prefix = prefix
        self._command = command
        self._workers = workers
        self._connections = connections
        self.error_log = prefix / "error.log"
        (prefix / "logs").mkdir()
        (prefix / "temp").mkdir()
        self.configure(http, main)

    def configure(self, http: str, main: str) -> None:
        """Write nginx.conf, over an earlier one."""
        prefix, workers, connections = self.prefix, self._workers, self._connections
        log_format = json.dumps(
            {name: f"${name}" for name in LOG_VARIABLES.split() if name not in _unknown_variables()}
        )
        temp_paths = "\n".join(
            f"    {name}_temp_path {prefix}/temp/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (prefix / "nginx.conf").write_text(
            f"""\
{main}
daemon off;
worker_processes {workers};
pid {prefix}/nginx.pid;
error_log {self.error_log} notice;
worker_shutdown_timeout 5s;
worker_rlimit_nofile {connections + 64};
events {{ worker_connections {connections}; }}
http {{
    log_format json escape=json '{log_format}';
    access_log off;
{temp_paths}
{http}
}}
"""
        )

    def lacks(self) -> str:
        """Return what nginx.conf needs and this build lacks, in nginx's words. Empty if the build lacks nothing."""
        done = subprocess.run(
            [*self._command, "-p", self.prefix, "-c", "nginx.conf", "-t"], capture_output=True, text=True, check=False
        )
        found = re.search(
            r'unknown directive "\w+"|"\w+" directive is not allowed here|using regex .* requires PCRE'
            r'|the ".*" parameter requires \w+'
            r"|could not build map_hash",  # without PCRE a regular expression is text, and too long
            done.stderr,
        )
        return found[0] if found else ""

    def start(self, addresses: Iterable[Address]) -> None:
        """Start the master; wait until every address accepts connections and a worker can answer."""
        with (self.prefix / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                [*self._command, "-p", self.prefix, "-c", "nginx.conf"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        for address in addresses:
            wait_until(lambda address=address: self._serves(address), f"nginx to serve {address}")  # type: ignore[misc]

    def _serves(self, address: Address) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"nginx did not start: {(self.prefix / 'output.log').read_text()}")
        with socket.socket(family_of(address)) as client:
            return client.connect_ex(address) == 0 and bool(self.worker_pids())

    @property
    def pid(self) -> int:
        """The master's process id."""
        return self._process.pid

    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def off_processor_ms(self) -> float:
        """Return how long all workers waited for a processor, in milliseconds: /proc/PID/schedstat, second field."""
        waited_ns = 0
        for pid in self.worker_pids():
            with suppress(OSError):  # the worker has ended
                waited_ns += int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
        return waited_ns / 1e6

    def reload(self) -> None:
        """Ask the master to replace its workers; wait for the new workers."""
        before = set(self.worker_pids())
        os.kill(self.pid, signal.SIGHUP)
        wait_until(lambda: bool(set(self.worker_pids()) - before), "new workers after the reload")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10 * PATIENCE)
        except subprocess.TimeoutExpired:
            for pid in self.worker_pids():
                os.kill(pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(10 * PATIENCE)
            raise

    def problems(self) -> list[str]:
        """Return error log lines about a fault in nginx itself."""
        text = self.error_log.read_text(errors="backslashreplace") if self.error_log.exists() else ""
        return [line for line in text.splitlines() if re.search(r"\[(alert|emerg|crit)\]", line)]

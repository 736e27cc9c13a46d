"""Traces a private nginx and an upstream on loopback while they answer a few requests. `make demo` runs it.

Needs root, Debian's nginx and this package. Everything runs in a temporary directory, on ports that the operating
system chooses, and ends with the demo. If OTEL_EXPORTER_OTLP_ENDPOINT is set, the traces also go there.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console

PROGRAM = Path(sys.executable).with_name("otel-nginx-ebpf")
DEADLINE_S = 30.0

NGINX_CONF = """
daemon off;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/client_body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;

    upstream application {{ server 127.0.0.1:{upstream_port}; keepalive 4; }}
    upstream one_peer_dead {{ server 127.0.0.1:{dead_port} weight=100 max_fails=0; server 127.0.0.1:{upstream_port}; }}
    upstream all_peers_dead {{ server 127.0.0.1:{dead_port}; }}

    server {{
        listen 127.0.0.1:{port};
        server_name demo;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        location / {{ root {directory}/html; }}
        location /api/ {{ proxy_pass http://application; }}
        location /retried/ {{ proxy_pass http://one_peer_dead; }}
        location /broken/ {{ proxy_pass http://all_peers_dead; }}
    }}
}}
"""


class Application(BaseHTTPRequestHandler):
    """Answers as the upstream: `/slow` after 300 ms, a POST after its body."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # One write for header and body: a second one would wait for nginx's delayed acknowledgement.

    def do_GET(self) -> None:
        if "/slow" in self.path:
            time.sleep(0.3)
        self._answer(b'{"users": []}\n')

    def do_POST(self) -> None:
        received = len(self.rfile.read(int(self.headers["content-length"])))
        self._answer(f'{{"received": {received}}}\n'.encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"demo: waited {DEADLINE_S:.0f} s for {what}")
        time.sleep(0.01)


@contextmanager
def application() -> Iterator[int]:
    """Start the upstream; yield its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Application) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def ended(process: "subprocess.Popen[str]", by: signal.Signals) -> Iterator[None]:
    """End the process when the block ends, also after an error."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(by)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def nginx(upstream_port: int) -> Iterator[tuple[int, int]]:
    """Start nginx; yield its port and the pid of its master."""
    with (
        tempfile.TemporaryDirectory(prefix="otel-nginx-demo-") as name,
        socket.socket() as dead,
        socket.socket() as free,
    ):
        directory = Path(name)
        directory.chmod(0o755)  # The workers are not root.
        (directory / "html").mkdir()
        (directory / "html" / "index.html").write_text("<h1>It is traced.</h1>\n")
        dead.bind(("127.0.0.1", 0))  # Bound without listening: connections are refused.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ports = {"port": port, "upstream_port": upstream_port, "dead_port": dead.getsockname()[1]}
        (directory / "nginx.conf").write_text(NGINX_CONF.format(directory=directory, **ports))
        process = subprocess.Popen(
            ["/usr/sbin/nginx", "-p", directory, "-e", directory / "error.log", "-c", "nginx.conf"], text=True
        )

        def listens() -> bool:
            if process.poll() is not None:
                sys.exit(f"demo: nginx did not start: {(directory / 'error.log').read_text()}")
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        with ended(process, signal.SIGTERM):
            wait_until(listens, "nginx to listen")
            yield port, process.pid


class Agent:
    """Runs `otel-nginx-ebpf run --exporter console` and reads its waterfalls one by one."""

    def __init__(self, nginx_pid: int, console: Console) -> None:
        command: list[str | Path] = [PROGRAM, "run", "--pid", str(nginx_pid), "--exporter", "console"]
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ:
            command += ["--exporter", "otlp"]
        coloured = console.is_terminal and not console.no_color
        command += ["--color", "always" if coloured else "never"]
        console.print("$ " + " ".join(["otel-nginx-ebpf", *map(str, command[1:])]), style="bold", markup=False)
        self.process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": str(console.width), "PYTHONIOENCODING": "utf-8"},
        )
        self._waterfalls: queue.Queue[str] = queue.Queue()
        self._ready = threading.Event()
        for read in (self._read_waterfalls, self._read_messages):
            threading.Thread(target=read, daemon=True).start()

    def _read_waterfalls(self) -> None:
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            if line.strip():
                lines.append(line)
            else:
                self._waterfalls.put("".join(lines))
                lines.clear()

    def _read_messages(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("ready"):
                self._ready.set()

    def wait_until_ready(self) -> None:
        wait_until(lambda: self._ready.is_set() or self.process.poll() is not None, "the probes to be live")
        if not self._ready.is_set():
            sys.exit(f"demo: the program ended with {self.process.returncode}")

    def waterfall(self) -> str:
        try:
            return self._waterfalls.get(timeout=DEADLINE_S)
        except queue.Empty:
            sys.exit("demo: no trace arrived")


def get(port: int, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    connection.request("GET", path)
    connection.getresponse().read()
    connection.close()


def upload_slowly(port: int) -> None:
    """Upload as a client with a slow connection: the body arrives in four pieces within 200 ms."""
    piece = b"x" * 16_384
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    connection.putrequest("POST", "/api/upload")
    connection.putheader("Content-Length", str(4 * len(piece)))
    connection.endheaders()
    for _ in range(4):
        time.sleep(0.05)
        connection.send(piece)
    connection.getresponse().read()
    connection.close()


REQUESTS: list[tuple[str, Callable[[int], None]]] = [
    ("A static file", lambda port: get(port, "/index.html")),
    ("Proxied to an application", lambda port: get(port, "/api/users?page=1")),
    ("Proxied to a slow application: its first byte takes 300 ms", lambda port: get(port, "/api/slow")),
    ("The first peer is dead, so nginx tries the next", lambda port: get(port, "/retried/users")),
    ("All peers are dead: 502", lambda port: get(port, "/broken/users")),
    ("A slow client uploads for 200 ms, and nginx buffers", upload_slowly),
]


def main() -> None:
    console = Console(highlight=False)
    with application() as upstream_port, nginx(upstream_port) as (port, pid):
        agent = Agent(pid, console)
        with ended(agent.process, signal.SIGINT):
            agent.wait_until_ready()
            for number, (title, request) in enumerate(REQUESTS, 1):
                console.print(f"\n{number}. {title}", style="bold underline")
                request(port)
                print(agent.waterfall(), end="", flush=True)
            console.print()
    if endpoint := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        console.print(f"The same traces went to {endpoint}.", markup=False)
    sys.exit(agent.process.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

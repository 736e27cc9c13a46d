"""Builds that differ from their release: another product, or a --with-compat build that lacks an option."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matrix.builds import FORKS, NO_CACHE, NO_PCRE, BuildError, CompiledBuild, obtain

from e2e.agent_process import PROGRAM, AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import BUILD, NGINX, AccessLog, NginxServer, free_ports, nginx_release, wait_until

pytestmark = pytest.mark.skipif(BUILD is not None, reason="runs builds of its own")

ANGIE = next(fork for fork in FORKS if fork.name == "angie")


class Nginx:
    """A server with a page of its own, and pages of an upstream."""

    def __init__(self, directory: Path, binary: Path, upstream: str) -> None:
        (port,) = free_ports(1)
        self.address = ("127.0.0.1", port)
        http = f"""
            server {{
                listen 127.0.0.1:{port};
                access_log logs/all.log json;
                location /plain {{ empty_gif; }}
                location /proxied {{ proxy_pass http://{upstream}/?status=201&bytes=500; }}
            }}"""
        (directory / "prefix").mkdir()
        self.server = NginxServer(directory / "prefix", http, workers=2, command=(binary,))
        # A build without the HTTP cache does not know this variable.
        config = directory / "prefix/nginx.conf"
        config.write_text(config.read_text().replace('"upstream_cache_status": "$upstream_cache_status", ', ""))
        self.server.start([self.address])
        self.log = AccessLog(directory / "prefix/logs/all.log")

    def post(self, target: str, body: bytes) -> int:
        with Http1Connection(self.address) as connection:
            return connection.request(target, method="POST", body=body).status


@pytest.fixture
def directory(public_directory: Path, tmp_path: Path) -> Iterator[Path]:
    path = public_directory / tmp_path.name
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Callable[[Path], Nginx]]:
    started: list[Nginx] = []

    def start_nginx(binary: Path) -> Nginx:
        started.append(Nginx(directory, binary, upstream_addresses["ipv4"]))
        return started[-1]

    yield start_nginx
    for each in started:
        each.server.stop()
        assert each.server.problems() == []


def built(build: CompiledBuild) -> Path:
    try:
        return (obtain(build) / "nginx").resolve()
    except BuildError as error:
        pytest.skip(f"{error}; with a Debian mirror this test compiles nginx once")


def copied(whole: Path, directory: Path, *, strip: bool = False) -> Path:
    """Where every user may read it."""
    target = directory / whole.name
    if strip:
        subprocess.run(["strip", "--strip-all", "-o", target, whole], check=True)
    else:
        shutil.copy(whole, target)
    return target


def check_traces(nginx: Nginx, agent: AgentProcess) -> None:
    """Two requests with bodies of different lengths, and what nginx logs of them."""
    assert nginx.post("/plain", b"x" * 1000) == 405
    assert nginx.post("/proxied", b"x" * 30_000) == 201
    wait_until(lambda: len(agent.poll()) == 2, "the traces of two requests")
    agent.stop()
    logged = nginx.log.poll()
    assert [line["request_uri"] for line in logged] == ["/plain", "/proxied"]
    traces = {trace.server.attributes["url.path"]: trace for trace in agent.traces}
    for line in logged:
        trace = traces[line["request_uri"]]
        attributes = trace.server.attributes
        assert attributes["http.request.size"] == int(line["request_length"])
        assert attributes["http.response.size"] == int(line["bytes_sent"])
        assert attributes["http.response.status_code"] == int(line["status"])
        assert attributes["http.request.method"] == "POST"
    (exchange,) = traces["/proxied"].named("upstream exchange")
    assert exchange.attributes["http.response.status_code"] == 201
    assert exchange.attributes["http.request.size"] == int(logged[1]["upstream_bytes_sent"])
    assert exchange.attributes["http.response.size"] == int(logged[1]["upstream_bytes_received"])


@pytest.mark.parametrize(("build", "lacks"), [(NO_PCRE, "PCRE"), (NO_CACHE, "the HTTP cache")], ids=["pcre", "cache"])
def test_a_stripped_build_without_an_option_has_true_sizes(
    build: CompiledBuild, lacks: str, directory: Path, start: Callable[[Path], Nginx]
) -> None:
    nginx = start(copied(built(build), directory, strip=True))
    agent = AgentProcess(nginx.server.pid, directory)
    try:
        assert f" without {lacks}\n" in agent.stderr()
        check_traces(nginx, agent)
    finally:
        agent.kill()


def test_angie_is_traced_by_its_debug_information(directory: Path, start: Callable[[Path], Nginx]) -> None:
    nginx = start(copied(built(ANGIE), directory))
    agent = AgentProcess(nginx.server.pid, directory)
    try:
        assert f"ready: Angie 1.12.1 (pid {nginx.server.pid}), 2 workers, " in agent.stderr()
        check_traces(nginx, agent)
    finally:
        agent.kill()
    resource = agent.traces[0].resource
    assert (resource["service.version"], resource["process.executable.name"]) == ("Angie/1.12.1", "angie")
    told = json.loads(
        subprocess.run([PROGRAM, "doctor", "--json", "--pid", str(nginx.server.pid)], stdout=subprocess.PIPE).stdout
    )
    (report,) = told["nginx"]
    assert (report["product"], report["version"], report["problems"]) == ("Angie", "1.12.1", [])
    assert report["flags"]["--with-compat"]


def tengine(directory: Path) -> Path:
    """Debian's stripped nginx with the name that Tengine's Server header has."""
    raw = NGINX.read_bytes()
    own = f"Server: nginx/{nginx_release()}\r\n".encode()
    assert own in raw
    binary = directory / "nginx"
    binary.write_bytes(raw.replace(own, b"Server: Tengine/3.2\r\n\0"))
    binary.chmod(0o755)
    return binary


def test_a_stripped_fork_is_refused_before_anything_is_attached(
    directory: Path, start: Callable[[Path], Nginx]
) -> None:
    nginx = start(tengine(directory))
    pid = str(nginx.server.pid)
    ended = subprocess.run([PROGRAM, "run", "--pid", pid], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "ready" not in ended.stderr
    reason = f"the struct layout of Tengine 3.2 ({directory / 'nginx'}) is not known and may differ from nginx's"
    assert reason in ended.stderr
    examined = subprocess.run([PROGRAM, "doctor", "--json", "--pid", pid], capture_output=True, text=True, timeout=60)
    assert examined.returncode == 1
    (report,) = json.loads(examined.stdout)["nginx"]
    assert (report["product"], report["version"], report["layout"]) == ("Tengine", "3.2", None)
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith(reason)

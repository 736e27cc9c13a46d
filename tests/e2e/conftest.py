"""Fixtures of the end-to-end tests: upstreams for the session; nginx and the agent for a module."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import EMPTY, PROGRAM, AgentProcess
from e2e.nginx_server import NGINX
from e2e.private_nginx import PrivateNginx, StartAgent
from e2e.scenario import BEGINNINGS, Scenario, peers_that_fail
from e2e.stage import Site, Stage
from e2e.terminal import Terminal
from e2e.upstreams import UpstreamProcess, make_certificate

FORCE = "run them with `sudo make test` (Debian 12; sets everything up)"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "nginx(server, http, listen, main): configuration of the scenario's own server {}, text beside it"
        ", its `listen` directives if not the default one, and text at the top of nginx.conf"
        "; @NAME@ stands for what scenario.py lists",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "beginnings" in metafunc.fixturenames and getattr(metafunc.module, "BOTH_BEGINNINGS", False):
        metafunc.parametrize("beginnings", BEGINNINGS, indirect=True, scope="module")


def _beginnings_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("beginnings") if callspec else None


@pytest.fixture(scope="session", autouse=True)
def _requirements() -> None:
    missing = {
        "root": os.geteuid() == 0,
        "nginx": NGINX.exists(),
        "BCC (Debian: python3-bpfcc)": Path("/usr/lib/python3/dist-packages/bcc").is_dir(),
        "openssl": shutil.which("openssl") is not None,
        "the kernel's tracefs": Path("/sys/kernel/tracing").is_dir(),
        "otel-nginx-ebpf in the virtual environment": PROGRAM.exists(),
    }
    if absent := [what for what, there in missing.items() if not there]:
        pytest.skip(f"end-to-end tests need {', '.join(absent)}; {FORCE}")


@pytest.fixture(scope="session")
def public_directory(_requirements: None) -> Iterator[Path]:
    """Readable for nginx's unprivileged workers, unlike pytest's tmp_path, and short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="otel-nginx-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def upstream_addresses(public_directory: Path) -> Iterator[dict[str, str]]:
    """The live upstream's addresses by kind, and those of peers that refuse or ignore connections."""
    make_certificate(public_directory)
    upstream = UpstreamProcess(public_directory)
    sockets: list[socket.socket] = []
    try:
        yield {**upstream.addresses, **peers_that_fail(sockets)}
    finally:
        upstream.stop()
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def beginnings(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "marked")


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, public_directory: Path, upstream_addresses: dict[str, str], beginnings: str
) -> Iterator[Site]:
    """One nginx with a server for each selected scenario of the module, and one agent attached to it.

    WORKERS, CONNECTIONS (a worker's), SITE_HTTP (text inside `http {}`), SITE_MAIN (text ahead of it) and
    AGENT_ENVIRONMENT are the module's, if it has them. At its end the agent's whole output is compared with all access
    logs.
    """
    module = request.node
    items = [item for item in request.session.items if item.getparent(pytest.Module) is module]
    scenarios = [Scenario.of(item) for item in items if _beginnings_of(item) in (None, beginnings)]
    prefix = public_directory / module.path.stem
    site = Site(
        prefix,
        [each for each in scenarios if each],
        upstream_addresses,
        workers=getattr(module.obj, "WORKERS", 1),
        http=getattr(module.obj, "SITE_HTTP", ""),
        main=getattr(module.obj, "SITE_MAIN", ""),
        environment={**getattr(module.obj, "AGENT_ENVIRONMENT", EMPTY), **BEGINNINGS[beginnings]},
        connections=getattr(module.obj, "CONNECTIONS", 1024),
    )
    with site:
        yield site
        site.finish()


@pytest.fixture
def stage(request: pytest.FixtureRequest, site: Site) -> Iterator[Stage]:
    """The scenario's own server."""
    stage = site.stage(request.node.name)
    yield stage
    stage.close()


@pytest.fixture
def directory(public_directory: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = public_directory / re.sub(r"\W+", "_", request.node.name)[:40]
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make_nginx(directory: Path) -> Iterator["type[PrivateNginx]"]:
    made: list[PrivateNginx] = []

    def make(name: str, binary: Path | None = None, command: tuple[str, ...] = (), main: str = "") -> PrivateNginx:
        if binary is None:
            binary = directory / f"{name}-bin" / "nginx"
            binary.parent.mkdir(exist_ok=True)
            shutil.copy(NGINX, binary)
        made.append(PrivateNginx(directory, name, binary, command, main))
        return made[-1]

    yield make  # type: ignore[misc]
    for each in made:
        if each.running:
            each.stop()
        assert each.server.problems() == []


@pytest.fixture
def start_agent(directory: Path) -> Iterator[StartAgent]:
    """Starts `run` with these arguments and the JSON exporter; none is left behind, whatever fails."""
    started: list[AgentProcess] = []

    def start(*arguments: str | Path, name: str = "agent") -> AgentProcess:
        (directory / name).mkdir()
        output = directory / name / "traces.jsonl"
        command = ["run", *map(str, arguments), "--exporter", "json", "--output", output]
        started.append(AgentProcess(0, directory / name, command))
        return started[-1]

    yield start
    for agent in started:
        agent.kill()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A shell in a terminal of its own."""
    found = Terminal(tmp_path)
    yield found
    found.close()

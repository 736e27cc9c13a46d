"""Fixtures of the end-to-end tests: upstreams for the session, nginx and the agent for a module."""

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

FORCE = "run them with `sudo make test`, which sets everything up on Debian 12"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "nginx(server, http, listen, main): the scenario's nginx configuration: text in its server {}, text beside it"
        ", its `listen` directives instead of the default, and text at the top of nginx.conf"
        "; scenario.py lists the words @NAME@",
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
    """Yield a directory that nginx's workers can read, unlike tmp_path, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="otel-nginx-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def upstream_addresses(public_directory: Path) -> Iterator[dict[str, str]]:
    """Yield addresses by kind: of the live upstream, and of peers that refuse or ignore connections."""
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
    """Yield an nginx with a server for each selected scenario of the module, and an agent attached to it.

    The module may define WORKERS, CONNECTIONS (of a worker), SITE_HTTP (text inside `http {}`), SITE_MAIN (text before
    it) and AGENT_ENVIRONMENT. At the end the fixture compares the agent's whole output with all access logs.
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
    """Yield the stage of the scenario, with its own server."""
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
    """Yield a function that starts `run` with arguments and the JSON exporter. Kills every agent at the end."""
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
    """Yield a shell in a terminal of its own."""
    found = Terminal(tmp_path)
    yield found
    found.close()

"""Real requests verify a layout before the program trusts it.

The same nginx claims to be another release. Its structs are then not where the program expects them.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import OPT_IN, PROGRAM, AgentProcess, Trace
from e2e.http1_client import Http1Connection
from e2e.nginx_server import NGINX, AccessLog, NginxServer, free_ports, nginx_release, wait_until
from e2e.oracle import check_facts
from e2e.stage import key_of_log, key_of_trace
from otel_nginx_ebpf.nginx import catalogue
from otel_nginx_ebpf.nginx.dwarf import is_bit_field


class Liar:
    """nginx that says it is another release."""

    def __init__(self, directory: Path, release: str) -> None:
        self.binary = directory / "nginx"
        raw = NGINX.read_bytes()
        own = f"nginx/{nginx_release()}".encode()
        assert own in raw
        self.binary.write_bytes(raw.replace(own, f"nginx/{release}".encode()))
        self.binary.chmod(0o755)
        self.address = ("127.0.0.1", free_ports(1)[0])
        prefix = directory / "prefix"
        prefix.mkdir()
        upstream = free_ports(1)[0]
        http = f"""
            server {{
                listen 127.0.0.1:{self.address[1]};
                access_log logs/all.log json;
                location / {{ return 200 ok; }}
                location /proxied {{ proxy_pass http://127.0.0.1:{upstream}; }}
            }}
            server {{ listen 127.0.0.1:{upstream}; access_log logs/all.log json; return 200 upstream; }}"""
        self.server = NginxServer(prefix, http, command=(self.binary,))
        self.server.start([self.address])
        self.log = AccessLog(prefix / "logs" / "all.log")

    def get(self, target: str) -> int:
        with Http1Connection(self.address) as connection:
            return connection.request(target).status


@pytest.fixture
def directory(public_directory: Path, tmp_path: Path) -> Iterator[Path]:
    path = public_directory / tmp_path.name
    path.mkdir()
    yield path
    shutil.rmtree(path)


def test_a_newer_patch_release_is_assumed_to_be_alike_and_found_so(directory: Path) -> None:
    branch = nginx_release().rpartition(".")[0]
    known = [release for release in catalogue.shipped().layouts if release.rpartition(".")[0] == branch]
    liar = Liar(directory, f"{branch}.9")
    agent = AgentProcess(liar.server.pid, directory)
    try:
        assert f"layout catalogue {known[-1]} (assumed)" in agent.stderr()
        assert [liar.get(target) for target in ("/one", "/proxied")] == [200, 200]
        wait_until(lambda: len(agent.poll()) == 3, "the traces of two requests and of what one of them proxied")
        agent.stop()
    finally:
        agent.kill()
        liar.server.stop()
    routes = {
        trace.server.attributes["url.path"]: trace.outline() for trace in agent.traces if "upstream" in str(trace)
    }
    assert routes["/proxied"] == ["downstream read", "upstream connect", "upstream exchange", "downstream write"]


def right_but_for_upstreams(release: str) -> bool:
    """Tell whether a release lays out ngx_http_request_s and ngx_connection_s as the installed nginx does.

    The catalogue does not have the bit-fields of every release.
    """
    mine, its = (
        {
            (struct, member): offset
            for struct in ("ngx_http_request_s", "ngx_connection_s")
            for member, offset in catalogue.shipped().layouts[each][struct].items()
            if not is_bit_field(member)
        }
        for each in (nginx_release(), release)
    )
    return mine == its


OTHER_BRANCHES = [
    release
    for release in ("1.14.2", "1.18.0", "1.20.1", "1.22.1", "1.24.0", "1.26.3", "1.28.0", "1.30.0", "1.31.4")
    if release.rpartition(".")[0] != nginx_release().rpartition(".")[0]
]


@pytest.mark.parametrize("release", OTHER_BRANCHES)
def test_a_layout_that_is_wrong_is_detached_from_and_makes_no_wrong_trace(directory: Path, release: str) -> None:
    liar = Liar(directory, release)
    output = directory / "traces.jsonl"
    agent = subprocess.Popen(
        [PROGRAM, "run", "--pid", str(liar.server.pid), "--exporter", "json", "--output", output],
        env={**os.environ, **OPT_IN},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert agent.stderr is not None
    try:
        ready = agent.stderr.readline()
        while not ready.startswith("ready"):
            ready = agent.stderr.readline()
        assert f"nginx {release}" in ready
        for _ in range(20):
            assert liar.get("/proxied") == 200
        _, message = "", agent.communicate(timeout=20)[1]
        assert agent.returncode == 2, message
        assert "does not look in memory as its layout" in message
        assert "detached" in message
        assert liar.get("/") == 200
    finally:
        agent.kill()
        agent.wait()
        liar.server.stop()
    traces = [Trace.parse(line) for line in output.read_bytes().splitlines()]
    assert traces == [] or right_but_for_upstreams(release)
    # What the upstream answered needs no upstream's structs. Of what asked it there is no trace.
    lines = {key_of_log(line): line for line in liar.log.poll()}
    for trace in traces:
        assert "nginx.upstream.attempts" not in trace.server.attributes
        assert check_facts(trace, lines[key_of_trace(trace)]) == []
    assert liar.server.problems() == []

"""A function that has a symbol and a probe but is never called, as if a compiler had inlined it: noticed and replaced.

The test uses a copy of nginx whose symbol was changed. The symbol leads to another function, which is never called.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from e2e.agent_process import AgentProcess
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import NGINX, NginxServer, free_ports, nginx_release, wait_until

INLINED = "ngx_http_v2_send_output_queue"
NEVER_CALLED = "ngx_hextoi"


def with_symbol_moved(symbol: str, target: str) -> bytes:
    raw = bytearray(NGINX.read_bytes())
    with NGINX.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        entries = {entry.name: (index, entry["st_value"]) for index, entry in enumerate(table.iter_symbols())}
        # Elf64_Sym.st_value lies 8 bytes into an entry.
        at = table["sh_offset"] + entries[symbol][0] * table["sh_entsize"] + 8
    assert int.from_bytes(raw[at : at + 8], "little") == entries[symbol][1]
    raw[at : at + 8] = entries[target][1].to_bytes(8, "little")
    return bytes(raw)


@pytest.fixture
def nginx(public_directory: Path, tmp_path: Path) -> Iterator[tuple[NginxServer, tuple[str, int]]]:
    directory = public_directory / tmp_path.name
    (directory / "prefix").mkdir(parents=True)
    binary = directory / "nginx"
    binary.write_bytes(with_symbol_moved(INLINED, NEVER_CALLED))
    binary.chmod(0o755)
    address = ("127.0.0.1", free_ports(1)[0])
    http = f"server {{ listen 127.0.0.1:{address[1]} http2; location / {{ return 200 ok; }} }}"
    server = NginxServer(directory / "prefix", http, command=(binary,))
    server.start([address])
    yield server, address
    server.stop()
    shutil.rmtree(directory)


def test_the_next_candidate_takes_over(nginx: tuple[NginxServer, tuple[str, int]], tmp_path: Path) -> None:
    server, address = nginx
    agent = AgentProcess(server.pid, tmp_path)
    connection = Http2Connection(address, tls=False)
    connection.exchange([Http2Request(f"/silent/{index}") for index in range(25)])
    wait_until(lambda: len(agent.poll()) == 25, "25 traces")
    assert {tuple(trace.outline()) for trace in agent.traces} == {("downstream read",)}

    wait_until(lambda: agent.stderr().count("ready: nginx") == 2, "probes on the next candidate", 20)
    assert f"{INLINED} is never called in nginx {nginx_release()}" in agent.stderr()
    assert "ngx_http_send_header+" in agent.stderr()
    connection.exchange([Http2Request(f"/heard/{index}") for index in range(25)])
    wait_until(lambda: len(agent.poll()) == 50, "50 traces")
    connection.close()
    agent.stop()
    heard = [trace for trace in agent.traces if trace.server.attributes["url.path"].startswith("/heard")]
    assert {tuple(trace.outline()) for trace in heard} == {("downstream read", "downstream write")}

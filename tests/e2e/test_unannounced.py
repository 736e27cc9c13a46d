"""nginx that behaves like Angie: it reuses an upstream connection without asking for the connection's error first.

A preloaded library answers getsockopt(SO_ERROR) without a system call.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.agent_process import AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import START, AccessLog, NginxServer, free_ports, wait_until
from e2e.oracle import check_facts
from e2e.stage import key_of_log, key_of_trace

LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/socket.h>
int getsockopt(int fd, int level, int name, void *value, socklen_t *bytes)
{
    static int (*real)(int, int, int, void *, socklen_t *);
    if (level == SOL_SOCKET && name == SO_ERROR) {
        *(int *)value = 0;
        return 0;
    }
    if (!real)
        real = (int (*)(int, int, int, void *, socklen_t *))dlsym(RTLD_NEXT, "getsockopt");
    return real(fd, level, name, value, bytes);
}
"""

HTTP = """
    upstream kept {{ server {upstream}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port};
        access_log logs/access.log json;
        proxy_http_version 1.1; proxy_set_header Connection "";
        location / {{ proxy_pass http://kept; }}
        location /page {{
            ssi on; default_type text/html;
            return 200 '<!--# include virtual="/one" --><!--# include virtual="/two" -->';
        }}
    }}
"""


@pytest.fixture
def nginx(
    public_directory: Path, tmp_path: Path, upstream_addresses: dict[str, str]
) -> Iterator[tuple[NginxServer, tuple[str, int]]]:
    directory = public_directory / tmp_path.name
    (directory / "prefix").mkdir(parents=True)
    library = directory / "unannounced.so"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=LIBRARY, text=True, check=True)
    address = ("127.0.0.1", free_ports(1)[0])
    http = HTTP.format(upstream=upstream_addresses["ipv4"], port=address[1])
    server = NginxServer(directory / "prefix", http, command=("env", f"LD_PRELOAD={library}", START))
    server.start([address])
    yield server, address
    server.stop()
    shutil.rmtree(directory)


def test_kept_connections_have_their_exchanges(nginx: tuple[NginxServer, tuple[str, int]], tmp_path: Path) -> None:
    server, address = nginx
    log = AccessLog(server.prefix / "logs/access.log")
    agent = AgentProcess(server.pid, tmp_path)
    with Http1Connection(address) as connection:
        for target in ("/new", "/kept", "/kept?delay_ms=50", "/page", "/kept?bytes=100000"):
            assert connection.request(target).status == 200
    wait_until(lambda: len(agent.poll()) == 5, "5 traces")
    agent.stop()
    traces = {key_of_trace(trace): trace for trace in agent.traces}
    found = [(line, traces[key_of_log(line)]) for line in log.poll()]
    assert [violation for line, trace in found for violation in check_facts(trace, line)] == []
    exchanges = {line["request_uri"]: trace.named("upstream exchange") for line, trace in found}
    assert [len(each) for each in exchanges.values()] == [1, 1, 1, 2, 1]
    assert exchanges["/kept?delay_ms=50"][0].seconds > 0.049
    assert {span.attributes["nginx.subrequest.uri"] for span in exchanges["/page"]} == {"/one", "/two"}


def test_kept_connections_older_than_the_probes_have_their_exchanges(
    nginx: tuple[NginxServer, tuple[str, int]], tmp_path: Path
) -> None:
    server, address = nginx
    log = AccessLog(server.prefix / "logs/access.log")
    with Http1Connection(address) as connection:
        assert connection.request("/page").status == 200
        log.poll()
        agent = AgentProcess(server.pid, tmp_path)
        targets = ("/kept?delay_ms=50", "/page", "/kept", "/kept?bytes=100000")
        for target in targets:
            assert connection.request(target).status == 200
    wait_until(lambda: len(agent.poll()) == len(targets), f"{len(targets)} traces")
    agent.stop()
    traces = {key_of_trace(trace): trace for trace in agent.traces}
    found = [(line, traces[key_of_log(line)]) for line in log.poll() if key_of_log(line) in traces]
    assert [line["request_uri"] for line, _ in found] == list(targets)
    assert [violation for line, trace in found for violation in check_facts(trace, line)] == []
    assert [trace.outline().count("upstream connect") for _, trace in found] == [0, 0, 0, 0]
    exchanges = {line["request_uri"]: trace.named("upstream exchange") for line, trace in found}
    assert [len(each) for each in exchanges.values()] == [1, 2, 1, 1]
    assert 0.049 < exchanges["/kept?delay_ms=50"][0].seconds < 0.5

"""Any nginx on the host: several builds at once, started later, replaced, upgraded, or in another pid namespace."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from e2e.agent_process import PROGRAM, AgentProcess, Trace
from e2e.nginx_server import NGINX, nginx_release, wait_until
from e2e.private_nginx import PrivateNginx, StartAgent, paths, wait_for_paths, wait_for_ready_lines


def resources(traces: list[Trace]) -> dict[str, dict[str, object]]:
    """Resource attributes by path."""
    return {trace.server.attributes["url.path"]: trace.resource for trace in traces}


def test_two_builds_at_once_each_with_its_resource(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    one, two = make_nginx("one"), make_nginx("two")
    one.start()
    two.start()
    agent = start_agent("--binary", one.binary, "--binary", two.binary)
    wait_for_ready_lines(agent, 2)
    one.get("/one")
    two.get("/two")
    wait_for_paths(agent, "/one", "/two")
    agent.stop()
    found = resources(agent.traces)
    for nginx in (one, two):
        resource = found[f"/{nginx.server.prefix.name}"]
        assert resource["service.name"] == "nginx"
        assert resource["service.version"] == nginx_release()
        assert resource["process.pid"] == nginx.server.pid
        assert resource["process.executable.path"] == str(nginx.binary)
        assert resource["host.name"] == Path("/etc/hostname").read_text().strip()
    assert found["/one"]["service.instance.id"] != found["/two"]["service.instance.id"]


def test_nginx_in_a_pod(
    make_nginx: type[PrivateNginx], start_agent: StartAgent, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the two files that the kubelet mounts into every container, in its own mount namespace."""
    uid = "0a1b2c3d-1111-2222-3333-444455556666"
    folder = directory / "pods" / uid
    (folder / "containers" / "edge").mkdir(parents=True)
    (folder / "containers" / "edge" / "7c3f90ab").touch()
    (folder / "etc-hosts").write_text("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n")
    (directory / "termination-log").touch()
    mounts = (
        f"mount --bind {folder}/etc-hosts /etc/hosts"
        f" && mount --bind {folder}/containers/edge/7c3f90ab {directory}/termination-log"
    )
    contained = make_nginx("contained", command=("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"))
    beside = make_nginx("beside")
    contained.start()
    beside.start()
    monkeypatch.setenv("K8S_NODE_NAME", "node-7")
    agent = start_agent("--binary", contained.binary, "--binary", beside.binary)
    wait_for_ready_lines(agent, 2)
    contained.get("/contained")
    beside.get("/beside")
    wait_for_paths(agent, "/contained", "/beside")
    agent.stop()
    found = {path: _of_kubernetes(resource) for path, resource in resources(agent.traces).items()}
    pod = {"k8s.pod.uid": uid, "k8s.container.name": "edge", "k8s.pod.name": Path("/etc/hostname").read_text().strip()}
    assert found == {"/contained": {**pod, "k8s.node.name": "node-7"}, "/beside": {"k8s.node.name": "node-7"}}


def _of_kubernetes(resource: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in resource.items() if name.startswith("k8s.")}


def test_one_binary_two_instances(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """The same build, one of it started after the agent; --pid wants only its own."""
    one = make_nginx("one")
    two = make_nginx("two", one.binary)
    one.start()
    agent = start_agent("--binary", one.binary)
    only = start_agent("--pid", str(one.server.pid), name="only")
    two.start()
    two.get("/two")
    one.get("/one")
    wait_for_paths(agent, "/one", "/two")
    wait_for_paths(only, "/one")
    agent.stop()
    only.stop()
    assert paths(only) == ["/one"]
    found = resources(agent.traces)
    assert found["/one"]["process.pid"] == one.server.pid
    assert found["/two"]["process.pid"] == two.server.pid
    # The very first request of the new instance was seen from its first byte.
    first = next(trace for trace in agent.traces if trace.server.attributes["url.path"] == "/two")
    assert first.outline() == ["downstream read", "downstream write"]


def test_started_later_replaced_under_its_path_and_gone(
    make_nginx: type[PrivateNginx], start_agent: StartAgent
) -> None:
    early = make_nginx("early")
    early.start()
    late = make_nginx("late")
    agent = start_agent("--binary", early.binary, "--binary", late.binary)
    late.start()
    wait_for_ready_lines(agent, 2)
    late.get("/late")
    wait_for_paths(agent, "/late")

    late.stop()
    wait_until(lambda: "has ended" in agent.stderr(), "the agent to notice the end")
    replacement = late.binary.with_name("new")
    shutil.copy(NGINX, replacement)
    replacement.rename(late.binary)
    late.start()
    wait_for_ready_lines(agent, 3)
    late.get("/replaced")
    wait_for_paths(agent, "/late", "/replaced")

    for pid in [late.server.pid, *late.server.worker_pids()]:
        os.kill(pid, signal.SIGKILL)
    late.server._process.wait()
    late.running = False
    early.get("/early")
    wait_for_paths(agent, "/early", "/late", "/replaced")
    wait_until(lambda: agent.stderr().count("has ended") == 2, "the agent to notice the crash")
    agent.stop()
    assert "lost 0" in agent.stderr()


def test_waits_for_the_first_nginx(directory: Path, make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    nginx = make_nginx("awaited")
    log = directory / "agent" / "agent.log"

    def start_when_it_waits() -> None:
        wait_until(lambda: log.exists() and "no nginx runs yet; waiting for one" in log.read_text(), "it to wait", 20)
        nginx.start()

    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(start_when_it_waits)
        agent = start_agent("--wait", "--binary", nginx.binary)
        started.result()
    nginx.get("/awaited")
    wait_for_paths(agent, "/awaited")
    agent.stop()


def test_upgraded_on_the_fly(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """USR2 starts the new binary beside the old; WINCH and QUIT end the old one."""
    nginx = make_nginx("upgraded")
    config = nginx.server.prefix / "nginx.conf"
    config.write_text(config.read_text().replace("daemon off;", "daemon on;"))  # else it ignores USR2 and WINCH
    nginx.server.start([])
    pid_file = nginx.server.prefix / "nginx.pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", "nginx")
    nginx.server._process.wait()
    old_pid = int(pid_file.read_text())
    agent = start_agent("--binary", nginx.binary)
    nginx.get("/old")
    replacement = nginx.binary.with_name("new")
    shutil.copy(NGINX, replacement)
    replacement.rename(nginx.binary)

    os.kill(old_pid, signal.SIGUSR2)
    wait_until(lambda: pid_file.exists() and int(pid_file.read_text() or old_pid) != old_pid, "the new master")
    new_pid = int(pid_file.read_text())
    try:
        wait_for_ready_lines(agent, 2)
        os.kill(old_pid, signal.SIGWINCH)
        wait_until(lambda: not _workers(old_pid, new_pid), "the old workers to end")
        nginx.get("/new")
        wait_for_paths(agent, "/new", "/old")
        os.kill(old_pid, signal.SIGQUIT)
        wait_until(lambda: not psutil.pid_exists(old_pid), "the old master to end")
        nginx.get("/newer")
        wait_for_paths(agent, "/new", "/newer", "/old")
        agent.stop()
    finally:
        os.kill(new_pid, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(new_pid), "the new master to end")
    found = resources(agent.traces)
    assert found["/old"]["process.pid"] == old_pid
    assert found["/newer"]["process.pid"] == new_pid
    assert "lost 0" in agent.stderr()


def _workers(master: int, but: int) -> list[int]:
    return [child.pid for child in psutil.Process(master).children() if child.pid != but]


def test_a_deleted_binary(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """A package upgrade removes the file; the process goes on, and so does tracing it."""
    nginx = make_nginx("deleted")
    nginx.start()
    nginx.binary.unlink()
    agent = start_agent("--pid", str(nginx.server.pid))
    nginx.get("/deleted")
    wait_for_paths(agent, "/deleted")
    agent.stop()


def test_nginx_in_another_pid_namespace(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """As in a container seen from its host: its pids are other numbers there."""
    nginx = make_nginx("contained", command=("unshare", "--pid", "--fork", "--mount-proc"))
    nginx.start()
    try:
        master = psutil.Process(nginx.server.pid).children()[0].pid
        agent = start_agent("--pid", str(master))
        nginx.get("/first")
        before = {child.pid for child in psutil.Process(master).children()}
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: not before & {child.pid for child in psutil.Process(master).children()}, "new workers")
        # With --pid the agent itself has to find workers it cannot follow through a fork.
        wait_until(lambda: _traced_again(nginx, agent), "requests of the new workers")
        agent.stop()
    finally:
        os.kill(master, signal.SIGTERM)
        nginx.server._process.wait(10)
        nginx.running = False
    assert all(trace.resource["process.pid"] == master for trace in agent.traces)


def _traced_again(nginx: PrivateNginx, agent: AgentProcess) -> bool:
    nginx.get("/again")
    return "/again" in paths(agent)


def test_agent_and_nginx_in_one_pid_namespace_of_their_own(directory: Path, make_nginx: type[PrivateNginx]) -> None:
    """As in a pod with shareProcessNamespace: the agent's numbers are not the kernel's."""
    nginx = make_nginx("pod")
    script = f"""
import subprocess, sys, time
from pathlib import Path
nginx = subprocess.Popen([{str(nginx.binary)!r}, "-p", {str(nginx.server.prefix)!r}, "-c", "nginx.conf"])
agent = subprocess.Popen([{str(PROGRAM)!r}, "run", "--pid", str(nginx.pid), "--exporter", "json",
                          "--output", {str(directory / "traces.jsonl")!r}], stderr=subprocess.PIPE, text=True)
print(agent.stderr.readline(), end="", flush=True)
sys.stdin.readline()
agent.terminate()
print(agent.stderr.read(), agent.wait(), flush=True)
nginx.terminate()
nginx.wait()
"""
    pod = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert pod.stdin is not None
    assert pod.stdout is not None
    ready = pod.stdout.readline()
    assert ready.startswith("ready"), ready
    for index in range(4):
        nginx.get(f"/{index}")
    output, _ = pod.communicate("stop\n", timeout=30)
    assert "received 4, exported 4, lost 0" in output
    traces = [Trace.parse(line) for line in (directory / "traces.jsonl").read_bytes().splitlines()]
    assert all(trace.outline() == ["downstream read", "downstream write"] for trace in traces)
    assert all(int(trace.server.attributes["nginx.worker.pid"]) < 100 for trace in traces)


def test_every_request_of_a_reload_under_load(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """Old workers finish theirs, new ones are seen from their first; the log counts."""
    nginx = make_nginx("loaded")
    nginx.start()
    agent = start_agent("--pid", str(nginx.server.pid), "--ring-buffer-mib", "64")
    host, port = nginx.address
    load = subprocess.Popen(
        ["ab", "-q", "-k", "-r", "-c", "16", "-n", "60000", f"http://{host}:{port}/load"], stdout=subprocess.DEVNULL
    )
    for _ in range(5):
        nginx.server.reload()
    assert load.wait(120) == 0
    nginx.stop()
    agent.stop()
    logged = len(nginx.log.poll())
    assert logged > 50000  # where a reload closes a kept-alive connection, ab gives up its requests
    assert f"received {logged}, exported {logged}, lost 0" in agent.stderr()
    assert len(agent.traces) == logged

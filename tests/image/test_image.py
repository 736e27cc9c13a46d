"""The image as a sidecar: nginx in one container, the program in another that shares its pid namespace."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from collector.process import CollectorProcess, collected, official
from e2e.agent_process import Span, Trace
from e2e.nginx_server import free_ports, wait_until

from image.podman import Container, Podman
from otel_nginx_ebpf import __version__

_NGINX = """
user www-data; worker_processes 2; error_log stderr; pid /run/nginx.pid;
events {}
http {
    access_log off;
    server { listen 127.0.0.1:@FRONT@; location / { proxy_pass http://127.0.0.1:@BACK@; } }
    server {
        listen 127.0.0.1:@BACK@;
        location / { return 200 "hello"; }
        location /told { return 200 "$http_traceparent"; }
    }
}
"""
_COLLECTOR = """
receivers: { otlp: { protocols: { grpc: { endpoint: "127.0.0.1:@OTLP@" } } } }
exporters: { file: { path: "@OUTPUT@", format: proto, flush_interval: 50ms } }
service:
  telemetry: { metrics: { level: none } }
  pipelines: { traces: { receivers: [otlp], exporters: [file] } }
"""
_CAPABILITIES = ("CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE")
_SECCOMP = Path("/usr/share/containers/seccomp.json")
_PYTHON = "/opt/otel-nginx-ebpf/bin/python"


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    names = ("FRONT", "BACK", "OTLP")
    return dict(zip(names, free_ports(len(names)), strict=True))


@pytest.fixture(scope="module")
def nginx(podman: Podman, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    config = tmp_path_factory.mktemp("nginx") / "nginx.conf"
    config.write_text(_filled(_NGINX, ports))
    with Container(podman, "nginx", options=[f"--volume={config}:/etc/nginx/nginx.conf:ro"]) as container:
        wait_until(lambda: _answers(ports["FRONT"]), "nginx in its container")
        yield container


@pytest.fixture(scope="module")
def output(ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The collector's file."""
    directory = tmp_path_factory.mktemp("collector")
    path = directory / "collected.bin"
    config = _filled(_COLLECTOR, ports).replace("@OUTPUT@", str(path))
    collector: CollectorProcess = official(config, [ports["OTLP"]], directory)
    yield path
    collector.stop()


def _filled(template: str, ports: dict[str, int]) -> str:
    for name, port in ports.items():
        template = template.replace(f"@{name}@", str(port))
    return template


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return bytes(response.read())


def _answers(port: int) -> bool:
    try:
        return _get(port, "/") == b"hello"
    except OSError:
        return False


def _release(nginx: Container) -> str:
    return nginx.exec("sh", "-c", "nginx -v 2>&1").strip().partition("nginx/")[2]


def _least(directory: Path) -> list[str]:
    """What README says to give instead of --privileged; the system call filter is podman's own with bpf let through."""
    profile = json.loads(_SECCOMP.read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "bpf"]
    profile["syscalls"].append({"names": ["bpf"], "action": "SCMP_ACT_ALLOW"})
    path = directory / "seccomp.json"
    path.write_text(json.dumps(profile))
    granted = [f"--cap-add={name}" for name in _CAPABILITIES]
    confined = [
        "--read-only",
        "--read-only-tmpfs=false",
        "--security-opt=no-new-privileges",
        f"--security-opt=seccomp={path}",
    ]
    return ["--cap-drop=ALL", *granted, *confined]


@pytest.mark.parametrize("rights", ["privileged", "least", "least-as-nobody"])
def test_traces_arrive(
    rights: str, podman: Podman, nginx: Container, ports: dict[str, int], output: Path, tmp_path: Path
) -> None:
    options = ["--privileged"] if rights == "privileged" else _least(tmp_path)
    if rights == "least-as-nobody":
        options.append("--user=65534:65534")
    environment = {"OTEL_SERVICE_NAME": rights, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{ports['OTLP']}"}
    options += [f"--env={name}={value}" for name, value in environment.items()]
    options.append(f"--pid=container:{nginx.name}")

    def traces() -> list[Trace]:
        return collected(output, lambda resource: resource["service.name"] == rights) if output.exists() else []

    with Container(podman, "otel-nginx-ebpf", options=options) as sidecar:
        sidecar.wait_until_it_says(f"ready: nginx {_release(nginx)} (pid 1), 2 workers")
        if rights != "privileged":
            effective = next(line for line in sidecar.exec("cat", "/proc/self/status").splitlines() if "CapEff" in line)
            assert int(effective.split()[1], 16) == 1 << 39 | 1 << 38 | 1 << 19
        assert sidecar.is_healthy()
        assert _get(ports["FRONT"], "/traced") == b"hello"
        wait_until(lambda: len(traces()) == 2, "both servers' traces in the collector's file")
        assert sidecar.stop() == 0
        assert "received 2, exported 2, lost 0" in sidecar.output()
    front, back = sorted(traces(), key=lambda trace: trace.server.start_unix_ns)
    assert front.outline()[:3] == ["downstream read", "upstream connect", "upstream exchange"]
    assert (front.server.attributes["url.path"], back.server.attributes["url.path"]) == ("/traced", "/traced")
    (exchange,) = front.named("upstream exchange")
    assert exchange.attributes["server.port"] == ports["BACK"] == back.server.attributes["server.port"]
    assert exchange.start_unix_ns <= back.server.start_unix_ns <= back.server.end_unix_ns <= exchange.end_unix_ns


def test_propagates_on_the_socket_with_one_right_more(
    podman: Podman, nginx: Container, ports: dict[str, int], output: Path, tmp_path: Path
) -> None:
    environment = {
        "OTEL_SERVICE_NAME": "propagates",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{ports['OTLP']}",
        "OTEL_NGINX_EBPF_PROPAGATE": "socket",
    }
    options = [
        *_least(tmp_path),
        "--cap-add=CAP_NET_ADMIN",
        "--cgroupns=host",
        "--volume=/sys/fs/cgroup:/sys/fs/cgroup:ro",
    ]
    options += [f"--env={name}={value}" for name, value in environment.items()]

    def traces() -> list[Trace]:
        return collected(output, lambda resource: resource["service.name"] == "propagates") if output.exists() else []

    def servers(traces: list[Trace]) -> list[Span]:
        return [span for trace in traces for span in trace.spans if span.kind == "SERVER"]

    with Container(podman, "otel-nginx-ebpf", options=[*options, f"--pid=container:{nginx.name}"]) as sidecar:
        sidecar.wait_until_it_says("propagates on the socket")
        told = _get(ports["FRONT"], "/told").decode().split("-")
        wait_until(lambda: len(servers(traces())) == 2, "both servers' spans in the collector's file")
        assert sidecar.stop() == 0
    (trace,) = traces()
    (exchange,) = trace.named("upstream exchange")
    assert told[1:3] == [trace.trace_id, exchange.span_id]
    assert [span.parent_span_id for span in servers([trace])] == [None, exchange.span_id]


def test_stopped_without_a_collector(podman: Podman, nginx: Container, ports: dict[str, int], tmp_path: Path) -> None:
    """Within the ten seconds that `podman stop` and `docker stop` give by default, all is counted."""
    (absent,) = free_ports(1)
    options = [*_least(tmp_path), f"--env=OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{absent}"]
    with Container(podman, "otel-nginx-ebpf", options=[*options, f"--pid=container:{nginx.name}"]) as sidecar:
        sidecar.wait_until_it_says(f"ready: nginx {_release(nginx)} (pid 1), 2 workers")
        assert _get(ports["BACK"], "/counted") == b"hello"
        assert sidecar.stop(seconds=None) == 0
        assert "received 1, exported 0, lost 1 (lost_export_failed 1)" in sidecar.output()


def test_without_rights_it_says_which(podman: Podman, nginx: Container) -> None:
    with Container(podman, "otel-nginx-ebpf", options=[f"--pid=container:{nginx.name}"]) as sidecar:
        wait_until(lambda: not sidecar.is_running(), "the program to end")
        assert sidecar.inspect(".State.ExitCode") == "2"
        assert "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE missing" in sidecar.output()


def test_waits_for_nginx_and_is_healthy(podman: Podman, tmp_path: Path) -> None:
    with Container(podman, "otel-nginx-ebpf", options=_least(tmp_path)) as sidecar:
        sidecar.wait_until_it_says("no nginx runs yet; waiting for one")
        assert sidecar.is_healthy()
        assert sidecar.stop() == 0


def test_not_healthy_without_probes(podman: Podman) -> None:
    with Container(podman, "otel-nginx-ebpf", "600", options=["--entrypoint=sleep"]) as container:
        assert not container.is_healthy()
        assert container.is_running()


def test_what_is_in_the_image(podman: Podman) -> None:
    with Container(podman, "otel-nginx-ebpf", "600", options=["--entrypoint=sleep"]) as container:
        tools = "cc gcc clang g++ as ld make pip pip3 curl wget"
        assert container.exec("sh", "-c", f"for tool in {tools}; do command -v $tool; done; true") == ""
        assert container.exec("sh", "-c", "ls -d /usr/src/* /lib/modules /src /build 2>/dev/null; true") == ""
        bill = json.loads(container.exec("cat", "/opt/otel-nginx-ebpf/sbom.cdx.json"))
        list_packages = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        installed = container.exec(_PYTHON, "-c", list_packages).split()
    lock = Path(__file__).parents[2] / "image" / "requirements.txt"
    locked = re.findall(r"^\S+==\S+", lock.read_text(), re.MULTILINE)
    assert _normal(installed) == _normal([*locked, f"otel-nginx-ebpf=={__version__}"])
    listed = [f"{part['name']}=={part['version']}" for part in bill["components"]]
    assert _normal(listed) >= _normal(locked)


def _normal(packages: list[str]) -> set[str]:
    """Names as PEP 503 compares them."""
    return {re.sub("[-_.]", "-", name).lower() + version for name, version in (each.split("==") for each in packages)}

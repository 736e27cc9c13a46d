"""examples/systemd's unit, run by systemd itself on a machine that is a container."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.nginx_server import wait_until

from image.podman import Container, Podman

_UNIT = Path(__file__).parents[2] / "examples" / "systemd" / "otel-nginx-ebpf.service"
_GET = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1/').status)"


@pytest.fixture
def machine(podman: Podman) -> Iterator[Container]:
    """systemd with the unit, and nginx, which serves on a loopback of its own."""
    unit = f"--volume={_UNIT}:/etc/systemd/system/{_UNIT.name}:ro"
    options = ["--privileged", "--systemd=always", unit]
    with Container(podman, "machine", options=options, network="none") as container:
        wait_until(lambda: container.succeeds("systemctl", "is-active", "nginx"), "systemd to start nginx", 60)
        yield container


def _log(machine: Container) -> str:
    return machine.exec("journalctl", "--no-pager", "--output=cat", f"--unit={_UNIT.name}")


def test_the_unit_traces_with_the_least_rights(machine: Container) -> None:
    verified = machine.exec("sh", "-c", f"systemd-analyze verify --man=no {_UNIT.name} 2>&1")
    assert verified == ""
    # There is no collector: what it does not take is counted at the end.
    machine.exec("sh", "-c", "echo OTEL_NGINX_EBPF_EXPORTER=line,otlp > /etc/default/otel-nginx-ebpf")
    machine.exec("systemctl", "start", _UNIT.name)
    wait_until(lambda: "ready: nginx 1.22.1" in _log(machine), "the program to be ready", 60)

    pid = machine.exec("systemctl", "show", "--value", "--property=MainPID", _UNIT.name).strip()
    status = dict(re.findall(r"(\w+):\t(.*)", machine.exec("cat", f"/proc/{pid}/status")))
    assert status["Uid"].split()[0] != "0"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 39 | 1 << 38 | 1 << 19
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")

    assert machine.exec("python3", "-c", _GET).strip() == "200"
    wait_until(lambda: "=>-, /, 200," in _log(machine), "the request's line")
    machine.exec("systemctl", "stop", _UNIT.name)
    assert "received 1, exported 0, lost 1 (lost_export_failed 1)" in _log(machine)
    assert machine.exec("systemctl", "show", "--value", "--property=Result", _UNIT.name).strip() == "success"


def test_stopped_while_it_attaches(machine: Container) -> None:
    machine.exec("systemctl", "start", _UNIT.name)
    machine.exec("systemctl", "stop", _UNIT.name)
    assert machine.exec("systemctl", "show", "--value", "--property=Result", _UNIT.name).strip() == "success"
    assert "Traceback" not in _log(machine)

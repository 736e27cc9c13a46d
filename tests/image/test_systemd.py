"""The Debian package and its systemd unit, on a machine that is a container with systemd."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.nginx_server import wait_until

from image.podman import Container, Podman

_PACKAGES = Path(__file__).parents[2] / "dist" / "bookworm"
_UNIT = "otel-nginx-ebpf.service"
_GET = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1/').status)"


@pytest.fixture
def machine(podman: Podman) -> Iterator[Container]:
    """systemd with the package, and nginx, which serves on a loopback of its own."""
    options = ["--privileged", "--systemd=always", f"--volume={_PACKAGES}:/packages:ro"]
    with Container(podman, "machine", options=options, network="none") as container:
        wait_until(lambda: container.succeeds("systemctl", "is-active", "nginx"), "systemd to start nginx", 60)
        container.exec("sh", "-c", "dpkg --install /packages/*.deb")
        yield container


def _log(machine: Container) -> str:
    return machine.exec("journalctl", "--no-pager", "--output=cat", f"--unit={_UNIT}")


def test_the_unit_traces_with_the_least_rights(machine: Container) -> None:
    verified = machine.exec("sh", "-c", f"systemd-analyze verify --man=no {_UNIT} 2>&1")
    assert verified == ""
    # There is no collector: what it does not take is counted at the end.
    machine.exec("sh", "-c", "echo OTEL_NGINX_EBPF_EXPORTER=line,otlp > /etc/default/otel-nginx-ebpf")
    machine.exec("systemctl", "start", _UNIT)
    wait_until(lambda: "ready: nginx " in _log(machine), "the program to be ready", 60)

    pid = machine.exec("systemctl", "show", "--value", "--property=MainPID", _UNIT).strip()
    status = dict(re.findall(r"(\w+):\t(.*)", machine.exec("cat", f"/proc/{pid}/status")))
    assert status["Uid"].split()[0] != "0"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 39 | 1 << 38 | 1 << 19
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")

    assert machine.exec("python3", "-c", _GET).strip() == "200"
    wait_until(lambda: "=>-, /, 200," in _log(machine), "the request's line")
    machine.exec("systemctl", "stop", _UNIT)
    assert "received 1, exported 0, lost 1 (lost_export_failed 1)" in _log(machine)
    assert machine.exec("systemctl", "show", "--value", "--property=Result", _UNIT).strip() == "success"


def test_the_unit_propagates_with_one_right_more(machine: Container) -> None:
    drop_in = f"/etc/systemd/system/{_UNIT}.d/propagate.conf"
    lines = "[Service]\nAmbientCapabilities=CAP_NET_ADMIN\nCapabilityBoundingSet=CAP_NET_ADMIN\n"
    machine.exec(
        "sh", "-c", f"mkdir -p $(dirname {drop_in}) && printf '{lines}' > {drop_in} && systemctl daemon-reload"
    )
    machine.exec("sh", "-c", "echo OTEL_NGINX_EBPF_PROPAGATE=socket > /etc/default/otel-nginx-ebpf")
    machine.exec("systemctl", "start", _UNIT)
    wait_until(lambda: "propagates on the socket" in _log(machine), "the program to be ready", 60)
    machine.exec("systemctl", "stop", _UNIT)


def test_the_package_leaves_nothing_behind(machine: Container) -> None:
    version = machine.exec("otel-nginx-ebpf", "--version").split()[1]
    assert machine.exec("dpkg-query", "--show", "--showformat=${Version}", "otel-nginx-ebpf") == version
    assert machine.exec("systemctl", "show", "--value", "--property=ActiveState,UnitFileState", _UNIT).split() == [
        "inactive",
        "disabled",
    ]
    machine.exec("systemctl", "enable", "--now", _UNIT)
    machine.exec("dpkg", "--purge", "otel-nginx-ebpf")
    assert machine.exec("systemctl", "list-units", "--all", "--no-legend", _UNIT) == ""
    left = "find / -xdev -name '*otel-nginx-ebpf*' -not -path '/proc/*' -not -path '/packages/*'"
    assert machine.exec("sh", "-c", left) == ""


def test_stopped_while_it_attaches(machine: Container) -> None:
    machine.exec("systemctl", "start", _UNIT)
    machine.exec("systemctl", "stop", _UNIT)
    assert machine.exec("systemctl", "show", "--value", "--property=Result", _UNIT).strip() == "success"
    assert "Traceback" not in _log(machine)

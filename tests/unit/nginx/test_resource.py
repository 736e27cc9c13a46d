"""What the files of a host and of a pod tell about an nginx."""

import hashlib
import os
from pathlib import Path

import pytest
from registry.checker import check_resource

from otel_nginx_ebpf.nginx.processes import instance_of
from otel_nginx_ebpf.nginx.resource import build_id, host_id, instance_attributes, kubernetes_attributes
from unit.nginx.test_processes import SLEEP, running

MACHINE_ID = "0123456789abcdef0123456789abcdef"
POD = "0a1b2c3d-1111-2222-3333-444455556666"

# As in a container of containerd; /var/lib/kubelet is a part of the root file system, or a file system of its own.
MOUNTS = f"""\
2050 1993 0:243 / / rw,relatime master:646 - overlay overlay rw
2068 2050 8:1 /var/lib/kubelet/pods/{POD}/etc-hosts /etc/hosts rw,relatime - ext4 /dev/sda1 rw
2069 2050 8:1 /var/lib/kubelet/pods/{POD}/containers/edge/7c3f90ab /dev/termination-log rw - ext4 /dev/sda1 rw
2072 2050 0:225 / /run/secrets/kubernetes.io/serviceaccount ro,relatime - tmpfs tmpfs rw
"""
OWN_FILE_SYSTEM = MOUNTS.replace("/var/lib/kubelet/pods", "/pods")
HOST = "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
CGROUP = f"0::/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-containerd-{'ab' * 32}.scope\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    secrets = tmp_path / "var/run/secrets/kubernetes.io/serviceaccount"
    secrets.mkdir(parents=True)
    (secrets / "namespace").write_text("shop")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").write_text("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n")
    return tmp_path


@pytest.mark.parametrize("mounts", [MOUNTS, OWN_FILE_SYSTEM])
def test_a_pod(root: Path, mounts: str) -> None:
    assert kubernetes_attributes(root, "edge-5d", "0::/\n", mounts) == {
        "k8s.pod.name": "edge-5d",
        "k8s.pod.uid": POD,
        "k8s.namespace.name": "shop",
        "k8s.container.name": "edge",
    }


def test_a_pod_by_its_cgroup(root: Path) -> None:
    """A runtime may mount other files. Then the container's name is not known."""
    found = kubernetes_attributes(root, "edge-5d", CGROUP, HOST)
    assert found == {"k8s.pod.name": "edge-5d", "k8s.pod.uid": POD, "k8s.namespace.name": "shop"}


def test_a_pod_in_the_network_of_its_node(root: Path) -> None:
    """Its host name is the node's."""
    (root / "etc/hosts").write_text("# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n")
    assert "k8s.pod.name" not in kubernetes_attributes(root, "node-7", CGROUP, MOUNTS)


def test_a_container_that_sees_files_of_others(root: Path) -> None:
    """As a pod that mounts /var/lib/kubelet/pods: several names, so none is told."""
    other = MOUNTS.replace("containers/edge", "containers/sidecar")
    assert "k8s.container.name" not in kubernetes_attributes(root, "edge-5d", CGROUP, MOUNTS + other)


def test_a_static_pod(root: Path) -> None:
    """Its folder's name is a hash, not the id that the cluster knows."""
    found = kubernetes_attributes(root, "edge-node-7", "0::/\n", MOUNTS.replace(POD, "c" * 32))
    assert found == {"k8s.pod.name": "edge-node-7", "k8s.namespace.name": "shop", "k8s.container.name": "edge"}


def test_an_nginx_of_the_node_itself(root: Path) -> None:
    """It sees the mounts of all pods at their places in the kubelet's folder."""
    mounts = f"""\
611 30 0:71 / /var/lib/kubelet/pods/{POD}/volumes/kubernetes.io~projected/kube-api-access-x rw shared:1 - tmpfs tmpfs rw
612 30 8:1 /var/lib/kubelet/pods/{POD}/volumes/a /var/lib/kubelet/pods/{POD}/volume-subpaths/a rw - ext4 /dev/sda1 rw
"""
    assert kubernetes_attributes(root, "node-7", "0::/system.slice/nginx.service\n", mounts) == {}


def test_no_pod(root: Path) -> None:
    assert kubernetes_attributes(root, "edge-5d", "0::/system.slice/nginx.service\n", HOST) == {}


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026531836]")
    for name in ("etc", "var/lib/dbus"):
        (tmp_path / "1/root" / name).mkdir(parents=True)
    (tmp_path / "1/root/etc/machine-id").write_text(f"{MACHINE_ID}\n")
    return tmp_path


def test_host_id(proc: Path) -> None:
    assert host_id(proc) == MACHINE_ID


def test_host_id_of_dbus(proc: Path) -> None:
    (proc / "1/root/etc/machine-id").write_text("uninitialized\n")
    assert host_id(proc) is None
    (proc / "1/root/var/lib/dbus/machine-id").write_text(MACHINE_ID)
    assert host_id(proc) == MACHINE_ID


def test_host_id_of_a_container_is_not_the_host_s(proc: Path) -> None:
    """Pid 1 is the container's there, and the file is the image's."""
    (proc / "self/ns/pid").unlink()
    (proc / "self/ns/pid").symlink_to("pid:[4026532617]")
    assert host_id(proc) is None


def test_host_id_without_proc(tmp_path: Path) -> None:
    assert host_id(tmp_path) is None


@pytest.mark.parametrize("size", [0, 100, 4096, 5000, 20_000])
def test_build_id(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "program").write_bytes(content)
    expected = hashlib.sha256(content[:4096] + content[-4096:] + size.to_bytes(8, "big")).hexdigest()
    assert build_id(tmp_path / "program") == expected[:32]


def test_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K8S_NODE_NAME", "node-7")
    with running(SLEEP, "nginx: master process /usr/sbin/nginx") as pid:
        attributes = instance_attributes(instance_of(pid), "1.26.2")
    assert attributes["process.pid"] == pid
    assert attributes["k8s.node.name"] == "node-7"
    assert attributes["process.executable.build_id.htlhash"] == build_id(SLEEP)
    assert str(attributes["process.creation.time"]).endswith("Z")
    said = {
        "service.name": "nginx",
        "telemetry.sdk.name": "opentelemetry",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": "1",
    }
    assert check_resource(attributes | said) == []

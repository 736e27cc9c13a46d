"""Reads the resource attributes of an nginx instance (OpenTelemetry)."""

import hashlib
import os
import re
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

import psutil
from opentelemetry.semconv._incubating.attributes import (
    container_attributes,
    host_attributes,
    k8s_attributes,
    process_attributes,
    service_attributes,
)

from otel_nginx_ebpf.nginx.processes import Instance, title

_INSTANCE_NAMESPACE = uuid.UUID("4f6f0b1e-9a53-5a8e-8d2c-6a5f7f0e7a11")
"""This project's own namespace. It is constant, so that an nginx keeps its service.instance.id while it runs."""

# The cgroup v1 and v2 paths of Docker, containerd, CRI-O and podman end with the container's id.
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_POD_UID = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
# The kubelet mounts two files from the pod's folder into each container: /etc/hosts, and the file for the termination
# message, which has a random name of 8 digits (kubelet, GetPodContainerDir and makeMounts). The fourth field of
# mountinfo is the path of what is mounted.
_POD_MOUNT = re.compile(r"^\d+ \d+ \S+ \S*/pods/([^/ ]+)/(?:etc-hosts|containers/([^/ ]+)/[0-9a-f]{8}) ", re.MULTILINE)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SERVICE_ACCOUNT = "var/run/secrets/kubernetes.io/serviceaccount/namespace"
# What the kubelet writes into /etc/hosts of a pod with a network, and so a host name, of its own.
_OWN_NETWORK = "# Kubernetes-managed hosts file.\n"
NODE_VARIABLE = "K8S_NODE_NAME"
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
# The initial pid namespace, by its inode (PROC_PID_INIT_INO in Linux' proc_ns.h). Its pid 1 is the host's.
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
# How much of an executable's beginning and end its build id covers.
_HASHED_BYTES = 4096


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def instance_attributes(instance: Instance, version: str) -> dict[str, str | int]:
    """Returns the resource attributes of an instance. Attributes that cannot be read are left out.

    Args:
        instance: The nginx instance.
        version: Its release; for a fork with the fork's name.
    """
    pid = instance.master_pid
    attributes: dict[str, str | int] = {
        service_attributes.SERVICE_VERSION: version,
        process_attributes.PROCESS_PID: pid,
    }
    hostname = _read(f"/proc/{pid}/root/etc/hostname").strip() or socket.gethostname()
    attributes[host_attributes.HOST_NAME] = hostname
    if machine_id := host_id(Path("/proc")):
        attributes[host_attributes.HOST_ID] = machine_id
    try:
        process = psutil.Process(pid)
        started = process.create_time()
        attributes[process_attributes.PROCESS_CREATION_TIME] = _iso_8601(started)
        attributes[process_attributes.PROCESS_EXECUTABLE_PATH] = process.exe()
        attributes[process_attributes.PROCESS_EXECUTABLE_NAME] = Path(process.exe()).name
        attributes[process_attributes.PROCESS_EXECUTABLE_BUILD_ID_HTLHASH] = build_id(Path(f"/proc/{pid}/exe"))
        attributes[process_attributes.PROCESS_COMMAND_LINE] = title(pid)
        attributes[process_attributes.PROCESS_OWNER] = process.username()
        attributes[service_attributes.SERVICE_INSTANCE_ID] = str(
            uuid.uuid5(_INSTANCE_NAMESPACE, f"{hostname} {pid} {started:.2f}")
        )
    except (psutil.Error, OSError):
        pass
    cgroup = _read(f"/proc/{pid}/cgroup")
    if ids := _CONTAINER_ID.findall(cgroup):
        attributes[container_attributes.CONTAINER_ID] = ids[-1]
    root = Path(f"/proc/{pid}/root")
    attributes |= kubernetes_attributes(root, hostname, cgroup, _read(f"/proc/{pid}/mountinfo"))
    # This program runs on the kernel of the nginx that it traces, so on the same node.
    if node := os.environ.get(NODE_VARIABLE):
        attributes[k8s_attributes.K8S_NODE_NAME] = node
    return attributes


def _iso_8601(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def build_id(executable: Path) -> str:
    """Returns the build id of an executable, as the conventions define it (process.executable.build_id.htlhash).

    Raises:
        OSError: The file cannot be read.
    """
    with executable.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _HASHED_BYTES, 0))
        tail = file.read(_HASHED_BYTES)
        file.seek(0)
        head = file.read(_HASHED_BYTES)
    return hashlib.sha256(head + tail + size.to_bytes(8, "big")).digest()[:16].hex()


def host_id(proc: Path) -> str | None:
    """Returns the machine id of the host. `None`: not known, as in a container that does not see the host's processes.

    Args:
        proc: Where proc is mounted.
    """
    try:
        if os.readlink(proc / "self/ns/pid") != _INITIAL_PID_NAMESPACE:
            return None
    except OSError:
        return None
    for path in ("etc/machine-id", "var/lib/dbus/machine-id"):
        found = _read(proc / "1/root" / path).strip()
        if _MACHINE_ID.fullmatch(found):
            return found
    return None


def kubernetes_attributes(root: Path, hostname: str, cgroup: str, mountinfo: str) -> dict[str, str]:
    """Returns the attributes of the pod of a process; nothing if the process is in no pod.

    The environment does not tell: nginx overwrites it with its title.

    Args:
        root: The root directory of the process.
        hostname: The host name there. It is the pod's name, unless the pod uses the network of its node.
        cgroup: /proc/PID/cgroup of the process.
        mountinfo: /proc/PID/mountinfo of the process.
    """
    mounts = _POD_MOUNT.findall(mountinfo)
    # A static pod has a hash instead: its id in the cluster is another one.
    uids = [uid for uid, _ in mounts if _UUID.fullmatch(uid)]
    uids += [uid.replace("_", "-") for uid in _POD_UID.findall(cgroup)]
    if not mounts and not uids:
        return {}
    containers = {container for _, container in mounts if container}
    found = {
        k8s_attributes.K8S_POD_UID: uids[0] if uids else "",
        k8s_attributes.K8S_POD_NAME: hostname if _OWN_NETWORK in _read(root / "etc/hosts") else "",
        k8s_attributes.K8S_NAMESPACE_NAME: _read(root / _SERVICE_ACCOUNT).strip(),
        k8s_attributes.K8S_CONTAINER_NAME: containers.pop() if len(containers) == 1 else "",
    }
    return {name: value for name, value in found.items() if value}

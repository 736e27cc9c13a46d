"""What is known of an nginx instance as a whole: its part of the OpenTelemetry resource."""

import re
import socket
import uuid
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
"""Ours, so that one nginx keeps its service.instance.id while it runs, whoever traces it."""

# cgroup v1 and v2 paths of Docker, containerd, CRI-O and podman end with the container's id.
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_POD_UID = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
_SERVICE_ACCOUNT = "var/run/secrets/kubernetes.io/serviceaccount/namespace"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _read(f"/proc/{pid}/environ").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def instance_attributes(instance: Instance, version: str) -> dict[str, str | int]:
    """Resource attributes of an instance. What cannot be read is left out.

    Args:
        instance: The nginx.
        version: Its release, with its name where it is a fork.
    """
    pid = instance.master_pid
    attributes: dict[str, str | int] = {
        service_attributes.SERVICE_VERSION: version,
        process_attributes.PROCESS_PID: pid,
    }
    hostname = _read(f"/proc/{pid}/root/etc/hostname").strip() or socket.gethostname()
    attributes[host_attributes.HOST_NAME] = hostname
    try:
        process = psutil.Process(pid)
        started = process.create_time()
        attributes[process_attributes.PROCESS_EXECUTABLE_PATH] = process.exe()
        attributes[process_attributes.PROCESS_EXECUTABLE_NAME] = Path(process.exe()).name
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
    attributes |= _kubernetes(pid, cgroup)
    return attributes


def _kubernetes(pid: int, cgroup: str) -> dict[str, str | int]:
    """What a pod tells its processes: its name as host name, its namespace beside its service account's token."""
    environment = _environment(pid)
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return {}
    found = {
        k8s_attributes.K8S_POD_NAME: environment.get("HOSTNAME", ""),
        k8s_attributes.K8S_NAMESPACE_NAME: _read(f"/proc/{pid}/root/{_SERVICE_ACCOUNT}").strip(),
        k8s_attributes.K8S_POD_UID: match[1].replace("_", "-") if (match := _POD_UID.search(cgroup)) else "",
    }
    return {name: value for name, value in found.items() if value}

"""Reads the resource attributes of an nginx instance (OpenTelemetry)."""

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
"""This project's own namespace. It is constant, so that an nginx keeps its service.instance.id while it runs."""

# The cgroup v1 and v2 paths of Docker, containerd, CRI-O and podman end with the container's id.
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
    """Returns the pod's attributes. The host name is the pod's name; the service account's files hold its namespace."""
    environment = _environment(pid)
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return {}
    found = {
        k8s_attributes.K8S_POD_NAME: environment.get("HOSTNAME", ""),
        k8s_attributes.K8S_NAMESPACE_NAME: _read(f"/proc/{pid}/root/{_SERVICE_ACCOUNT}").strip(),
        k8s_attributes.K8S_POD_UID: match[1].replace("_", "-") if (match := _POD_UID.search(cgroup)) else "",
    }
    return {name: value for name, value in found.items() if value}

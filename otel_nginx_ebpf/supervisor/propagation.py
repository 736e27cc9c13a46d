"""Decides by which ways --propagate tells upstreams here, and says why not by the others."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from otel_nginx_ebpf.kernel import preflight
from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.kernel.socket_propagation import sees_cgroup_of
from otel_nginx_ebpf.nginx.processes import Instance
from otel_nginx_ebpf.settings.model import Propagate, Settings

_log = logging.getLogger(__name__)

SOCKET, MEMORY = "on the socket", "in nginx's memory"


def possible(settings: Settings) -> tuple[Settings, dict[str, str]]:
    """Returns the settings with only the ways of --propagate that may work here, and why the others do not."""
    refused: dict[str, str] = {}
    if settings.tells_on_socket and (why := preflight.socket_refusal()):
        refused[SOCKET] = why
    if settings.tells_in_memory and (why := preflight.memory_refusal()):
        refused[MEMORY] = why
    socket, memory = (
        settings.tells_on_socket and SOCKET not in refused,
        settings.tells_in_memory and MEMORY not in refused,
    )
    way: Propagate = "auto" if socket and memory else "socket" if socket else "memory" if memory else "off"
    return replace(settings, propagate=way), refused


def reachable(settings: Settings, instances: Iterable[Instance]) -> Settings:
    """Returns the settings without the socket, with a warning, if nginx is outside of our root of cgroups."""
    if not settings.tells_on_socket or all(sees_cgroup_of(instance.master_pid) for instance in instances):
        return settings
    _log.warning(
        "--propagate not on the socket: nginx is outside of this container's cgroups; use the host's (cgroupns)"
    )
    return replace(settings, propagate="memory" if settings.tells_in_memory else "off")


def describe(attachment: Attachment, settings: Settings, refused: dict[str, str]) -> str:
    """Returns the end of the ready line: how upstreams are told, and why not by the ways that were refused."""
    refused = dict(refused)
    ways: list[str] = []
    on_socket = attachment.on_socket
    if on_socket and "refused" in on_socket:
        refused[SOCKET] = on_socket["refused"]
    elif on_socket:
        first = " (the kernel's FIONREAD allows the first request of each connection)"
        ways.append(SOCKET + first * bool(on_socket["once"]))
    if settings.tells_in_memory:
        if attachment.refused:
            refused[MEMORY] = f"the kernel refuses the program ({attachment.refused[0]})"
        else:
            ways.append(MEMORY)
    if not ways and not refused:
        return ""
    reasons = "".join(f", not {way}: {why}" for way, why in refused.items())
    return f", propagates {' and '.join(ways) or 'nothing'}{reasons}"


def watch(attachment: Attachment, name: str) -> None:
    """Ends telling on the socket at the first sign that nginx may not see all bytes of an answer."""
    overstayed, stalled = attachment.stalls()
    if not overstayed and not stalled:
        return
    attachment.stop_telling()
    signs: list[str] = []
    if overstayed:
        signs.append(f"{overstayed} answers came on connections that the kernel should have released before")
    if stalled:
        signs.append(f"nginx waited in vain for the rest of {stalled} answers")
    _log.warning(
        "%s: --propagate on the socket ended: %s; the kernel may not tell nginx how many bytes such a connection has "
        "(FIONREAD)",
        name,
        ", and ".join(signs),
    )

"""Attaches the programs that write on nginx's upstream sockets, and rehearses them on connections of our own.

A kernel may have the programs and still not be usable. Since 6.6.128, 6.12.75, 6.18.14 and 6.19 a socket in a sockmap
answers 0 to FIONREAD, and nginx then waits for bytes that it has. Debian's 6.12.117 and 7.2.13 are right again. So
nothing is concluded from the kernel's version.
"""

import ctypes
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otel_nginx_ebpf.kernel.maps import create_map
from otel_nginx_ebpf.kernel.system_call import bpf

# linux/bpf.h
_BPF_MAP_UPDATE_ELEM = 2
_BPF_PROG_ATTACH = 8
_BPF_LINK_CREATE = 28
_CGROUP_SOCK_OPS = 3
_SK_MSG_VERDICT = 7
_MAP_TYPE_SOCKMAP = 15

_MOUNTS = Path("/proc/self/mounts")
_WAIT_S = 5.0

_REQUEST = b"POST /rehearsal?traceparent: HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n"
_BODY = b"\r\ntraceparent: none\r\n"
_TRACE_ID, _SPAN_ID = 0x0123456789ABCDEF_FEDCBA9876543210, 0x1122334455667788
_TOLD = {
    "tracecontext": f"traceparent: 00-{_TRACE_ID:032x}-{_SPAN_ID:016x}-01\r\n",
    "b3": f"b3: {_TRACE_ID:032x}-{_SPAN_ID:016x}-1\r\n",
    "b3multi": f"X-B3-TraceId: {_TRACE_ID:032x}\r\nX-B3-SpanId: {_SPAN_ID:016x}\r\nX-B3-Sampled: 1\r\n",
}
"""What the program adds, by propagator."""


class SocketRefusedError(Exception):
    """Upstreams cannot be told on the socket here. The message says why."""


class _AttachAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_PROG_ATTACH."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("target_fd", "program", "attach_type", "flags", "replaced"))


class _ElementAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_MAP_UPDATE_ELEM."""

    _fields_ = (
        ("map", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _LinkAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_LINK_CREATE."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("program", "target_fd", "attach_type", "flags"))


@dataclass(frozen=True, slots=True)
class Programs:
    """What the loader has loaded: descriptors, and the table `socket_uses` of BCC."""

    sockets: int
    """The map upstream_sockets."""
    message: int
    """The SK_MSG program."""
    connection: int
    """The SOCK_OPS program that puts connections into the map."""
    release: int
    """The SOCK_OPS program that takes connections out of the map."""
    uses: Any


def cgroup_root(mounts: str | None = None) -> str | None:
    """Returns where the version 2 hierarchy of cgroups is mounted. None: nowhere.

    Args:
        mounts: The text of /proc/self/mounts; by default this process's.
    """
    text = _MOUNTS.read_text(encoding="ascii", errors="replace") if mounts is None else mounts
    fields = (line.split() for line in text.splitlines())
    return next((each[1] for each in fields if len(each) > 2 and each[2] == "cgroup2"), None)


def sees_cgroup_of(pid: int) -> bool:
    """Tells whether a program at `cgroup_root` sees a process: in a container it may see only the container's own."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the process has ended
        return True
    return not any(line.startswith("0::/..") for line in lines)


def fionread_works() -> bool:
    """Tells whether FIONREAD counts the bytes of a socket in a sockmap. Raises `OSError` if that is refused."""
    sockets = create_map(_MAP_TYPE_SOCKMAP, 4, 4, 1)
    with ExitStack() as stack:
        stack.callback(os.close, sockets)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname(), _WAIT_S))
        server, _ = listener.accept()
        stack.enter_context(server)
        key, value = ctypes.c_uint32(0), ctypes.c_uint32(client.fileno())
        bpf(_BPF_MAP_UPDATE_ELEM, _ElementAttribute(sockets, ctypes.addressof(key), ctypes.addressof(value)))
        server.sendall(b"answer")
        return _waiting_bytes(client) == len(b"answer")


def _waiting_bytes(connection: socket.socket) -> int:
    """Waits until something can be read, and returns what FIONREAD says."""
    if not select.select([connection], [], [], _WAIT_S)[0]:
        return 0
    (waiting,) = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))
    return int(waiting)


def attach(programs: Programs, propagators: Iterable[str]) -> tuple[list[int], bool]:
    """Attaches the programs, and rehearses what they do with a connection of this process.

    Args:
        programs: What the loader has loaded.
        propagators: Whose headers the program writes.

    Returns:
        Descriptors that keep the SOCK_OPS programs attached: first the one for taking connections out of the map, then
        the one for putting them in; whether the kernel allows only the first request of a connection to be told.

    Raises:
        SocketRefusedError: The kernel refuses a program, or they do not work here. Nothing stays attached.
    """
    root = cgroup_root()
    if root is None:
        raise SocketRefusedError("no cgroup2 is mounted")
    links: list[int] = []
    try:
        bpf(_BPF_PROG_ATTACH, _AttachAttribute(programs.sockets, programs.message, _SK_MSG_VERDICT))
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Not BPF_PROG_ATTACH: the program would stay attached if this program is killed.
            links.append(
                _closed_last(bpf(_BPF_LINK_CREATE, _LinkAttribute(programs.release, directory, _CGROUP_SOCK_OPS)))
            )
            links.append(bpf(_BPF_LINK_CREATE, _LinkAttribute(programs.connection, directory, _CGROUP_SOCK_OPS)))
        finally:
            os.close(directory)
        told = "".join(_TOLD[each] for each in propagators).encode()
        once = not _rehearse(programs.uses, told, once=False)
        if once and not _rehearse(programs.uses, told, once=True):
            raise SocketRefusedError("a socket in a sockmap does not tell how many bytes it has (FIONREAD)")
    except (OSError, SocketRefusedError) as error:
        for link in links:
            os.close(link)
        if isinstance(error, SocketRefusedError):
            raise
        what = "the rehearsal failed" if len(links) == 2 else "the kernel refuses to attach"
        raise SocketRefusedError(f"{what}: {error.strerror or error}") from error
    return links, once


def _closed_last(descriptor: int) -> int:
    """Moves a descriptor into the queue of a socket. Returns the socket, which stands for it.

    When the process that holds the socket is killed, the kernel closes all other descriptors of the process before what
    is in the queue: it finds that only while it closes the socket (exit_task_work).
    """
    holder, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with sender:
        socket.send_fds(sender, [b"\0"], [descriptor])
    os.close(descriptor)
    return holder.detach()


def _rehearse(uses: Any, added: bytes, *, once: bool) -> bool:
    """Sends a request over a connection of this process. Returns whether FIONREAD works for the client's end then.

    Raises:
        SocketRefusedError: The server did not get exactly the headers more that were to be added.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(_WAIT_S)
        use = uses.Leaf(once=once, rehearsed_port=socket.htons(listener.getsockname()[1]) << 16)
        told = use.rehearsed
        told.trace_id_high, told.trace_id_low = _TRACE_ID >> 64, _TRACE_ID & (1 << 64) - 1
        told.span_id, told.flags, told.head_bytes = _SPAN_ID, 1, len(_REQUEST)
        ctypes.memmove(told.first, _REQUEST, len(told.first))
        uses[ctypes.c_int(0)] = use
        try:
            client = stack.enter_context(socket.create_connection(listener.getsockname(), _WAIT_S))
            server, _ = listener.accept()
            stack.enter_context(server)
            server.settimeout(_WAIT_S)
            if uses[ctypes.c_int(0)].enrolled != 1:
                raise SocketRefusedError("the program at connect() does not see this process's own connection")
            client.sendall(_REQUEST + _BODY)
            line, newline, rest = _REQUEST.partition(b"\r\n")
            expected = line + newline + added + rest + _BODY
            received = b""
            while len(received) < len(expected) and (part := server.recv(65536)):
                received += part
            if received != expected:
                raise SocketRefusedError("a request of this process's own did not arrive as it should")
            server.sendall(b"answer")
            return _waiting_bytes(client) == len(b"answer") == len(client.recv(65536))
        finally:
            uses[ctypes.c_int(0)] = uses.Leaf(once=once)

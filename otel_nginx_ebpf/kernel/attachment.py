"""The live probes on one nginx binary, as the supervisor holds them: only descriptors, no BCC objects, no records."""

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from typing import Any

from otel_nginx_ebpf.errors import TemporaryError
from otel_nginx_ebpf.kernel.beginnings import BeginningsProbe
from otel_nginx_ebpf.kernel.callers import Callers
from otel_nginx_ebpf.kernel.connections import Connections
from otel_nginx_ebpf.kernel.loader import HELD_MAPS, READABLE_MAPS, loader_command
from otel_nginx_ebpf.kernel.maps import HashMap
from otel_nginx_ebpf.kernel.ring_buffer import CounterArray
from otel_nginx_ebpf.kernel.runs import Runs, runs_of
from otel_nginx_ebpf.traces.losses import KERNEL_CAUSES

_PID = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_SIGNS = struct.Struct("=12xII")
"""struct socket_use (probes/telling.h)."""

# A program of a link that was closed may still run on another processor, for microseconds.
_CALL_S = 0.005

# The kernel passes at most this many descriptors in one message (SCM_MAX_FD).
_DESCRIPTORS_MAX = 253


def _load(request: bytes) -> tuple[list[int], dict[str, Any]]:
    """Runs the loader and waits for its exit. Returns the descriptors that it sent, and its answer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            loader = subprocess.Popen(
                loader_command(answer_socket=theirs.fileno()),
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # so that Ctrl-C reaches this process only
            )
        _, messages = loader.communicate(request)
        message, descriptors, _, _ = socket.recv_fds(ours, 65536, _DESCRIPTORS_MAX)
    if not message:
        raise TemporaryError(
            f"the loader ended without an answer (status {loader.returncode}): {_last_lines(messages) or 'no message'}"
        )
    answer = json.loads(message)
    if "error" in answer:
        raise TemporaryError(f"{answer['error']}\n{_last_lines(messages)}".strip())
    if len(descriptors) != len(answer["maps"]) + answer["probes"] + len(answer["handlers"]) + 2 * bool(
        answer["spared"]
    ):
        raise TemporaryError("the loader's descriptors did not all arrive: raise the limit of open files (ulimit -n)")
    return descriptors, answer


def _last_lines(text: bytes, count: int = 12) -> str:
    return "\n".join(text.decode("utf-8", "replace").strip().splitlines()[-count:])


class Attachment:
    """The live probes on one binary. `close` detaches them; nginx keeps running.

    Raises:
        TemporaryError: BCC is missing, or the kernel refused the program or a probe. The binary is not the cause.
    """

    def __init__(self, request: bytes) -> None:
        """Loads the program and attaches the probes. `request` is a `loader.LoadRequest` as JSON."""
        descriptors, answer = _load(request)
        self._process_bytes: int = answer["process_bytes"]
        self._socket_bytes: int = answer["socket_bytes"]
        self.refused: tuple[str, ...] = tuple(answer["refused"])
        """Why the kernel refused handlers that write to nginx's memory, such as `Invalid argument`."""
        self.on_socket: dict[str, Any] | None = answer["on_socket"]
        """How upstreams are told on the socket. `refused`: why not; `once`: only in a connection's first request."""
        given = iter(descriptors)
        maps = {name: next(given) for name in answer["maps"]}
        self._handlers = {name: next(given) for name in answer["handlers"]}
        self.readable = tuple(maps[name] for name in READABLE_MAPS if name in maps)
        """Descriptors of the maps that the emitter reads."""
        self._held = [maps[name] for name in HELD_MAPS if name in maps]
        self.measures = "measuring" in maps
        """Whether the program counts durations."""
        self._loss_counts = CounterArray(os.dup(maps["loss_counts"]), len(KERNEL_CAUSES))
        self._callers = Callers(maps["callers"])
        self._processes = HashMap(maps["processes"], key_bytes=4)
        self._sockets = HashMap(maps["sockets"], key_bytes=8, value_bytes=self._socket_bytes)
        self._active_requests = HashMap(maps["active_requests"], key_bytes=16)
        self._attempts = HashMap(maps["attempts"], key_bytes=16)
        self.connections: Connections | None = None
        """Counts connections, if the program counts durations and sees system calls."""
        if "accepted_connections" in maps:
            accepted = maps["accepted_connections"]
            self.connections = Connections(self._sockets, answer["socket_client_at"], self._active_requests, accepted)
        self._beginnings: BeginningsProbe | None = None
        if spared := answer["spared"]:
            link, executable = next(given), next(given)
            self._beginnings = BeginningsProbe(
                maps["beginnings"], link, self._handlers[spared["handler"]], executable, spared["file_offset"]
            )
        else:
            os.close(maps["beginnings"])
        self._probes = list(given)
        on_socket_count = (self.on_socket or {}).get("descriptors", 0)
        self._telling = [self._probes.pop() for _ in range(on_socket_count)]
        """What puts connections into the map of sockets, what takes them out, …, that map, the map socket_uses."""
        self._known_processes = set(self._processes.all_keys())

    def adapt(self) -> None:
        """Detaches the probe at the beginning of requests while no request needs it. Call this regularly."""
        if self._beginnings is not None:
            self._beginnings.adapt()

    def losses(self) -> dict[str, int]:
        """Returns the kernel's loss counters by cause, counted since the probes went live."""
        return dict(zip(KERNEL_CAUSES, self._loss_counts.read(), strict=True))

    def runs(self) -> dict[str, Runs]:
        """Returns how often and how long each handler ran while the kernel counted runs (`runs.Counting`)."""
        return {name: runs_of(program) for name, program in self._handlers.items()}

    def add_processes(self, pids: Iterable[int]) -> None:
        """Traces more processes from now on. The loader added the first ones."""
        for pid in pids:
            self._callers.add(pid)
            known_since_ns = _U64.pack(time.monotonic_ns())
            self._processes.add(_PID.pack(pid), known_since_ns.ljust(self._process_bytes, b"\0"))

    def processes(self) -> frozenset[int]:
        """Returns the pids of the traced processes."""
        return frozenset(_PID.unpack(key)[0] for key in self._processes.all_keys())

    def forget_dead_processes(self) -> int:
        """Removes the state of ended processes from the kernel's maps. Returns how many requests they were serving."""
        self._processes.delete_where(lambda key: not os.path.exists(f"/proc/{_PID.unpack(key)[0]}"))
        alive = set(self._processes.all_keys())
        gone, self._known_processes = self._known_processes - alive, alive
        if not gone:
            return 0
        for key in gone:
            self._callers.forget(*_PID.unpack(key))

        def is_dead(key: bytes) -> bool:
            return key[: _PID.size] not in alive

        unmarked = sum(self._runs_unmarked(key) for key in self._sockets.all_keys() if is_dead(key))
        for state in (self._sockets, self._attempts):
            state.delete_where(is_dead)
        return unmarked + self._active_requests.delete_where(is_dead)

    def _runs_unmarked(self, socket: bytes) -> bool:
        value = self._sockets.value(socket, self._socket_bytes)
        return value is not None and _U64.unpack_from(value)[0] != 0

    def stalls(self) -> tuple[int, int]:
        """Returns signs that the kernel does not tell nginx how many bytes a told connection has.

        First how many answers came on connections that should have left the map of sockets by then; second how many
        answers broke off after the kernel had said that there is nothing to read.
        """
        if not self._telling:
            return 0, 0
        assert self.on_socket is not None
        value = HashMap(self._telling[-1], key_bytes=4).value(bytes(4), self.on_socket["use_bytes"])
        overstayed, stalled = _SIGNS.unpack_from(value) if value else (0, 0)
        return overstayed, stalled

    def stop_telling(self) -> None:
        """Ends telling upstreams on the socket. Takes all sockets out of the map before the map goes.

        The kernel empties the map only some time after nobody holds it. Until then nginx could not learn how many bytes
        its sockets have (FIONREAD).
        """
        if not self._telling:
            return
        enrolling, *others = self._telling
        self._telling = []
        os.close(enrolling)
        sockets = HashMap(others[-2], key_bytes=8)
        sockets.delete_where(lambda _: True)
        time.sleep(_CALL_S)
        sockets.delete_where(lambda _: True)
        for descriptor in others:
            os.close(descriptor)

    def detach(self) -> None:
        """Removes the probes. Records that are already in the ring buffer stay readable."""
        self.stop_telling()
        for descriptor in reversed(self._probes):
            os.close(descriptor)
        self._probes = []
        if self._beginnings is not None:
            self._beginnings.close()
            self._beginnings = None

    def abandon(self) -> tuple[int, ...]:
        """Detaches and closes all descriptors except `readable`. Returns `readable`, which the caller then owns."""
        self.detach()
        for descriptor in (*self._handlers.values(), *self._held):
            os.close(descriptor)
        self._handlers, self._held = {}, []
        self._loss_counts.close()
        if self.connections is not None:
            self.connections.close()
        for state in (self._callers, self._processes, self._sockets, self._active_requests, self._attempts):
            state.close()
        return self.readable

    def close(self) -> None:
        """Detaches and closes all descriptors."""
        for descriptor in self.abandon():
            os.close(descriptor)

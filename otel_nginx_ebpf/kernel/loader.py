"""The short-lived process that uses BCC and LLVM. It compiles, loads, attaches, sends the descriptors and exits.

The probes live as long as their descriptors are open. So the parent, which may run for years, never holds BCC's
hundred megabytes. The loader reads a JSON request from standard input. It sends a JSON answer, with the descriptors, to
the unix socket that is descriptor 3.
"""

import ctypes
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from typing import Any

from otel_nginx_ebpf.kernel import socket_propagation, uprobes
from otel_nginx_ebpf.kernel.callers import Callers

_DISTRIBUTION_PACKAGES = "/usr/lib/python3/dist-packages"

HANDED_OVER_MAPS = (
    "records",
    "loss_counts",
    "callers",
    "processes",
    "sockets",
    "active_requests",
    "attempts",
    "beginnings",
)

DURATION_MAPS = ("server_durations", "client_durations", "response_sizes", "worker_loops", "duration_names")

HELD_MAPS = ("measuring", "capturing")
"""Also sent if durations are counted, headers captured. The kernel empties a map of programs that no process holds."""

READABLE_MAPS = ("records", "loss_counts", *DURATION_MAPS)
"""The maps that the emitter gets. No program that writes to nginx's memory reads any of them."""

ANSWER_SOCKET = 3


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A uprobe: the name of its handler function in the program, and its offset in the executable's file in bytes."""

    handler: str
    file_offset: int
    writes: bool = False
    """The handler writes to nginx's memory. A kernel may refuse it; the other probes go live anyway."""
    spared: bool = False
    """The parent may detach the probe and attach it again. It gets more descriptors for this."""


@dataclass(frozen=True, slots=True)
class CapturedHeader:
    """A header that the program copies. `kind` is its string kind in the record; `name` is in lower case."""

    kind: int
    name: str
    redacted: bool


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Everything that the loader needs. `executable` may be a /proc/PID/exe link."""

    text: str
    executable: str
    probes: tuple[ProbeRequest, ...]
    """In the order of attaching. The last probe sends the records. It is detached first, so the others send nothing."""
    tracepoints: dict[str, str]
    """The raw tracepoint of each handler, in the order in which the handlers must run."""
    pids: tuple[int, ...]
    """The processes to trace as soon as all probes are attached."""
    request_metrics: bool = False
    """The program counts durations."""
    told_on_socket: tuple[str, ...] = ()
    """The propagators whose headers the program writes on sockets. A kernel may refuse; the probes go live anyway."""
    captured_headers: tuple[CapturedHeader, ...] = ()
    """The headers that the program copies into records."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def loader_command(*arguments: str, answer_socket: int | None = None) -> list[str]:
    """Returns the command that starts the loader. It imports no modules from the current directory (`-P`).

    Args:
        arguments: The loader's own arguments.
        answer_socket: The descriptor that becomes `ANSWER_SOCKET` in the loader.
    """
    # The child calls dup2, so that the socket is descriptor 3 there, whatever its number is here.
    move = "" if answer_socket is None else f"import os; os.dup2({answer_socket}, {ANSWER_SOCKET}); "
    run = f"import runpy; runpy.run_module({__name__!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-P", "-c", move + run, *arguments]


class _LoadError(Exception):
    """An error that the parent shows to the user. `found` says in a few words what is installed instead of BCC."""

    def __init__(self, message: str, found: str = "") -> None:
        super().__init__(message)
        self.found = found


def import_bcc() -> Any:
    """Returns the distribution's module bcc, even inside a virtual environment that does not see system packages."""
    try:
        import bcc
    except ImportError:
        sys.path.append(_DISTRIBUTION_PACKAGES)
        try:
            import bcc
        except ImportError as error:
            raise _LoadError(
                f"BCC's Python bindings are not installed ({error}); install your distribution's package "
                "(Debian, Ubuntu: apt-get install python3-bpfcc)",
                found="none",
            ) from error
    if not hasattr(bcc, "BPF"):
        place = os.path.dirname(bcc.__file__ or "?")
        raise _LoadError(
            f"the package bcc at {place} is not BCC but another project of that name "
            "on PyPI; uninstall it (pip uninstall bcc) and install your distribution's python3-bpfcc",
            found=f"another project's package at {place}",
        )
    return bcc


def _attach_uprobe(lib: Any, program: int, name: str, executable: str, file_offset: int) -> int:
    """Attaches a program by a BPF link, or by a perf event if the kernel has no links for uprobes.

    Returns the descriptor that keeps the program attached.
    """
    what = f"cannot attach {name} to {executable} at offset {file_offset:#x}"
    if uprobes.links_work():
        try:
            return uprobes.attach(program, executable, file_offset)
        except OSError as error:
            raise _LoadError(f"{what}: {error.strerror}") from error
    # Not BPF.attach_uprobe: it treats an address as a symbol's, and its clean-up at exit would disable the probe.
    # The last argument is the offset of a USDT probe's counter. BCC's Python does not know it. If it is left out, the
    # C function reads an arbitrary number; if that is an offset of nginx's data, the kernel increments nginx's data.
    event = f"{name}_{os.getpid()}".encode()
    descriptor = int(lib.bpf_attach_uprobe(program, 0, event, executable.encode(), file_offset, -1, 0))
    if descriptor < 0:
        raise _LoadError(f"{what}; {uprobes.PERF_EVENTS_ADVICE}")
    return descriptor


def _attach_raw_tracepoint(lib: Any, program: int, name: str) -> int:
    """Attaches a program to a raw tracepoint. Returns the descriptor that keeps it attached."""
    descriptor = int(lib.bpf_attach_raw_tracepoint(program, name.encode()))
    if descriptor < 0:
        raise _LoadError(f"cannot attach to the kernel's tracepoint {name}")
    return descriptor


def _attach_to_sockets(bcc: Any, lib: Any, program: Any, propagators: list[str]) -> tuple[dict[str, Any], list[int]]:
    """Attaches what writes on upstream sockets. Returns `Attachment.on_socket`, and the descriptors that keep it so."""
    try:
        message = program.load_func(b"upstream_message", bcc.BPF.SK_MSG)
        connection = program.load_func(b"upstream_connection", bcc.BPF.SOCK_OPS)
        release = program.load_func(b"released_connection", bcc.BPF.SOCK_OPS)
        teller = program.load_func(b"tell_attempt", bcc.BPF.RAW_TRACEPOINT)
        # BCC's Python does not know maps of this type.
        sockets = int(lib.bpf_table_fd(program.module, b"upstream_sockets"))
        loaded = socket_propagation.Programs(sockets, message.fd, connection.fd, release.fd, program["socket_uses"])
        links, once = socket_propagation.attach(loaded, propagators)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}, []
    program["tellers"][ctypes.c_int(0)] = ctypes.c_int(teller.fd)
    # The kernel empties a map of programs when no process holds the map.
    uses = program["socket_uses"]
    held = (message.fd, connection.fd, release.fd, program["tellers"].map_fd)
    descriptors = [uses.map_fd, sockets, *held, *links]
    return {"once": once, "descriptors": len(descriptors), "use_bytes": ctypes.sizeof(uses.Leaf)}, descriptors


def _load(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    bcc = import_bcc()
    from bcc.libbcc import lib

    with as_file(files("otel_nginx_ebpf.probes") / "stub_headers") as headers:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers)
        try:
            # Without debug information, which takes a fifth of the time to compile.
            program = bcc.BPF(text=request["text"], cflags=["-g0"])
        except Exception as error:
            raise _LoadError(f"the kernel program does not compile or its maps cannot be made: {error}") from error

    names: tuple[str, ...] = HANDED_OVER_MAPS
    if request["request_metrics"]:
        names += (*DURATION_MAPS, "measuring", "accepted_connections")
    if request["captured_headers"]:
        names += ("capturing",)
    maps = [program[name.encode()].map_fd for name in names]
    probes: list[int] = []
    handlers: dict[str, int] = {}
    for name, tracepoint in request["tracepoints"].items():
        handlers[name] = program.load_func(name.encode(), bcc.BPF.RAW_TRACEPOINT).fd
        # Not BPF.attach_raw_tracepoint: it allows one handler for each tracepoint only.
        probes.append(_attach_raw_tracepoint(lib, handlers[name], tracepoint))
    if request["request_metrics"]:
        measure = program.load_func(b"measure_request", bcc.BPF.KPROBE, attach_type=uprobes.ATTACH_TYPE)
        program["measuring"][ctypes.c_int(0)] = ctypes.c_int(measure.fd)
    if request["captured_headers"]:
        capture = program.load_func(b"capture_headers", bcc.BPF.KPROBE, attach_type=uprobes.ATTACH_TYPE)
        program["capturing"][ctypes.c_int(0)] = ctypes.c_int(capture.fd)
        wanted = program["captured_names"]
        for header in request["captured_headers"]:
            key = wanted.Key.from_buffer_copy(header["name"].encode().ljust(ctypes.sizeof(wanted.Key), b"\0"))
            key.text[-1] = header["kind"]
            wanted[key] = wanted.Leaf(header["redacted"])
    refused = {}
    for probe in request["probes"]:
        if probe["writes"]:
            try:
                program.load_func(probe["handler"].encode(), bcc.BPF.KPROBE, attach_type=uprobes.ATTACH_TYPE)
            except Exception as error:
                refused[probe["handler"]] = str(error).rsplit(": ", 1)[-1]
    writes = any(probe["writes"] and probe["handler"] not in refused for probe in request["probes"])
    spared: dict[str, Any] | None = None
    spared_descriptors: list[int] = []
    for probe in request["probes"]:
        if probe["handler"] in refused:
            continue
        handler = program.load_func(probe["handler"].encode(), bcc.BPF.KPROBE, attach_type=uprobes.ATTACH_TYPE)
        probes.append(_attach_uprobe(lib, handler.fd, probe["handler"], request["executable"], probe["file_offset"]))
        handlers[probe["handler"]] = handler.fd
        # The handler that writes keeps its decision in the state that the spared probe makes.
        if probe["spared"] and not writes and uprobes.links_work():
            spared, spared_descriptors = probe, [probes.pop(), os.open(request["executable"], os.O_PATH)]
    on_socket: dict[str, Any] | None = None
    if propagators := request["told_on_socket"]:
        on_socket, socket_descriptors = _attach_to_sockets(bcc, lib, program, propagators)
        probes += socket_descriptors
    # After all probes are attached: if only some of them saw a request, its record would contradict itself.
    processes = program["processes"]
    callers = Callers(program["callers"].map_fd)
    for pid in request["pids"]:
        callers.add(pid)
        processes[ctypes.c_uint(pid)] = processes.Leaf(known_since_ns=time.monotonic_ns())
    program["live"][ctypes.c_int(0)] = ctypes.c_uint(1)
    answer = {
        "maps": names,
        "probes": len(probes),
        "handlers": list(handlers),
        "spared": spared,
        "refused": list(refused.values()),
        "on_socket": on_socket,
        "process_bytes": ctypes.sizeof(processes.Leaf),
        "socket_bytes": ctypes.sizeof(program["sockets"].Leaf),
        "socket_client_at": program["sockets"].Leaf.client.offset,
    }
    # If the process that holds the descriptors is killed, the kernel closes the last descriptor first (task_work_run).
    return answer, [*maps, *handlers.values(), *spared_descriptors, *probes]


def _tell_version() -> dict[str, str]:
    try:
        bcc = import_bcc()
    except _LoadError as error:
        return {"found": error.found, "error": str(error)}
    return {"found": f"{getattr(bcc, '__version__', 'of unknown version')} at {os.path.dirname(bcc.__file__)}"}


def main() -> None:
    """Runs the loader (`loader_command`); never called in the parent. `--version` prints which BCC it finds."""
    if sys.argv[1:] == ["--version"]:
        print(json.dumps(_tell_version()))
        return
    request = json.loads(sys.stdin.buffer.read())
    with socket.socket(fileno=ANSWER_SOCKET) as answer:
        try:
            report, descriptors = _load(request)
        except _LoadError as error:
            answer.sendall(json.dumps({"error": str(error)}).encode())
            os._exit(1)
        except Exception as error:
            answer.sendall(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            os._exit(1)
        socket.send_fds(answer, [json.dumps(report).encode()], descriptors)
    # Not sys.exit: BCC's clean-up would detach the probes that were just handed over.
    os._exit(0)


if __name__ == "__main__":
    main()

"""Finds the nginx instances, each a master and its workers, that run on this host or in its containers."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from otel_nginx_ebpf.errors import UserError

FileIdentity = tuple[int, int, int]
"""Device, inode and modification time in nanoseconds of an executable. They identify a program in every path and
container. Without the time, a new file that reuses the inode of a deleted file would look like the deleted file."""

# The names of the executables of nginx and its forks in distributions, and the beginnings of their process titles.
_NAMES = {"angie", "freenginx", "nginx", "openresty", "tengine"}
_TITLES = ("nginx: ", "angie: ")

# A process is examined this many times, because nginx sets its title a moment after it has started.
_EXAMINATIONS = 3


@dataclass(frozen=True, slots=True)
class Instance:
    """A running nginx. `pids` starts with the master (or the single process); its children follow."""

    pids: tuple[int, ...]
    file_identity: FileIdentity

    @property
    def master_pid(self) -> int:
        return self.pids[0]

    @property
    def executable(self) -> Path:
        """The executable's path in /proc. It opens the running file, even if its own path is replaced or hidden."""
        return Path(f"/proc/{self.master_pid}/exe")

    @property
    def workers(self) -> int:
        """The number of processes that serve requests."""
        return sum(_has_role(pid, "worker process") for pid in self.pids[1:]) or 1

    @property
    def is_running(self) -> bool:
        return _same_file(self.master_pid, self.file_identity)

    @property
    def shares_our_pid_namespace(self) -> bool:
        """Tells whether nginx has the same pid namespace as this process. True if nginx has ended."""
        try:
            return pid_namespace(self.master_pid) == pid_namespace()
        except OSError:
            return True


def pid_namespace(pid: int | None = None) -> tuple[int, int]:
    """Returns device and inode of a process's pid namespace, by default this process's."""
    status = os.stat(f"/proc/{'self' if pid is None else pid}/ns/pid")
    return status.st_dev, status.st_ino


def file_identity(pid: int) -> FileIdentity:
    """Returns the identity of a process's executable. Raises `OSError` if the process is gone or access is denied."""
    status = os.stat(f"/proc/{pid}/exe")
    return status.st_dev, status.st_ino, status.st_mtime_ns


def title(pid: int) -> str:
    """Returns a process's command line, which holds nginx's role (ngx_setproctitle). Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _same_file(pid: int, identity: FileIdentity) -> bool:
    try:
        return file_identity(pid) == identity
    except OSError:
        return False


def _instance(pid: int) -> Instance:
    """Returns the instance of a master or worker. Raises psutil and OS errors if the process ends meanwhile."""
    master = psutil.Process(pid)
    identity = file_identity(pid)
    # A worker's parent is its master. After an upgrade on the fly (USR2) a master's parent is the old master.
    while not is_master(master.pid) and (parent := master.parent()) is not None and _same_file(parent.pid, identity):
        master = parent
    children = [
        child.pid for child in master.children() if _same_file(child.pid, identity) and not is_master(child.pid)
    ]
    return Instance((master.pid, *sorted(children)), identity)


def is_master(pid: int) -> bool:
    """Tells whether a process's title says that it is a master of nginx or of a fork."""
    return _has_role(pid, "master process")


def _has_role(pid: int, role: str) -> bool:
    return title(pid).startswith(tuple(program + role for program in _TITLES))


def _distinct(pids: Iterable[int]) -> tuple[Instance, ...]:
    instances: dict[int, Instance] = {}
    for pid in pids:
        try:
            instance = _instance(pid)
        except (psutil.Error, OSError):
            continue
        instances[instance.master_pid] = instance
    return tuple(instances.values())


def instance_of(pid: int) -> Instance:
    """Returns the instance that a master or worker belongs to.

    Raises:
        UserError: There is no such process, or access to it is denied.
    """
    try:
        return _instance(pid)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        raise UserError(f"--pid {pid}: no such process") from None
    except (psutil.AccessDenied, PermissionError):
        raise UserError(f"--pid {pid}: not allowed to look at it; run as root or with CAP_SYS_PTRACE") from None


class Watch:
    """Finds new instances at each call. Examines only processes that are new or run another program since the last.

    Args:
        binaries: Executables to look for. If empty, every process that looks like nginx counts.
    """

    def __init__(self, binaries: tuple[Path, ...] = ()) -> None:
        self._binaries = binaries
        self._examined: dict[int, tuple[FileIdentity, int]] = {}

    def new_instances(self) -> tuple[Instance, ...]:
        """Returns the instances with a process that is new or runs another program since the last call."""
        examined: dict[int, tuple[FileIdentity, int]] = {}
        found: list[int] = []
        for pid in psutil.pids():
            try:
                identity = file_identity(pid)
            except OSError:
                continue
            before, times = self._examined.get(pid, (identity, 0))
            times = times if before == identity else 0
            if times < _EXAMINATIONS:
                times += 1
                if self._wanted(pid):
                    found.append(pid)
                    times = _EXAMINATIONS
            examined[pid] = identity, times
        self._examined = examined
        return _distinct(found)

    def _wanted(self, pid: int) -> bool:
        if title(pid).startswith(_TITLES) and not self._binaries:
            return True
        named = any(_runs(pid, path) for path in self._binaries) if self._binaries else _name(pid) in _NAMES
        return named and not is_brief(_arguments(pid))


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def is_brief(arguments: list[str]) -> bool:
    """Tells whether nginx with these arguments only prints, tests or signals, and then exits (ngx_get_options)."""
    following = iter(arguments[1:])
    for argument in following:
        options = argument.removeprefix("-")
        while options:
            option, options = options[0], options[1:]
            if option in "?hvVtTs":
                return True
            if option in "pceg":  # takes the rest of this argument, or the next argument
                if not options:
                    next(following, None)
                break
    return False


def _name(pid: int) -> str:
    """Returns the name of the program's file. Empty for kernel threads and zombies, and if access is denied."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix(" (deleted)")
    except OSError:
        return ""


def _runs(pid: int, path: Path) -> bool:
    try:
        if os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)") == str(path.resolve()):
            return True
        return os.path.samefile(f"/proc/{pid}/exe", path)
    except OSError:
        return False

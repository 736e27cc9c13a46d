"""The nginx instances that run on this host or in its containers: a master and its workers."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from otel_nginx_ebpf.errors import UserError

FileIdentity = tuple[int, int, int]
"""Device, inode and time of the last change of an executable: what is the same program, whatever path or container it
is seen through. Without the time a new file might be taken for a deleted one, whose inode it has."""

# What distributions call the executables of nginx and its forks, and how these begin their processes' titles.
_NAMES = {"angie", "freenginx", "nginx", "openresty", "tengine"}
_TITLES = ("nginx: ", "angie: ")

# A process is examined this often: nginx gives itself its title a moment after it has begun.
_EXAMINATIONS = 3


@dataclass(frozen=True, slots=True)
class Instance:
    """One nginx: `pids` are the master (or the single process) first, then its children."""

    pids: tuple[int, ...]
    file_identity: FileIdentity

    @property
    def master_pid(self) -> int:
        return self.pids[0]

    @property
    def executable(self) -> Path:
        """Through /proc, so that it opens what runs, whatever lies at its path now and in whichever container."""
        return Path(f"/proc/{self.master_pid}/exe")

    @property
    def workers(self) -> int:
        """How many processes serve requests."""
        return sum(_has_role(pid, "worker process") for pid in self.pids[1:]) or 1

    @property
    def is_running(self) -> bool:
        return _same_file(self.master_pid, self.file_identity)

    @property
    def shares_our_pid_namespace(self) -> bool:
        """Whether it counts pids as this process does. True where it has ended: nothing is to be done about it."""
        try:
            return pid_namespace(self.master_pid) == pid_namespace()
        except OSError:
            return True


def pid_namespace(pid: int | None = None) -> tuple[int, int]:
    """Device and inode of a process's pid namespace; without a pid, of this process's."""
    status = os.stat(f"/proc/{'self' if pid is None else pid}/ns/pid")
    return status.st_dev, status.st_ino


def file_identity(pid: int) -> FileIdentity:
    """Raises `OSError` when the process is gone or may not be looked at."""
    status = os.stat(f"/proc/{pid}/exe")
    return status.st_dev, status.st_ino, status.st_mtime_ns


def title(pid: int) -> str:
    """The process's command line; nginx writes its role there (ngx_setproctitle). Empty when it is gone."""
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
    """The instance a master or worker belongs to. Raises psutil and OS errors when it ends meanwhile."""
    master = psutil.Process(pid)
    identity = file_identity(pid)
    # A worker's parent is its master; a master's own, after an upgrade on the fly (USR2), is another instance's.
    while not is_master(master.pid) and (parent := master.parent()) is not None and _same_file(parent.pid, identity):
        master = parent
    children = [
        child.pid for child in master.children() if _same_file(child.pid, identity) and not is_master(child.pid)
    ]
    return Instance((master.pid, *sorted(children)), identity)


def is_master(pid: int) -> bool:
    """Whether a process calls itself a master of nginx or of a fork."""
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
    """The instance that a given master or worker pid belongs to.

    Raises:
        UserError: there is no such process, or it may not be looked at.
    """
    try:
        return _instance(pid)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        raise UserError(f"--pid {pid}: no such process") from None
    except (psutil.AccessDenied, PermissionError):
        raise UserError(f"--pid {pid}: not allowed to look at it; run as root or with CAP_SYS_PTRACE") from None


class Watch:
    """Finds instances, again and again; examines only processes that are new, or run another program, by then.

    Args:
        binaries: Executables to look for; without any, every process that looks like nginx.
    """

    def __init__(self, binaries: tuple[Path, ...] = ()) -> None:
        self._binaries = binaries
        self._examined: dict[int, tuple[FileIdentity, int]] = {}

    def new_instances(self) -> tuple[Instance, ...]:
        """Instances with a process that was not there, or was another program, before."""
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
    """Whether an nginx that was started so only tests, tells or signals, and ends (ngx_get_options)."""
    following = iter(arguments[1:])
    for argument in following:
        options = argument.removeprefix("-")
        while options:
            option, options = options[0], options[1:]
            if option in "?hvVtTs":
                return True
            if option in "pceg":  # takes the rest, or the next one
                if not options:
                    next(following, None)
                break
    return False


def _name(pid: int) -> str:
    """The name of the program's file; nothing for kernel threads, zombies and what may not be looked at."""
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

"""The nginx instances that run on this host: a master and its workers."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from otel_nginx_ebpf.errors import UserError


@dataclass(frozen=True, slots=True)
class Instance:
    """One nginx: `pids` are the master (or the single process) first, then its children."""

    pids: tuple[int, ...]
    executable: Path
    """Through /proc, so that it opens what runs, whatever lies at its path now and in whichever container."""

    @property
    def master_pid(self) -> int:
        return self.pids[0]

    @property
    def workers(self) -> int:
        """Processes that serve requests."""
        return sum(_title(pid).startswith("nginx: worker process") for pid in self.pids[1:]) or 1

    @property
    def file_identity(self) -> tuple[int, int]:
        return _file_identity(self.master_pid)


def _file_identity(pid: int) -> tuple[int, int]:
    status = os.stat(f"/proc/{pid}/exe")
    return status.st_dev, status.st_ino


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _instance(pid: int) -> Instance:
    """The instance a master or worker belongs to. Raises psutil and OS errors when it ends meanwhile."""
    master = psutil.Process(pid)
    identity = _file_identity(pid)
    while (parent := master.parent()) is not None and _same_file(parent.pid, identity):
        master = parent
    children = [child.pid for child in master.children(recursive=True) if _same_file(child.pid, identity)]
    return Instance((master.pid, *sorted(children)), Path(f"/proc/{master.pid}/exe"))


def _same_file(pid: int, identity: tuple[int, int]) -> bool:
    try:
        return _file_identity(pid) == identity
    except OSError:
        return False


def _running_nginx() -> Iterator[int]:
    """Pids of every process that looks like nginx: by its title, or by its program's name."""
    for process in psutil.process_iter(["name", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            _title(process.pid).startswith("nginx: ") or process.info["name"] == "nginx"
        ):
            yield process.pid


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
    except (psutil.NoSuchProcess, FileNotFoundError):
        raise UserError(f"--pid {pid}: no such process") from None
    except (psutil.AccessDenied, PermissionError):
        raise UserError(f"--pid {pid}: not allowed to look at it; run as root or with CAP_SYS_PTRACE") from None


def instances_of_binary(path: Path) -> tuple[Instance, ...]:
    """Every instance that runs the given file.

    Raises:
        UserError: there is no such file, or nothing runs it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"--binary {path}: {error.strerror}") from error
    found = _distinct(
        process.pid for process in psutil.process_iter() if _same_file(process.pid, (status.st_dev, status.st_ino))
    )
    if not found:
        raise UserError(f"--binary {path}: no process runs it; start nginx first")
    return found


def all_instances() -> tuple[Instance, ...]:
    """Every nginx found.

    Raises:
        UserError: there is none.
    """
    found = _distinct(_running_nginx())
    if not found:
        raise UserError("no nginx found: start it, or name it with --pid or --binary")
    return found

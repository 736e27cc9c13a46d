"""Gives up privileges for good (capabilities(7), prctl(2))."""

import ctypes
import os
import pwd
from collections.abc import Collection
from typing import NamedTuple

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.linux import Capability, checked, libc

# linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_DEFAULT_USER = "nobody"
# A group that no other process has. nginx's workers may run as nobody and nogroup, and a process with the same user and
# group as another may read its memory (ptrace(2)).
_DEFAULT_GROUP = 65533


class Account(NamedTuple):
    """The user that the emitter becomes."""

    name: str
    uid: int
    gid: int


class _Header(ctypes.Structure):
    """__user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_VERSION_3 = 0x20080522

# Two __user_cap_data_struct, each of 32 capabilities: effective, permitted, inheritable.
_Sets = ctypes.c_uint32 * 6


def _prctl(option: int, *arguments: int) -> int:
    return checked(libc.prctl(option, *map(ctypes.c_ulong, (*arguments, 0, 0, 0, 0)[:4])))


def _permitted() -> int:
    sets = _Sets()
    checked(libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), sets))
    return sets[1] | sets[4] << 32


def _bound(wanted: int) -> None:
    """Removes all but `wanted` from the bounding set, if this process may do that."""
    if _permitted() >> Capability.SETPCAP & 1:
        for number in range(64):
            if not wanted >> number & 1 and libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
                _prctl(_PR_CAPBSET_DROP, number)


def _limit(wanted: int) -> None:
    """Gives up all capabilities but `wanted`. Raises `UserError` if the system call is refused."""
    header, sets = _Header(_VERSION_3, 0), _Sets()
    checked(libc.capget(ctypes.byref(header), sets))
    for index in range(6):
        sets[index] &= (wanted >> 32 if index > 2 else wanted) & 0xFFFFFFFF
    try:
        checked(libc.capset(ctypes.byref(header), sets))
    except OSError as error:
        raise UserError(
            f"cannot give up capabilities: {error.strerror}; is it a system call filter? Allow capset"
        ) from error


def keep(capabilities: Collection[Capability]) -> None:
    """Gives up all other capabilities, for the calling thread and the programs that it executes."""
    wanted = sum(1 << capability for capability in capabilities)
    _bound(wanted)
    _limit(wanted)


def whose(error: OSError) -> str:
    """Returns the error's text; if a permission is missing, also whose: `Permission denied for nobody, …`."""
    if not isinstance(error, PermissionError):
        return str(error.strerror)
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = f"user {os.geteuid()}"
    return f"{error.strerror} for {name}, who reads requests and sends traces (--user)"


def account(user: str | None) -> Account | None:
    """Returns the user that `give_up` becomes; `None` means that this process keeps its user.

    Args:
        user: A name or a number. By default `nobody`, if this process is root and may become another user.

    Raises:
        UserError: The user does not exist, or this process may not become it.
    """
    may_change = os.geteuid() == 0 and _permitted() >> Capability.SETUID & _permitted() >> Capability.SETGID & 1
    if user is None and not may_change:
        return None
    name = user or _DEFAULT_USER
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise UserError(f"--user {name}: there is no such user") from None
    if found.pw_uid == os.geteuid():
        return None
    if not may_change:
        raise UserError(f"--user {name}: only root, with CAP_SETUID and CAP_SETGID, can become another user")
    return Account(found.pw_name, found.pw_uid, found.pw_gid if user else _DEFAULT_GROUP)


def can_read(who: Account, path: str) -> bool:
    """Returns whether a user could open a file. Only for root, in a process with one thread."""
    groups, gid, uid = os.getgroups(), os.getegid(), os.geteuid()
    os.setgroups([])
    os.setegid(who.gid)
    os.seteuid(who.uid)
    try:
        return os.access(path, os.R_OK, effective_ids=True)
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


def give_up(who: Account | None) -> None:
    """Becomes `who`, without capabilities, without a way to gain any, and unreadable to other processes of that user.

    Only for a process with one thread: each thread has its own capabilities.
    """
    _bound(0)
    if who is not None:
        os.setgroups([])
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _limit(0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)

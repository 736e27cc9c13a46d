"""Reads and deletes the keys of a BPF hash map by its descriptor: bpf(2), without a library."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

# linux/bpf.h, and x86-64's system call number.
_SYS_BPF = 321
_BPF_MAP_DELETE_ELEM = 3
_BPF_MAP_GET_NEXT_KEY = 4

_libc = ctypes.CDLL(None, use_errno=True)


class _KeyAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("next_key", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class HashMap:
    """The keys of a hash map. Owns the map's descriptor."""

    def __init__(self, descriptor: int, key_bytes: int) -> None:
        self._descriptor = descriptor
        self._key_bytes = key_bytes

    def _call(self, command: int, key: ctypes.Array[ctypes.c_char] | None, next_key: int = 0) -> bool:
        """Raises `OSError` unless the call succeeded or there was no such key."""
        attribute = _KeyAttribute(self._descriptor, ctypes.addressof(key) if key is not None else 0, next_key)
        if _libc.syscall(_SYS_BPF, command, ctypes.byref(attribute), ctypes.sizeof(attribute)) == 0:
            return True
        error = ctypes.get_errno()
        if error != errno.ENOENT:
            raise OSError(error, os.strerror(error))
        return False

    def keys(self) -> Iterator[bytes]:
        """Every key, once unless the map changes meanwhile; a change may bring some again, or end the walk early."""
        found = ctypes.create_string_buffer(self._key_bytes)
        current = None
        while self._call(_BPF_MAP_GET_NEXT_KEY, current, ctypes.addressof(found)):
            yield found.raw
            current = ctypes.create_string_buffer(found.raw, self._key_bytes)

    def delete_where(self, unwanted: Callable[[bytes], bool]) -> int:
        """Deletes the keys that `unwanted` is true for; how many."""
        return sum(
            self._call(_BPF_MAP_DELETE_ELEM, ctypes.create_string_buffer(key, self._key_bytes))
            for key in [key for key in self.keys() if unwanted(key)]
        )

    def close(self) -> None:
        os.close(self._descriptor)

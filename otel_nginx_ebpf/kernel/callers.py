"""The map `callers` (probes/maps.c): an array in which each system call of the machine looks for its process first."""

import struct

from otel_nginx_ebpf.kernel.maps import HashMap

_BYTES = 64
_TGID = struct.Struct("=I")
_BITS = 13
_PLACES = 8
_GONE = 2**32 - 1


def place(pid: int) -> int:
    """Returns the first place where a process may be. It may also be at one of the next seven."""
    return (pid * 0x9E3779B1 & 0xFFFFFFFF) >> 32 - _BITS


class Callers:
    """The processes whose system calls the kernel program looks at. Owns its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._map = HashMap(descriptor, key_bytes=4)

    def _at(self, pid: int) -> dict[bytes, int]:
        """Returns what is at the places where a process may be: a pid, 0 (nobody was there), or _GONE."""
        keys = [_TGID.pack((place(pid) + step) % 2**_BITS) for step in range(_PLACES)]
        return {key: _TGID.unpack_from(self._map.value(key, _BYTES) or bytes(_BYTES))[0] for key in keys}

    def add(self, pid: int) -> bool:
        """Adds a process. Returns whether there was room; there is, unless hundreds of pids share few places."""
        there = self._at(pid)
        if pid in there.values():
            return True
        free = next((key for key, found in there.items() if found in (0, _GONE)), None)
        if free is None:
            return False
        self._map.put(free, _TGID.pack(pid).ljust(_BYTES, b"\0"))
        return True

    def forget(self, pid: int) -> None:
        """Removes a process. The kernel program does so itself when a process ends, unless it misses the end."""
        for key, found in self._at(pid).items():
            if found == pid:
                self._map.put(key, _TGID.pack(_GONE).ljust(_BYTES, b"\0"))

    def close(self) -> None:
        self._map.close()

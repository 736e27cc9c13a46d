"""BPF maps by their descriptors: make one; walk, fill and clear a hash map."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

from otel_nginx_ebpf.kernel.system_call import bpf

# linux/bpf.h
_BPF_MAP_CREATE = 0
_BPF_MAP_LOOKUP_ELEM = 1
_BPF_MAP_UPDATE_ELEM = 2
_BPF_MAP_DELETE_ELEM = 3
_BPF_MAP_GET_NEXT_KEY = 4
_BPF_MAP_LOOKUP_BATCH = 24

_BPF_NOEXIST = 1

# The number of entries that one system call reads.
_AT_ONCE = 512


class _KeyAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value_or_next_key", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _CreateAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_MAP_CREATE."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("kind", "key_bytes", "value_bytes", "entries"))


class _BatchAttribute(ctypes.Structure):
    """union bpf_attr, the part for BPF_MAP_*_BATCH."""

    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


def create_map(kind: int, key_bytes: int, value_bytes: int, entries: int) -> int:
    """Makes a map and returns its descriptor. Raises `OSError` if the kernel refuses."""
    return bpf(_BPF_MAP_CREATE, _CreateAttribute(kind, key_bytes, value_bytes, entries))


class HashMap:
    """A hash map. Owns its descriptor."""

    def __init__(self, descriptor: int, key_bytes: int, value_bytes: int = 0) -> None:
        """Takes over the descriptor. Only `items` needs `value_bytes`."""
        self._descriptor = descriptor
        self._key_bytes = key_bytes
        self._value_bytes = value_bytes

    def _call(
        self, command: int, key: ctypes.Array[ctypes.c_char] | None, value_or_next_key: int = 0, flags: int = 0
    ) -> bool:
        """Calls bpf(2) for a key. Returns False on ENOENT and EEXIST; raises `OSError` on any other failure."""
        key_address = ctypes.addressof(key) if key is not None else 0
        attribute = _KeyAttribute(self._descriptor, key_address, value_or_next_key, flags)
        try:
            bpf(command, attribute)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST):
                raise
            return False
        return True

    def all_keys(self) -> Iterator[bytes]:
        """Yields every key once. If the map changes meanwhile, some keys may repeat, or the walk may end early."""
        found = ctypes.create_string_buffer(self._key_bytes)
        current = None
        while self._call(_BPF_MAP_GET_NEXT_KEY, current, ctypes.addressof(found)):
            yield found.raw
            current = ctypes.create_string_buffer(found.raw, self._key_bytes)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yields every key with its value, reading hundreds in a system call. Keys added meanwhile may be missing."""
        keys = ctypes.create_string_buffer(_AT_ONCE * self._key_bytes)
        values = ctypes.create_string_buffer(_AT_ONCE * self._value_bytes)
        place = ctypes.c_uint64()  # where the kernel keeps its position between calls
        attribute = _BatchAttribute(0, ctypes.addressof(place), ctypes.addressof(keys), ctypes.addressof(values))
        attribute.map_fd = self._descriptor
        more = True
        while more:
            attribute.count = _AT_ONCE
            try:
                bpf(_BPF_MAP_LOOKUP_BATCH, attribute)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                more = False
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(attribute.count):
                key, value = index * self._key_bytes, index * self._value_bytes
                yield raw_keys[key : key + self._key_bytes], raw_values[value : value + self._value_bytes]
            attribute.in_batch = ctypes.addressof(place)

    def value(self, key: bytes, value_bytes: int) -> bytes | None:
        """Returns the value of a key, or None. `value_bytes` must be the size of the map's values."""
        value = ctypes.create_string_buffer(value_bytes)
        raw_key = ctypes.create_string_buffer(key, self._key_bytes)
        return value.raw if self._call(_BPF_MAP_LOOKUP_ELEM, raw_key, ctypes.addressof(value)) else None

    def add(self, key: bytes, value: bytes) -> None:
        """Adds a key with its value unless the map has the key. Raises `OSError` if the map is full."""
        raw_value = ctypes.create_string_buffer(value, len(value))
        raw_key = ctypes.create_string_buffer(key, self._key_bytes)
        self._call(_BPF_MAP_UPDATE_ELEM, raw_key, ctypes.addressof(raw_value), _BPF_NOEXIST)

    def put(self, key: bytes, value: bytes) -> None:
        """Sets the value of a key, also of an array. Raises `OSError` if the map is full."""
        raw_value = ctypes.create_string_buffer(value, len(value))
        self._call(_BPF_MAP_UPDATE_ELEM, ctypes.create_string_buffer(key, self._key_bytes), ctypes.addressof(raw_value))

    def delete_where(self, unwanted: Callable[[bytes], bool]) -> int:
        """Deletes the keys for which `unwanted` is true. Returns how many it deleted."""
        return sum(
            self._call(_BPF_MAP_DELETE_ELEM, ctypes.create_string_buffer(key, self._key_bytes))
            for key in [key for key in self.all_keys() if unwanted(key)]
        )

    def close(self) -> None:
        os.close(self._descriptor)

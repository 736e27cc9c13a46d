"""Stops a worker of nginx where the probes are: at functions, and at the end of each system call, by ptrace."""

import ctypes
import os
import signal
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Self

_SINGLESTEP, _GETREGS, _SETREGS, _ATTACH, _DETACH, _SYSCALL, _SETOPTIONS = 9, 12, 13, 16, 17, 24, 0x4200
_O_TRACESYSGOOD = 1
_ALL_THREADS = 0x40000000  # __WALL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long

REGISTERS = struct.Struct("<27Q")
"""struct user_regs_struct; its first 21 are struct pt_regs."""
PT_REGS_BYTES = 21 * 8
_RESULT, _NUMBER, _ADDRESS = 10, 15, 16
_EPOLL_WAIT = 232
_BREAKPOINT = b"\xcc"

Handler = Callable[[bytes], None]
"""Called with the worker's struct pt_regs."""


class StoppedWorker:
    """Calls a handler at each of the addresses, before that instruction, and one at the end of each system call.

    `run` must be called by the thread that made this object.
    """

    def __init__(self, pid: int, at: Mapping[int, Handler], at_system_call: Callable[[bytes, int], None]) -> None:
        self._pid, self._at, self._at_system_call = pid, at, at_system_call
        self.waits = threading.Event()
        """Set while the worker waits for events."""

    def __enter__(self) -> Self:
        self._trace(_ATTACH)
        self._wait()
        self._trace(_SETOPTIONS, _O_TRACESYSGOOD)
        self._memory = os.open(f"/proc/{self._pid}/mem", os.O_RDWR)
        self._replaced = {address: os.pread(self._memory, 1, address) for address in self._at}
        for address in self._at:
            os.pwrite(self._memory, _BREAKPOINT, address)
        return self

    def __exit__(self, *_: object) -> None:
        for address, byte in self._replaced.items():
            os.pwrite(self._memory, byte, address)
        os.close(self._memory)
        self._trace(_DETACH)

    def _trace(self, request: int, data: object = None) -> None:
        if _libc.ptrace(request, self._pid, None, data) == -1:
            raise OSError(ctypes.get_errno(), f"ptrace of {self._pid}, request {request}")

    def _wait(self) -> int:
        """Return the signal that stopped the worker."""
        _, status = os.waitpid(self._pid, _ALL_THREADS)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the worker {self._pid} has ended")
        return os.WSTOPSIG(status)

    def _registers(self) -> list[int]:
        content = ctypes.create_string_buffer(REGISTERS.size)
        self._trace(_GETREGS, ctypes.cast(content, ctypes.c_void_p))
        return list(REGISTERS.unpack(content.raw))

    def _step_over(self, registers: list[int]) -> None:
        address = registers[_ADDRESS]
        content = ctypes.create_string_buffer(REGISTERS.pack(*registers), REGISTERS.size)
        self._trace(_SETREGS, ctypes.cast(content, ctypes.c_void_p))
        os.pwrite(self._memory, self._replaced[address], address)
        self._trace(_SINGLESTEP)
        self._wait()
        os.pwrite(self._memory, _BREAKPOINT, address)

    def run(self) -> None:
        """Let the worker run until somebody sends it SIGSTOP; it then stands still, and does not get the signal."""
        entered = True  # a system call, most likely: the worker was waiting
        while True:
            self._trace(_SYSCALL)
            stopped_by = self._wait()
            if stopped_by == signal.SIGSTOP:
                return
            registers = self._registers()
            if stopped_by == signal.SIGTRAP | 0x80:
                # The kernel sets the result to -ENOSYS before a system call.
                entered = registers[_RESULT] == 2**64 - 38
                waits = registers[_NUMBER] == _EPOLL_WAIT
                if entered:
                    if waits:
                        self.waits.set()
                else:
                    self.waits.clear()
                    result = registers[_RESULT]
                    self._at_system_call(REGISTERS.pack(*registers)[:PT_REGS_BYTES], result)
            elif stopped_by == signal.SIGTRAP:
                registers[_ADDRESS] -= 1
                self._at[registers[_ADDRESS]](REGISTERS.pack(*registers)[:PT_REGS_BYTES])
                self._step_over(registers)
            else:
                raise RuntimeError(f"the worker got signal {stopped_by}")

"""Probes that are live on one nginx binary, seen from the long-lived process: descriptors, and nothing of BCC."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel.loader import ANSWER_SOCKET, LOSS_COUNTS_MAP, RECORDS_MAP, LoadRequest
from otel_nginx_ebpf.kernel.ring_buffer import CounterArray, RingBuffer
from otel_nginx_ebpf.stats import LOSS_CAUSES

# The kernel hands over at most this many descriptors in one message (SCM_MAX_FD).
_DESCRIPTORS_MAX = 253


def _answer(request: LoadRequest) -> tuple[dict[str, object], list[int]]:
    """Runs the loader to its end; its answer and the descriptors it handed over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            # dup2 in the child: descriptor 3 is the socket, whatever its number here.
            loader = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import os, runpy; os.dup2({theirs.fileno()}, {ANSWER_SOCKET}); "
                    "runpy.run_module('otel_nginx_ebpf.kernel.loader', run_name='__main__')",
                ],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
            )
        _, messages = loader.communicate(request.to_json().encode())
        message, descriptors, _, _ = socket.recv_fds(ours, 65536, _DESCRIPTORS_MAX)
    if not message:
        raise UserError(
            f"the loader ended without an answer (status {loader.returncode}): {_last_lines(messages) or 'no message'}"
        )
    answer = json.loads(message)
    if "error" in answer:
        raise UserError(f"{answer['error']}\n{_last_lines(messages)}".strip())
    return answer, descriptors


def _last_lines(text: bytes, count: int = 12) -> str:
    return "\n".join(text.decode("utf-8", "replace").strip().splitlines()[-count:])


class Attachment:
    """Live probes. Close it to detach them; nginx goes on as before.

    Raises:
        UserError: BCC is missing, or the kernel refused the program or a probe.
    """

    def __init__(self, request: LoadRequest, ring_buffer_bytes: int) -> None:
        answer, descriptors = _answer(request)
        names = answer["maps"]
        assert isinstance(names, list)
        maps = dict(zip(names, descriptors, strict=False))
        self._probes = descriptors[len(names) :]
        self._records = RingBuffer(maps[RECORDS_MAP], ring_buffer_bytes)
        self._loss_counts = CounterArray(maps[LOSS_COUNTS_MAP], len(LOSS_CAUSES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        self._records.close()
        self._loss_counts.close()

    def records(self) -> Iterator[bytes]:
        """The records that have come since the last call."""
        return self._records.read()

    def losses(self) -> dict[str, int]:
        """The kernel's loss counters since the probes went live, by cause."""
        return dict(zip(LOSS_CAUSES, self._loss_counts.read(), strict=True))

    def detach(self) -> None:
        """Removes the probes; records that are already in the ring buffer stay readable."""
        for descriptor in self._probes:
            os.close(descriptor)
        self._probes = []

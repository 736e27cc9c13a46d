"""Attaches in a thread of its own, and retries if attaching failed for a reason that may pass."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.nginx.processes import FileIdentity, Instance

_log = logging.getLogger(__name__)

# How long to wait before a retry: twice as long each time.
_RETRY_FIRST_S = 1.0
_RETRY_MAX_S = 300.0

Attached = TypeVar("Attached")


@dataclass(slots=True)
class _Wanted(Generic[Attached]):
    """A binary to attach to."""

    instances: dict[int, Instance] = field(default_factory=dict)
    """By the pid of the master process."""
    attempt: Future[Attached] | None = None
    attempted: tuple[Instance, ...] = ()
    due_s: float = 0.0
    """When the next attempt begins."""
    retry_s: float = _RETRY_FIRST_S
    told: bool = False


class Attaching(Generic[Attached]):
    """The binaries that are being attached to, and those that wait for a retry.

    `attach` is called with instances of one binary, in another thread, and may raise `UserError`.
    """

    def __init__(self, attach: Callable[[tuple[Instance, ...]], Attached]) -> None:
        self._attach = attach
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attach")
        self._wanted: dict[FileIdentity, _Wanted[Attached]] = {}

    def __contains__(self, identity: FileIdentity) -> bool:
        return identity in self._wanted

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def want(self, *instances: Instance) -> None:
        """Attaches to the binary that the instances run: now, or when its retry is due."""
        wanted = self._wanted.setdefault(instances[0].file_identity, _Wanted())
        wanted.instances |= {instance.master_pid: instance for instance in instances}
        self._begin_if_due(wanted)

    def attempt(self, instances: tuple[Instance, ...]) -> Future[Attached]:
        """Attaches to the binary that the instances run, once. After a `TemporaryError` the caller calls `postpone`."""
        return self._thread.submit(self._attach_to_those_left, instances)

    def postpone(self, instances: tuple[Instance, ...], error: TemporaryError) -> None:
        """Retries later, if an instance of the binary then still runs."""
        wanted = self._wanted.setdefault(instances[0].file_identity, _Wanted())
        wanted.instances |= {instance.master_pid: instance for instance in instances}
        wanted.attempt = None
        wanted.due_s = time.monotonic() + wanted.retry_s
        wanted.retry_s = min(2 * wanted.retry_s, _RETRY_MAX_S)
        if not wanted.told and any(instance.is_running for instance in instances):
            wanted.told = True
            _log.error("not traced yet: %s; trying again", error)

    def ended(self) -> Iterator[tuple[tuple[Instance, ...], Attached | UserError]]:
        """Yields the attempts that succeeded, or failed for good; starts the retries that are due."""
        for identity, wanted in list(self._wanted.items()):
            if wanted.attempt is None:
                self._begin_if_due(wanted)
                if wanted.attempt is None and time.monotonic() >= wanted.due_s:
                    del self._wanted[identity]  # all instances have ended
            elif wanted.attempt.done():
                try:
                    outcome: Attached | UserError = wanted.attempt.result()
                except TemporaryError as error:
                    self.postpone(wanted.attempted, error)
                    continue
                except UserError as error:
                    outcome = error
                del self._wanted[identity]
                yield tuple(wanted.instances.values()), outcome

    def _begin_if_due(self, wanted: _Wanted[Attached]) -> None:
        if wanted.attempt is None and time.monotonic() >= wanted.due_s:
            wanted.attempted = tuple(instance for instance in wanted.instances.values() if instance.is_running)
            wanted.instances = {instance.master_pid: instance for instance in wanted.attempted}
            if wanted.attempted:
                wanted.attempt = self.attempt(wanted.attempted)

    def _attach_to_those_left(self, instances: tuple[Instance, ...]) -> Attached:
        """Attaches, without the instances that end meanwhile: `nginx -t` ends at once."""
        while True:
            try:
                return self._attach(instances)
            except TemporaryError:
                running = tuple(instance for instance in instances if instance.is_running)
                if not running or len(running) == len(instances):
                    raise
                instances = running

    def end(self) -> list[Attached]:
        """Starts no more attempts, waits for the running ones, and returns what they attached."""
        self._thread.shutdown(cancel_futures=True)
        begun = [
            wanted.attempt for wanted in self._wanted.values() if wanted.attempt and not wanted.attempt.cancelled()
        ]
        self._wanted.clear()
        return [attempt.result() for attempt in begun if attempt.exception() is None]

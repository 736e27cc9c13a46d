"""The nginx binaries being traced: attached when found, refused when they contradict themselves, let go when gone."""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.kernel import preflight
from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.nginx.processes import FileIdentity, Instance, Watch, instance_of
from otel_nginx_ebpf.nginx.resource import instance_attributes
from otel_nginx_ebpf.planner.client import Target, make_target
from otel_nginx_ebpf.process import health, stdio
from otel_nginx_ebpf.process.channel import SupervisorEnd
from otel_nginx_ebpf.process.messages import Alive, Attached, Belongs, Kind, Lost, Measured, Retired
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.supervisor.attaching import Attaching
from otel_nginx_ebpf.supervisor.cost_limit import Guard
from otel_nginx_ebpf.traces import silence

_log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int]
"""Of the resource that an instance is."""

# How soon a signal is noticed.
TICK_S = 0.1


def find_instances(settings: Settings, watch: Watch) -> tuple[Instance, ...]:
    """The nginx instances that are wanted and run now.

    Raises:
        UserError: There is none, and none is to be waited for; or a process that was named is none.
    """
    if settings.pid:
        return tuple({instance.master_pid: instance for instance in map(instance_of, settings.pid)}.values())
    found = watch.new_instances()
    if not found and settings.wait:
        return ()
    for path in settings.binary:
        if not path.exists():
            raise UserError(f"--binary {path}: no such file")
    if not found and settings.binary:
        raise UserError(f"--binary {', '.join(map(str, settings.binary))}: no process runs it; start nginx first")
    if not found:
        raise UserError("no nginx found: start it, name it with --pid or --binary, or wait for it with --wait")
    return found


def by_binary(instances: tuple[Instance, ...]) -> tuple[tuple[Instance, ...], ...]:
    """The instances grouped by the executable they run."""
    groups: dict[FileIdentity, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.file_identity, []).append(instance)
    return tuple(map(tuple, groups.values()))


class _TracedBinary:
    """One binary's live probes, and the instances whose requests they see."""

    def __init__(self, number: int, target: Target, instances: tuple[Instance, ...], attachment: Attachment) -> None:
        self.number = number
        """What the emitter knows it by."""
        self.target = target
        self.instances = instances
        """The latest of each master's."""
        self.attachment = attachment
        self._refuted: set[int] = set()
        """Masters of instances whose memory contradicts the layout."""
        self._resource_of: dict[int, Attributes] = {}
        for instance in instances:
            self.add(instance)

    @property
    def identity(self) -> FileIdentity:
        return self.instances[0].file_identity

    def add(self, instance: Instance) -> None:
        attributes = instance_attributes(instance, self.target.service_version)
        self.instances = tuple({each.master_pid: each for each in (*self.instances, instance)}.values())
        self._resource_of |= dict.fromkeys(instance.pids, attributes)

    def refute(self, pid: int) -> list[Instance]:
        """Takes note of a worker whose memory contradicts the layout. Returns what runs, and is not of that kind."""
        running = [instance for instance in self.instances if instance.is_running]
        try:
            self._refuted.add(instance_of(pid).master_pid)
        except UserError:  # it has ended since; where there is but one instance, it was that one's
            self._refuted.update(
                instance.master_pid for instance in running if len(running) == 1 or pid in instance.pids
            )
        return [instance for instance in running if instance.master_pid not in self._refuted]

    def resource(self, pid: int) -> Attributes:
        """The resource attributes of the instance that a worker belongs to; none where that is no such."""
        found = self._resource_of.get(pid)
        if found is None:
            found = self._resource_of[pid] = self._find_resource(pid)
        return found

    def _find_resource(self, pid: int) -> Attributes:
        try:
            instance = instance_of(pid)
        except UserError:  # it has ended since; where there is but one instance, it was that one's
            known = {id(attributes): attributes for attributes in self._resource_of.values()}
            return next(iter(known.values())) if len(known) == 1 else {}
        if instance.file_identity != self.identity:
            return {}
        known_master = self._resource_of.get(instance.master_pid)
        return known_master or instance_attributes(instance, self.target.service_version)


class Tracing:
    """All live probes. Call `begin`, then `sweep` and `serve` again and again, then `detach`, `serve` and `end`."""

    def __init__(self, settings: Settings, emitter: SupervisorEnd) -> None:
        self._settings = settings
        self._emitter = emitter
        self._watch = Watch(settings.binary)
        self._numbers = itertools.count(1)
        self._traced: dict[FileIdentity, _TracedBinary] = {}
        self._retired: list[_TracedBinary] = []
        """Detached since the last sweep; the emitter may still ask of their processes."""
        self._refused: dict[FileIdentity, str] = {}
        self._silent: dict[FileIdentity, frozenset[str]] = {}
        self._attaching = Attaching(self._attach)
        self._guard = Guard(settings)
        self._paused: dict[FileIdentity, list[Instance]] = {}
        """Detached from for a while, as a limit was passed."""
        self._marker: int | None = None
        """Tells the health check that there need be no probes."""

    def begin(self, stop: Sequence[float] = ()) -> None:
        """Attaches to what runs now; to no more binaries once there is something in `stop`.

        Raises:
            UserError: Nothing can be traced.
            EmitterGoneError: As `serve`.
        """
        preflight.check()
        if self._settings.wait:
            self._marker = os.memfd_create(health.WAITS)
        instances = find_instances(self._settings, self._watch)
        if not instances:
            _log.warning("no nginx runs yet; waiting for one")
        groups = by_binary(instances)
        # Of several that were found, one that cannot be traced does not keep the others from it.
        must = bool(self._settings.pid or self._settings.binary) or len(groups) == 1
        for group in groups:
            if stop:
                return
            attempt = self._attaching.attempt(group)
            while not attempt.done():
                self.serve(TICK_S)
            try:
                self._went_live(attempt.result())
            except TemporaryError as error:
                run = any(instance.is_running for instance in group)
                if self._settings.pid and not run:
                    raise UserError(f"--pid {group[0].master_pid}: it has ended") from error
                if must and run:
                    raise
                self._attaching.postpone(group, error)
            except UserError as error:
                if must:
                    raise
                self._refuse(group[0].file_identity, str(error))
        self._require_something()
        if instances and not self._traced and not any(instance.is_running for instance in instances):
            _log.warning("every nginx that was found has ended; waiting for another")

    def _attach(self, instances: tuple[Instance, ...]) -> _TracedBinary:
        silent = self._silent.get(instances[0].file_identity, frozenset())
        target, load_request = make_target(instances, self._settings, silent)
        attachment = Attachment(load_request)
        for instance in instances:  # workers that began after they were listed; the kernel program finds later ones
            with suppress(UserError):  # it has ended
                attachment.add_processes(instance_of(instance.master_pid).pids)
        if attachment.refused:
            _log.warning(
                "--propagate does nothing: the kernel does not take the program that writes to nginx's memory (%s; the "
                "usual reasons are lockdown and no CAP_SYS_ADMIN); requests are traced, and applications are not told",
                attachment.refused[0],
            )
        return _TracedBinary(next(self._numbers), target, instances, attachment)

    def _went_live(self, traced: _TracedBinary) -> None:
        self._traced[traced.identity] = traced
        self._guard.attached(traced.identity)
        target = traced.target
        self._emitter.tell(
            Attached(traced.number, str(target), target.layout_source, tuple(traced.attachment.readable))
        )
        stdio.say(target.ready_line(traced.instances))

    def _refuse(self, identity: FileIdentity, reason: str) -> None:
        self._refused[identity] = reason
        _log.error("not traced: %s", reason)

    def _require_something(self) -> None:
        if not self._traced and not self._attaching and self._refused:
            raise UserError("nothing is left to trace: " + "; ".join(self._refused.values()))

    def sweep(self) -> None:
        """Looks for nginx that has come, and forgets what has gone. Raises `UserError` and `EmitterGoneError`."""
        for traced in self._retired:
            traced.attachment.close()
        self._retired.clear()
        if self._settings.pid:
            self._find_new_workers()
        else:
            for instance in self._watch.new_instances():
                self._found(instance)
        for instances, outcome in self._attaching.ended():
            if isinstance(outcome, UserError):
                self._refuse(instances[0].file_identity, str(outcome))
                continue
            self._went_live(outcome)
            for instance in instances:  # some were found while it was attached
                if instance.is_running:
                    self._found(instance)
        for traced in list(self._traced.values()):
            if lost := traced.attachment.forget_dead_processes():
                self._emitter.tell(Lost("lost_worker_gone", lost))
            if traced.attachment.measures:
                self._emitter.tell(Alive(traced.number, sorted(traced.attachment.processes())))
            if not self._settings.pid and not traced.attachment.processes():
                _log.info("%s has ended", traced.target)
                self._retire(traced)
            else:
                self._look_after(traced)
        self._resume()

    def _look_after(self, traced: _TracedBinary) -> None:
        """Detaches where tracing takes or loses more than is allowed."""
        reading = self._guard.look(traced.identity, traced.attachment)
        if reading:
            passed = bool(reading.because)
            self._emitter.tell(Measured(traced.number, reading.cost_ns, reading.hits, passed))
            if passed:
                _log.warning("%s: %s", traced.target, reading.because)
                self._retire(traced)
                self._paused[traced.identity] = list(traced.instances)

    def _resume(self) -> None:
        """Attaches to what has been let alone for long enough, and still runs."""
        for identity in [identity for identity in self._paused if self._guard.may_attach(identity)]:
            masters = {instance.master_pid for instance in self._paused.pop(identity) if instance.is_running}
            with suppress(UserError):  # it has ended since
                if masters:
                    instances = tuple(map(instance_of, sorted(masters)))
                    self._attaching.want(*instances)

    def _find_new_workers(self) -> None:
        """Of the instances that were named; where the kernel program cannot follow forks it does not know them."""
        for traced in self._traced.values():
            for instance in traced.instances:
                if not instance.shares_our_pid_namespace or self._settings.detail == "request":
                    with suppress(UserError):
                        traced.attachment.add_processes(instance_of(instance.master_pid).pids)

    def _found(self, instance: Instance) -> None:
        identity = instance.file_identity
        if identity in self._traced:
            self._traced[identity].attachment.add_processes(instance.pids)
            self._traced[identity].add(instance)
        elif identity in self._paused:
            self._paused[identity].append(instance)
        elif identity not in self._refused:
            self._attaching.want(instance)

    def serve(self, timeout_s: float) -> None:
        """Does what the emitter asks for; waits for that, for so long.

        Raises:
            UserError: nginx's memory contradicts its layout, and nothing else is left to trace.
            EmitterGoneError: As `SupervisorEnd.reports`.
        """
        for each in self._traced.values():
            each.attachment.adapt()
        for report in self._emitter.reports(timeout_s):
            known = [*self._traced.values(), *self._retired]
            traced = next((each for each in known if each.number == report.number), None)
            if traced is None:  # it crossed the news that this one is gone
                continue
            if report.kind is Kind.WHOSE:
                self._emitter.tell(Belongs(traced.number, report.pid, traced.resource(report.pid)))
            elif traced not in self._retired:
                if report.kind is Kind.CONTRADICTED:
                    self._contradicted(traced, report.pid)
                elif report.kind is Kind.SILENT:
                    self._avoid_silent(traced)

    def _contradicted(self, traced: _TracedBinary, pid: int) -> None:
        """Lets a binary go when no instance of it is left whose memory may be as its layout says.

        Raises:
            UserError: Nothing is left to trace.
        """
        if left := traced.refute(pid):
            masters = ", ".join(str(instance.master_pid) for instance in left)
            _log.error("%s is traced on: master process %s may agree with its layout", traced.target, masters)
            return
        self._retire(traced)
        self._refuse(
            traced.identity,
            f"{traced.target} does not look in memory as its layout ({traced.target.layout_source}) says; detached. "
            "Is it a patched build?",
        )
        self._require_something()

    def _avoid_silent(self, traced: _TracedBinary) -> None:
        """Attaches anew without the function that is never called: to the next candidate, if there is one."""
        function = traced.target.functions.get(silence.BOUNDARY)
        if function is None:  # known, and said, since it was attached
            return
        self._silent[traced.identity] = self._silent.get(traced.identity, frozenset()) | {function}
        _log.warning("%s is never called in %s", function, traced.target)
        self._retire(traced)
        if instances := tuple(instance for instance in traced.instances if instance.is_running):
            self._attaching.want(*instances)

    def _retire(self, traced: _TracedBinary) -> None:
        """Detaches from a binary; its ring buffer is read once more."""
        del self._traced[traced.identity]
        self._guard.detached(traced.identity)
        traced.attachment.detach()
        self._retired.append(traced)
        self._emitter.tell(Retired(traced.number))

    def detach(self) -> None:
        """Removes all probes. What has come can still be read, and asked about."""
        for traced in self._traced.values():
            traced.attachment.detach()
            self._retired.append(traced)
        self._traced.clear()

    def end(self) -> None:
        """Detaches and gives everything back."""
        for attachment in self._attachments():
            attachment.close()
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None

    def abandon(self) -> list[tuple[int, ...]]:
        """Detaches and gives everything back but the emitter's descriptors, of which nobody knows how much was read."""
        return [attachment.abandon() for attachment in self._attachments()]

    def _attachments(self) -> list[Attachment]:
        """All of them, with no more to come."""
        found = [traced.attachment for traced in (*self._traced.values(), *self._retired, *self._attaching.end())]
        self._traced.clear()
        self._retired.clear()
        return found

"""Decides which nginx binaries are traced, and attaches to them and detaches."""

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
from otel_nginx_ebpf.supervisor import propagation
from otel_nginx_ebpf.supervisor.attaching import Attaching
from otel_nginx_ebpf.supervisor.cost_limit import Guard
from otel_nginx_ebpf.traces import silence

_log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int]
"""Resource attributes of an nginx instance."""

# How long a signal may go unnoticed.
TICK_S = 0.1


def find_instances(settings: Settings, watch: Watch) -> tuple[Instance, ...]:
    """Returns the running nginx instances that the settings ask for.

    Raises:
        UserError: No nginx is running and `--wait` is off, or the named process is not nginx.
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
    """Groups instances by the executable that they run."""
    groups: dict[FileIdentity, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.file_identity, []).append(instance)
    return tuple(map(tuple, groups.values()))


class _TracedBinary:
    """The live probes of one binary, and the instances that run it."""

    def __init__(self, number: int, target: Target, instances: tuple[Instance, ...], attachment: Attachment) -> None:
        self.number = number
        """Number of the attachment, for messages to the emitter."""
        self.target = target
        self.instances = instances
        """The last that was found of each master process."""
        self.attachment = attachment
        self._refuted: set[int] = set()
        """Pids of master processes whose instance contradicts the layout."""
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
        """Notes that a worker's memory contradicts the layout. Returns the running instances that do not."""
        running = [instance for instance in self.instances if instance.is_running]
        try:
            self._refuted.add(instance_of(pid).master_pid)
        except UserError:  # the worker has ended; if only one instance runs, the worker was that instance's
            self._refuted.update(
                instance.master_pid for instance in running if len(running) == 1 or pid in instance.pids
            )
        return [instance for instance in running if instance.master_pid not in self._refuted]

    def resource(self, pid: int) -> Attributes:
        """Returns the resource attributes of a worker's instance; no attributes if the instance cannot be found."""
        found = self._resource_of.get(pid)
        if found is None:
            found = self._resource_of[pid] = self._find_resource(pid)
        return found

    def _find_resource(self, pid: int) -> Attributes:
        try:
            instance = instance_of(pid)
        except UserError:  # the worker has ended; if only one instance is known, the worker was that instance's
            known = {id(attributes): attributes for attributes in self._resource_of.values()}
            return next(iter(known.values())) if len(known) == 1 else {}
        if instance.file_identity != self.identity:
            return {}
        known_master = self._resource_of.get(instance.master_pid)
        return known_master or instance_attributes(instance, self.target.service_version)


class Tracing:
    """Owns all live probes. Call `begin`, then `sweep` and `serve` repeatedly, then `detach`, `serve` and `end`."""

    def __init__(self, settings: Settings, emitter: SupervisorEnd) -> None:
        self._settings, self._refused_ways = propagation.possible(settings)
        self._emitter = emitter
        self._watch = Watch(settings.binary)
        self._numbers = itertools.count(1)
        self._traced: dict[FileIdentity, _TracedBinary] = {}
        self._retired: list[_TracedBinary] = []
        """Binaries detached since the last sweep; the emitter may still ask about their processes."""
        self._refused: dict[FileIdentity, str] = {}
        self._silent: dict[FileIdentity, frozenset[str]] = {}
        self._attaching = Attaching(self._attach)
        self._guard = Guard(settings)
        self._paused: dict[FileIdentity, list[Instance]] = {}
        """Instances of binaries that passed a limit, until it is time to attach again."""
        self._marker: int | None = None
        """Descriptor of the file that tells the health check that no probes are needed."""

    def begin(self, stop: Sequence[float] = ()) -> None:
        """Attaches to the nginx instances that run now. Stops between two binaries when a signal is in `stop`.

        Raises:
            UserError: Nothing can be traced.
            EmitterGoneError: The emitter has ended.
        """
        preflight.check()
        if self._settings.wait:
            self._marker = os.memfd_create(health.WAITS)
        instances = find_instances(self._settings, self._watch)
        if not instances:
            _log.warning("no nginx runs yet; waiting for one")
        groups = by_binary(instances)
        # If several binaries were found, one that cannot be traced is not an error.
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
        target, load_request = make_target(instances, propagation.reachable(self._settings, instances), silent)
        attachment = Attachment(load_request)
        for instance in instances:  # workers that started after the list was made; the kernel program finds later ones
            with suppress(UserError):  # the instance has ended
                attachment.add_processes(instance_of(instance.master_pid).pids)
        told = propagation.describe(attachment, self._settings, self._refused_ways)
        if told.startswith(", propagates nothing"):
            _log.warning("--propagate does nothing%s", told.removeprefix(", propagates nothing"))
        return _TracedBinary(next(self._numbers), target, instances, attachment)

    def _went_live(self, traced: _TracedBinary) -> None:
        self._traced[traced.identity] = traced
        self._guard.attached(traced.identity)
        target = traced.target
        self._emitter.tell(
            Attached(traced.number, str(target), target.layout_source, tuple(traced.attachment.readable))
        )
        stdio.say(
            target.ready_line(traced.instances)
            + propagation.describe(traced.attachment, self._settings, self._refused_ways)
        )

    def _refuse(self, identity: FileIdentity, reason: str) -> None:
        self._refused[identity] = reason
        _log.error("not traced: %s", reason)

    def _require_something(self) -> None:
        if not self._traced and not self._attaching and self._refused:
            raise UserError("nothing is left to trace: " + "; ".join(self._refused.values()))

    def sweep(self) -> None:
        """Looks for nginx instances that started, and detaches from those that ended.

        Raises:
            UserError: Nothing is left to trace.
            EmitterGoneError: The emitter has ended.
        """
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
            for instance in instances:  # some were found while the binary was being attached
                if instance.is_running:
                    self._found(instance)
        for traced in list(self._traced.values()):
            if lost := traced.attachment.forget_dead_processes():
                self._emitter.tell(Lost("lost_worker_gone", lost))
            self._tell_alive(traced)
            if not self._settings.pid and not traced.attachment.processes():
                _log.info("%s has ended", traced.target)
                self._retire(traced)
            else:
                self._look_after(traced)
        self._resume()

    def _tell_alive(self, traced: _TracedBinary, *, last: bool = False) -> None:
        """Tells what the metrics of requests need. `last`: nothing comes after it."""
        if not traced.attachment.measures:
            return
        living = sorted(traced.attachment.processes())
        connections = traced.attachment.connections
        serving = connections.look(living, at_once=last) if connections else None
        self._emitter.tell(Alive(traced.number, living, serving))
        if connections and serving is not None:  # a worker may have begun meanwhile
            connections.forget({*living, *traced.attachment.processes()})

    def _look_after(self, traced: _TracedBinary) -> None:
        """Detaches from a binary if tracing it costs or loses more than the user allows."""
        propagation.watch(traced.attachment, str(traced.target))
        reading = self._guard.look(traced.identity, traced.attachment)
        if reading:
            passed = bool(reading.because)
            self._emitter.tell(Measured(traced.number, reading.cost_ns, reading.hits, passed))
            if passed:
                _log.warning("%s: %s", traced.target, reading.because)
                self._retire(traced)
                self._paused[traced.identity] = list(traced.instances)

    def _resume(self) -> None:
        """Attaches again to the binaries whose pause is over, if they still run."""
        for identity in [identity for identity in self._paused if self._guard.may_attach(identity)]:
            masters = {instance.master_pid for instance in self._paused.pop(identity) if instance.is_running}
            with suppress(UserError):  # the instance has ended
                if masters:
                    instances = tuple(map(instance_of, sorted(masters)))
                    self._attaching.want(*instances)

    def _find_new_workers(self) -> None:
        """Adds new workers of the named instances, if the kernel program cannot follow forks."""
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
        """Answers the emitter's reports; waits up to `timeout_s` seconds for the first.

        Raises:
            UserError: nginx's memory contradicts its layout, and nothing else is left to trace.
            EmitterGoneError: The emitter has ended, or broke the protocol.
        """
        for each in self._traced.values():
            each.attachment.adapt()
        for report in self._emitter.reports(timeout_s):
            known = [*self._traced.values(), *self._retired]
            traced = next((each for each in known if each.number == report.number), None)
            if traced is None:  # the emitter did not know yet that this attachment is gone
                continue
            if report.kind is Kind.WHOSE:
                self._emitter.tell(Belongs(traced.number, report.pid, traced.resource(report.pid)))
            elif traced not in self._retired:
                if report.kind is Kind.CONTRADICTED:
                    self._contradicted(traced, report.pid)
                elif report.kind is Kind.SILENT:
                    self._avoid_silent(traced)

    def _contradicted(self, traced: _TracedBinary, pid: int) -> None:
        """Detaches from a binary if all its running instances contradict its layout.

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
        """Attaches again without the function that is never called; the next candidate takes its place."""
        function = traced.target.functions.get(silence.BOUNDARY)
        if function is None:  # no candidate was left when it was attached, and that was logged
            return
        self._silent[traced.identity] = self._silent.get(traced.identity, frozenset()) | {function}
        _log.warning("%s is never called in %s", function, traced.target)
        self._retire(traced)
        if instances := tuple(instance for instance in traced.instances if instance.is_running):
            self._attaching.want(*instances)

    def _retire(self, traced: _TracedBinary) -> None:
        """Detaches from a binary. The emitter reads its ring buffer once more."""
        del self._traced[traced.identity]
        self._guard.detached(traced.identity)
        traced.attachment.detach()
        self._tell_alive(traced, last=True)
        self._retired.append(traced)
        self._emitter.tell(Retired(traced.number))

    def detach(self) -> None:
        """Removes all probes. The emitter can still read their records and ask about their processes."""
        for traced in self._traced.values():
            traced.attachment.detach()
            self._tell_alive(traced, last=True)
            self._retired.append(traced)
        self._traced.clear()

    def end(self) -> None:
        """Detaches, and closes all descriptors."""
        for attachment in self._attachments():
            attachment.close()
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None

    def abandon(self) -> list[tuple[int, ...]]:
        """Detaches. Closes all descriptors except the maps that a killed emitter may not have read."""
        return [attachment.abandon() for attachment in self._attachments()]

    def _attachments(self) -> list[Attachment]:
        """Returns all attachments; starts no more."""
        found = [traced.attachment for traced in (*self._traced.values(), *self._retired, *self._attaching.end())]
        self._traced.clear()
        self._retired.clear()
        return found

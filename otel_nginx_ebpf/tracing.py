"""The nginx binaries being traced: attached when found, refused when they contradict themselves, let go when gone."""

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from otel_nginx_ebpf import silence
from otel_nginx_ebpf.clock import Clock
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.kernel import preflight
from otel_nginx_ebpf.kernel.attachment import Attachment
from otel_nginx_ebpf.nginx.processes import FileIdentity, Instance, Watch, instance_of
from otel_nginx_ebpf.nginx.resource import instance_attributes
from otel_nginx_ebpf.planning import Target, make_target
from otel_nginx_ebpf.record import RecordError, decode, worker_pid
from otel_nginx_ebpf.settings import Settings
from otel_nginx_ebpf.stats import Stats
from otel_nginx_ebpf.trace import AttributeValue
from otel_nginx_ebpf.verify import contradictions

_log = logging.getLogger(__name__)

# So many requests of a binary are checked for contradictions, each before it becomes a trace.
_VERIFIED_REQUESTS = 100


def find_instances(settings: Settings, watch: Watch) -> tuple[Instance, ...]:
    """The nginx instances that are wanted and run now.

    Raises:
        UserError: There is none, or a process that was named is none.
    """
    if settings.pid:
        return tuple({instance.master_pid: instance for instance in map(instance_of, settings.pid)}.values())
    for path in settings.binary:
        if not path.exists():
            raise UserError(f"--binary {path}: no such file")
    found = watch.new_instances()
    if not found and settings.binary:
        raise UserError(f"--binary {', '.join(map(str, settings.binary))}: no process runs it; start nginx first")
    if not found:
        raise UserError("no nginx found: start it, or name it with --pid or --binary")
    return found


def by_binary(instances: tuple[Instance, ...]) -> tuple[tuple[Instance, ...], ...]:
    """The instances grouped by the executable they run."""
    groups: dict[FileIdentity, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(instance.file_identity, []).append(instance)
    return tuple(map(tuple, groups.values()))


class _TracedBinary:
    """One binary's live probes, and the instances whose requests they see."""

    def __init__(self, target: Target, instances: tuple[Instance, ...], attachment: Attachment) -> None:
        self.target = target
        self.instances = instances
        """Those it was attached for."""
        self.attachment = attachment
        self.unverified = _VERIFIED_REQUESTS
        self.silence = silence.SilenceWatch()
        self._resource_of: dict[int, Mapping[str, AttributeValue]] = {}
        for instance in instances:
            self.add(instance)

    def add(self, instance: Instance) -> None:
        attributes = instance_attributes(instance, self.target.version)
        self._resource_of |= dict.fromkeys(instance.pids, attributes)

    def resource(self, pid: int) -> Mapping[str, AttributeValue]:
        """The resource attributes of the instance that a worker belongs to."""
        found = self._resource_of.get(pid)
        if found is None:
            found = self._resource_of[pid] = self._find_resource(pid)
        return found

    def _find_resource(self, pid: int) -> Mapping[str, AttributeValue]:
        try:
            instance = instance_of(pid)
        except UserError:  # it has ended since; where there is but one instance, it was that one's
            known = {id(attributes): attributes for attributes in self._resource_of.values()}
            return next(iter(known.values())) if len(known) == 1 else {}
        known_master = self._resource_of.get(instance.master_pid)
        return known_master or instance_attributes(instance, self.target.version)


class Tracing:
    """All live probes of this process. Call `begin`, then `sweep` and `records` again and again, then `end`."""

    def __init__(self, settings: Settings, stats: Stats) -> None:
        self._settings = settings
        self._stats = stats
        self._clock = Clock()
        self._watch = Watch(settings.binary)
        self._traced: dict[FileIdentity, _TracedBinary] = {}
        self._retired: list[_TracedBinary] = []
        """Detached since the last sweep; what they had in their ring buffers is still read."""
        self._refused: dict[FileIdentity, str] = {}
        self._silent: dict[FileIdentity, frozenset[str]] = {}
        self._attaching: dict[FileIdentity, Future[_TracedBinary]] = {}
        self._reattach: set[FileIdentity] = set()
        self._fullest = 0.0
        """Ring buffer since the last sweep, 0 to 1."""
        self._attacher = ThreadPoolExecutor(1, thread_name_prefix="attach")

    def begin(self) -> None:
        """Attaches to what runs now. Raises `UserError` when nothing can be traced."""
        preflight.check()
        instances = find_instances(self._settings, self._watch)
        named = bool(self._settings.pid or self._settings.binary)
        groups = by_binary(instances)
        for group in groups:
            try:
                self._went_live(self._attach(group))
            except UserError as error:
                # Of several that were found, one that cannot be traced does not keep the others from it.
                if named or len(groups) == 1:
                    raise
                self._refuse(group[0].file_identity, str(error))
        self._require_something()

    def _attach(self, instances: tuple[Instance, ...]) -> _TracedBinary:
        silent = self._silent.get(instances[0].file_identity, frozenset())
        target, load_request = make_target(instances, self._settings, silent)
        attachment = Attachment(load_request, self._settings.ring_buffer_mib << 20)
        if attachment.refused:
            _log.warning(
                "--propagate does nothing: the kernel does not take the program that writes to nginx's memory (%s; the "
                "usual reasons are lockdown and no CAP_SYS_ADMIN); requests are traced, and applications are not told",
                attachment.refused[0],
            )
        return _TracedBinary(target, instances, attachment)

    def _went_live(self, traced: _TracedBinary) -> None:
        self._traced[traced.instances[0].file_identity] = traced
        print(traced.target.ready_line(traced.instances), file=sys.stderr, flush=True)

    def _refuse(self, identity: FileIdentity, reason: str) -> None:
        self._refused[identity] = reason
        _log.error("not traced: %s", reason)

    def _require_something(self) -> None:
        if not self._traced and not self._attaching and self._refused:
            raise UserError("nothing is left to trace: " + "; ".join(self._refused.values()))

    def sweep(self) -> None:
        """Looks for nginx that has come, and forgets what has gone."""
        for traced in self._retired:
            self._give_back(traced)
        self._retired.clear()
        if self._settings.pid:
            self._find_new_workers()
        else:
            for instance in self._watch.new_instances():
                self._found(instance)
        for identity in self._reattach & self._traced.keys():
            instances = tuple(instance for instance in self._traced[identity].instances if instance.is_running)
            self._retire(identity)
            if instances:
                self._attaching[identity] = self._attacher.submit(self._attach, instances)
        self._reattach.clear()
        for identity, future in list(self._attaching.items()):
            if future.done():
                del self._attaching[identity]
                try:
                    self._went_live(future.result())
                except UserError as error:
                    self._refuse(identity, str(error))
        for identity, traced in list(self._traced.items()):
            self._stats.lose("lost_worker_gone", traced.attachment.forget_dead_processes())
            if not self._settings.pid and not traced.attachment.processes():
                _log.info("%s has ended", traced.target)
                self._retire(identity)
        self._note_counters()

    def _note_counters(self) -> None:
        """For whoever asks while probes are live."""
        lost: Counter[str] = Counter()
        for traced in [*self._traced.values(), *self._retired]:
            lost.update(traced.attachment.losses())
        self._stats.lost_in_kernel = lost
        self._stats.ring_buffer_fill, self._fullest = self._fullest, 0.0

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
        elif identity not in self._refused and identity not in self._attaching:
            self._attaching[identity] = self._attacher.submit(self._attach, (instance,))

    def records(self) -> Iterator[tuple[bytes, int, Mapping[str, AttributeValue]]]:
        """Each new record, Unix time minus monotonic time for it, and the resource attributes of its nginx.

        Raises:
            UserError: nginx's memory contradicts its layout, and nothing else is left to trace.
        """
        for traced in [*self._traced.values(), *self._retired]:
            unix_offset_ns = self._clock.unix_offset_ns()
            self._fullest = max(self._fullest, traced.attachment.ring_buffer_fill())
            wrong = self._layout_mismatch(traced)
            if not wrong:
                for raw in traced.attachment.records():
                    self._stats.received += 1
                    wrong = self._verify(traced, raw, unix_offset_ns) if traced.unverified else ""
                    if wrong:
                        self._stats.lose("lost_layout_mismatch")
                        break
                    if traced.silence.fell_silent(raw):
                        self._avoid_silent(traced)
                    yield raw, unix_offset_ns, traced.resource(worker_pid(raw))
            if wrong:
                self._contradicted(traced, wrong)

    def _contradicted(self, traced: _TracedBinary, wrong: str) -> None:
        """Lets a binary go whose memory is not as its layout says. Raises `UserError` when nothing is left to trace."""
        identity = traced.instances[0].file_identity
        if traced in self._retired:
            self._retired.remove(traced)
        else:
            del self._traced[identity]
        self._give_back(traced)
        self._note_counters()
        self._refuse(
            identity,
            f"{traced.target} does not look in memory as its layout ({traced.target.layout_source}) says: {wrong}; "
            "detached. Is it a patched build?",
        )
        self._require_something()

    def _avoid_silent(self, traced: _TracedBinary) -> None:
        """Attaches anew without the function that is never called: to the next candidate, if there is one."""
        function = traced.target.functions.get(silence.BOUNDARY)
        if function is None:  # known, and said, since it was attached
            return
        identity = traced.instances[0].file_identity
        self._silent[identity] = self._silent.get(identity, frozenset()) | {function}
        _log.warning("%s is never called in %s", function, traced.target)
        self._reattach.add(identity)

    def _layout_mismatch(self, traced: _TracedBinary) -> str:
        losses = traced.attachment.losses()
        if losses["lost_layout_mismatch"]:
            return "an invariant of its requests did not hold"
        # What the layout calls pointers are none. Once it is trusted, a page that is not there is the likelier reason.
        if traced.unverified and losses["lost_read_failed"]:
            return "its memory cannot be read where they should be"
        return ""

    def _verify(self, traced: _TracedBinary, raw: bytes, unix_offset_ns: int) -> str:
        """What contradicts the layout, in words. Only the first requests of a binary are looked at."""
        traced.unverified -= 1
        try:
            return ", ".join(contradictions(decode(raw), unix_offset_ns))
        except RecordError:
            return ""

    def detach(self) -> None:
        """Removes all probes; what has come stays readable by `records`."""
        for traced in self._traced.values():
            traced.attachment.detach()

    def end(self) -> None:
        """Detaches and gives everything back, losses counted."""
        self._attacher.shutdown(cancel_futures=True)
        for future in self._attaching.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().attachment.close()
        for traced in [*self._traced.values(), *self._retired]:
            self._give_back(traced)
        self._traced.clear()
        self._retired.clear()
        self._note_counters()

    def _retire(self, identity: FileIdentity) -> None:
        """Detaches from a binary; its ring buffer is read until the next sweep."""
        traced = self._traced.pop(identity)
        traced.attachment.detach()
        self._retired.append(traced)

    def _give_back(self, traced: _TracedBinary) -> None:
        for cause, count in traced.attachment.losses().items():
            self._stats.lose(cause, count)
        traced.attachment.close()

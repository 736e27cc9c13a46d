"""Delivers encoded messages of one signal to a collector over OTLP.

Spans and log records are encoded when they arrive and queued as finished messages. The official exporters send the
messages. The SDK's batch processors drop data without counting it when their queue is full or an export fails. Here a
message stays in the queue until the collector has it.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.otlp.encoding import encode_for_resource
from otel_nginx_ebpf.export.otlp.queue_dir import QueueDir, Stored
from otel_nginx_ebpf.export.otlp.sender import Answer, Sender
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.metrics.stats import Deliveries, Size
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.traces.model import AttributeValue

logger = logging.getLogger(__name__)

_MESSAGE_BYTES_MAX = 1 << 21
"""A collector's gRPC server accepts 4 MiB by default."""
_RETRY_FIRST_S = 0.5
_RETRY_MAX_S = 5.0
_SIGNAL_S = 0.1
"""The longest sleep of the calling thread. The kernel may deliver a signal to one of gRPC's threads. Python's handler
then runs only when the main thread wakes up by itself."""
_DISK_RETRY_S = 1.0
_ABORT_S = 1.0
"""How long the SDK's exporter may take to notice that its shutdown interrupts an export."""


@dataclass(slots=True, eq=False)
class _Message:
    """An ExportTraceServiceRequest or ExportLogsServiceRequest. Its bytes are in memory or on disk."""

    size: Size
    data: bytes | None = None
    stored: Stored | None = None
    done: bool = False
    """Whether the message was delivered or refused."""


class Delivery:
    """A bounded queue of messages, and a thread that sends them to the collector.

    A trace is kept whole or dropped whole. It stays in the queue until it is delivered or refused. With a `queue_dir`,
    messages wait in this directory while the collector accepts no messages. Messages that are left at the end wait
    there for the next run.
    """

    whom = "collector"
    """Whom messages to the user name."""

    def __init__(
        self,
        sender: Sender,
        resource: Resource,
        counts: Deliveries,
        *,
        queue_spans: int,
        queue_bytes: int,
        batch_spans: int,
        delay_s: float,
        wait_for_room: bool = False,
        queue_dir: QueueDir | None = None,
    ) -> None:
        """`queue_spans` (or log records) and `queue_bytes` limit the queue in memory.

        When the queue is full, `_add` waits if `wait_for_room` is set. Otherwise it drops the trace or log record.
        """
        self._sender = sender
        sender.report = self._report
        self._resources = Resources(resource)
        self._counts = counts
        self._queue_spans = queue_spans
        self._queue_bytes = queue_bytes
        # A message fills at most a quarter of the room, so that other messages can be stored or sent at the same time.
        self._batch_spans = min(batch_spans, queue_spans // 4)
        self._batch_bytes = min(_MESSAGE_BYTES_MAX, queue_bytes // 4)
        self._delay_s = delay_s
        self._wait_for_room = wait_for_room
        self._lock = threading.Lock()
        """Guards everything below."""
        self._changed = threading.Condition(self._lock)
        self._open: dict[int, tuple[Mapping[str, AttributeValue], list[bytes]]] = {}
        """The message that is being filled: encoded spans or log records, by the identity of their nginx's attributes.

        0: there are no attributes.
        """
        self._open_size = Size()
        self._queue: deque[_Message] = deque()
        self._held = counts.queued
        """The size of all messages in memory: the queued messages and the open message."""
        self._closing = False
        self._abandoned = False
        self._failing = False
        self._queue_dir = queue_dir
        for stored in queue_dir.left_behind() if queue_dir else ():
            counts.received += stored.traces
            self._queue.append(_Message(Size(stored.traces, stored.spans), stored=stored))
        self._threads = [threading.Thread(target=self._deliver, name="otlp-export", daemon=True)]
        if queue_dir:
            self._threads.append(threading.Thread(target=self._spill, name="otlp-queue", daemon=True))
        for thread in self._threads:
            thread.start()

    def _add(self, resource: Mapping[str, AttributeValue], encoded: bytes, spans: int) -> bool:
        """Adds an encoded trace or log record to the open message. Returns false if there was no room.

        The lock must be held.
        """
        size = len(encoded)
        held = self._held
        if (held.bytes + size > self._queue_bytes or held.spans + spans > self._queue_spans) and not self._wait_for(
            spans, size
        ):
            self._counts.lose("lost_queue_full")
            return False
        filling = self._open_size
        if filling.traces and (filling.spans + spans > self._batch_spans or filling.bytes + size > self._batch_bytes):
            self._close_message()
            filling = self._open_size
        instance = id(resource) if resource else 0
        encoded_of = self._open.get(instance)
        if encoded_of is None:
            encoded_of = self._open[instance] = resource, []
        encoded_of[1].append(encoded)
        filling.traces += 1
        filling.spans += spans
        filling.bytes += size
        held.traces += 1
        held.spans += spans
        held.bytes += size
        if filling.spans >= self._batch_spans:
            self._close_message()
        elif held.traces == 1:
            self._changed.notify_all()
        return True

    def _has_room(self, spans: int, size: int) -> bool:
        return self._held.spans + spans <= self._queue_spans and self._held.bytes + size <= self._queue_bytes

    def _wait_for(self, spans: int, size: int) -> bool:
        """Waits for room, if `wait_for_room` is set. Returns whether there is room."""
        if self._held.traces == self._open_size.traces:  # all queued messages are on disk
            self._close_message()
        while self._wait_for_room and self._held.traces and not self._has_room(spans, size):
            self._changed.wait(_SIGNAL_S)
        return self._has_room(spans, size)

    def _close_message(self) -> None:
        """Moves the open message to the queue."""
        if not self._open_size.traces:
            return
        data = b"".join(
            encode_for_resource(self._resources.of(resource), spans) for resource, spans in self._open.values()
        )
        self._queue.append(_Message(self._open_size, data))
        self._open = {}
        self._open_size = Size()
        self._changed.notify_all()

    def hurry(self) -> None:
        """Delivers what is queued without waiting for more. `shutdown` follows."""
        self._sender.hasten()
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def shutdown(self, timeout_s: float) -> None:
        self.hurry()
        deadline_s = time.monotonic() + timeout_s
        try:
            while self._threads[0].is_alive() and time.monotonic() < deadline_s:
                self._threads[0].join(_SIGNAL_S)
        finally:
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
            self._sender.shutdown()
            self._threads[0].join(_ABORT_S)
            for spilling in self._threads[1:]:
                spilling.join()  # The message that it is writing must not be written twice.
            self._keep_the_rest()

    def _keep_the_rest(self) -> None:
        """Stores the messages that are left in the queue directory. Counts them as lost if that is not possible."""
        with self._changed:
            self._close_message()
            rest = list(self._queue)
            self._queue.clear()
        for message in rest:
            if message.stored or self._store(message):
                self._counts.kept += message.size.traces
            else:
                self._counts.lose("lost_export_failed", message.size.traces)
        if self._queue_dir:
            self._queue_dir.close()

    def _deliver(self) -> None:
        """Delivers messages until the end. Runs in a thread."""
        retry_s = _RETRY_FIRST_S
        while message := self._next_message():
            answer = self._send(message)
            if answer.delivered or not answer.retry:
                retry_s = _RETRY_FIRST_S
            else:
                self._pause(answer.wait_s, retry_s)
                retry_s = min(retry_s * 2, _RETRY_MAX_S)

    def _pause(self, asked_s: float, retry_s: float) -> None:
        """Waits before the next try. At the end the wait is short, to notice in time that a collector is back."""
        with self._changed:
            if asked_s:
                self._changed.wait_for(lambda: self._abandoned, asked_s)
            else:
                self._changed.wait_for(lambda: self._closing, retry_s * random.uniform(0.8, 1.2))
                if self._closing:
                    self._changed.wait_for(lambda: self._abandoned, _RETRY_FIRST_S)

    def _next_message(self) -> _Message | None:
        """Returns the oldest message, which stays in the queue. `None`: the end.

        Waits until a message is full or has waited for long enough.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._open or self._closing)
            self._changed.wait_for(lambda: self._queue or self._closing, self._delay_s)
            if not self._queue:
                self._close_message()
            return None if self._abandoned or not self._queue else self._queue[0]

    def _send(self, message: _Message) -> Answer:
        data = message.data
        if data is None and message.stored and self._queue_dir:
            try:
                data = self._queue_dir.load(message.stored)
            except OSError:
                with self._changed:
                    self._queue.rotate(-1)  # The other messages need not wait for this message.
                return Answer(retry=True)
        if data is None:
            if self._take_out(message):
                self._counts.lose("lost_queue_file_damaged", message.size.traces)
            return Answer()
        began_s = time.monotonic()
        try:
            answer = self._sender.send(data)
        except Exception:
            if self._abandoned:  # gRPC raises ValueError when its channel is closed during a call.
                return Answer(retry=True)
            # The thread must continue. If the exporter raises, the message is lost, and the log says so.
            logger.exception("%s: the exporter failed on a message of %d", self.whom, message.size.spans)
            answer = Answer()
        self._counts.sent(time.monotonic() - began_s)
        if answer.retry or not self._take_out(message):
            return answer
        if answer.delivered:
            self._counts.exported += message.size.traces
            if answer.rejected:
                self._counts.reject(answer.rejected)
            if self._failing:
                self._failing = False
                logger.warning("%s: delivering again, %d messages queued", self.whom, len(self._queue))
        else:
            self._counts.lose("lost_export_refused", message.size.traces)
        if message.stored and self._queue_dir:
            self._queue_dir.forget(message.stored)
            self._counts.stored_bytes = self._queue_dir.bytes
        return answer

    def _take_out(self, message: _Message) -> bool:
        """Removes the oldest message from the queue. Returns false if shutdown has already removed and counted it."""
        with self._changed:
            if not self._queue:
                return False
            self._queue.popleft()
            message.done = True
            if message.data is not None:
                self._held.remove(message.size)
            self._changed.notify_all()
            return True

    def _report(self, problem: str) -> None:
        """Logs the first problem of an outage. The other problems of the outage are not logged."""
        if not self._failing:
            logger.warning("%s: %s", self.whom, printable(" ".join(problem.split())))
            with self._changed:
                self._failing = True
                self._changed.notify_all()

    def _spill(self) -> None:
        """Moves messages to disk. Runs in a second thread.

        Starts when the collector does not answer, or when a quarter of the room in memory is taken.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._abandoned or self._to_spill())
                message = self._to_spill()
            if self._abandoned or message is None:
                return
            if not self._store(message):
                with self._changed:
                    self._changed.wait_for(lambda: self._abandoned, _DISK_RETRY_S)

    def _to_spill(self) -> _Message | None:
        """Returns the oldest message that is in memory and should be on disk. `None`: there is no such message."""
        held = self._held
        if not self._failing and held.bytes <= self._queue_bytes // 4 and held.spans <= self._queue_spans // 4:
            return None
        return next((message for message in self._queue if message.data is not None), None)

    def _store(self, message: _Message) -> bool:
        if self._queue_dir is None or message.data is None:
            return False
        stored = self._queue_dir.store(message.data, message.size.traces, message.size.spans)
        if stored is None:
            return False
        with self._changed:
            if message.done:  # delivered or refused in the meantime
                self._queue_dir.forget(stored)
                return True
            message.stored, message.data = stored, None
            self._held.remove(message.size)
            self._counts.stored_bytes = self._queue_dir.bytes
            self._changed.notify_all()
        return True

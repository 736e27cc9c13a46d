"""The lines of nginx's error log: from the kernel's records to the request that each line is for. Pure."""

import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from otel_nginx_ebpf.traces.abi import LIMITS, CStruct, c_enum

LOG_LINE = CStruct("log_line")
_LEVEL = LOG_LINE.offset("level")
_WORKER_PID = struct.Struct(f"{LOG_LINE.offset('worker_pid')}xI").unpack_from
_MARKER = c_enum("log_marker")["LOG_MARKER"].to_bytes(8, "little")
_NO_ATTEMPT = LIMITS["NO_ATTEMPT"]

LEVELS = ("emerg", "alert", "crit", "error", "warn", "notice", "info", "debug")
"""nginx's levels. The first has the number 1."""

# How long after the end of a request's lines its record may arrive. The kernel sends both in one run of one program.
_RECORD_S = 1.0

_NO_RESOURCE: Mapping[str, Any] = {}

# How many lines wait for the end of their requests, at most.
_WAITING_MAX = 4096

# ngx_log_error_core. syslog's header is in front of it.
_LINE = re.compile(
    rb"(?:<\d+>.{0,400}?)?\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(\w+)\] \d+#\d+: (?:\*(\d+) )?(.*?)\n?", re.DOTALL
)

# What ngx_http_log_error adds to nginx's message. The spans say it: client, server, request, upstream, host, referrer.
_ADDED = re.compile(r", client: (?:unix:|[0-9a-f.:]+)(?=,|$).*", re.DOTALL)

# ngx_http_log_error also says what nginx was doing ("while connecting to upstream").
_ABOUT_UPSTREAM = re.compile(r" while [\w ]*\bupstream$")


@dataclass(slots=True)
class LogLine:
    """A line of nginx's error log."""

    logged_mono_ns: int
    level: str
    error_number: int
    """errno of the system call that failed; 0: none failed."""
    attempt: int | None
    """The number of the upstream attempt that the line is about, from 1. `None`: it is about the request."""
    message: str
    """nginx's message, without what nginx adds to every message of a request."""
    added: str = field(default="", compare=False)
    """What nginx adds: client, server, request, upstream, host, referrer."""
    unix_offset_ns: int = field(default=0, compare=False)
    resource: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The resource attributes of the nginx that logged it."""


Key = tuple[int, int, int]
"""A request: pid of the worker, number of the connection, number of the request on it."""


def is_log_line(raw: bytes) -> bool:
    """Tells whether the bytes are a line of the error log, or the end of a request's lines, instead of a record."""
    return raw.startswith(_MARKER)


def has_text(raw: bytes) -> bool:
    """Tells whether the bytes are a line of the error log, and not the end of a request's lines."""
    return is_log_line(raw) and len(raw) > _LEVEL and raw[_LEVEL] != 0


def line_pid(raw: bytes) -> int:
    """Returns the pid of the process that logged a line; 0 if the line is damaged."""
    return int(_WORKER_PID(raw)[0]) if len(raw) >= LOG_LINE.size else 0


class LogLines:
    """Holds the lines of running requests until their records come.

    The kernel sends a request's lines, then their number when the request ends, then the request's record, if any.
    Lines without a record have no trace: the sampler left the request out, or it did not end. They are forgotten,
    unless `keeps_untraced` is set.
    """

    def __init__(self, *, keeps_untraced: bool = False) -> None:
        self._waiting: OrderedDict[Key, list[LogLine | None]] = OrderedDict()
        """`None` stands for a line that is not as nginx writes it."""
        self._count = 0
        self._ended: dict[int, tuple[Key, list[LogLine | None], int]] = {}
        """The last request with lines that ended, by its worker's pid: its lines, and how many the kernel sent."""
        self._ended_s: dict[int, float] = {}
        """Since when at least the record of such a request is awaited, by the same pids."""
        self._keeps_untraced = keeps_untraced
        self._untraced: list[LogLine] = []
        self._lost = self._damaged = 0

    def __bool__(self) -> bool:
        """Tells whether `take` may return lines."""
        return bool(self._ended or self._waiting)

    def take_lost(self) -> int:
        """Returns how many more lines of ended requests did not arrive, or are not as nginx writes them."""
        lost, self._lost = self._lost, 0
        return lost

    def take_damaged(self) -> int:
        """Returns how many more lines arrived that are not as nginx writes them."""
        damaged, self._damaged = self._damaged, 0
        return damaged

    def take_untraced(self, now_s: float) -> list[LogLine]:
        """Returns the lines that will have no trace, as is known now. `now_s`: of a clock that is not set."""
        for pid in [pid for pid, since_s in self._ended_s.items() if now_s - since_s > _RECORD_S]:
            self._forget_ended(pid)
        for pid in self._ended:
            self._ended_s.setdefault(pid, now_s)
        untraced, self._untraced = self._untraced, []
        return untraced

    def take_rest(self) -> list[LogLine]:
        """Returns all lines that are left. No record follows."""
        for pid in [*self._ended]:
            self._forget_ended(pid)
        while self._waiting:
            self.release(self._waiting.popitem()[1])
        self._count = 0
        return self.take_untraced(0)

    def release(self, lines: Iterable[LogLine | None]) -> None:
        """Takes lines back that will have no trace."""
        if self._keeps_untraced:
            self._untraced += [line for line in lines if line is not None]

    def _forget_ended(self, pid: int) -> None:
        self._ended_s.pop(pid, None)
        if pid in self._ended:
            self.release(self._ended.pop(pid)[1])

    def add(self, raw: bytes, unix_offset_ns: int = 0, resource: Mapping[str, Any] = _NO_RESOURCE) -> None:
        """Takes a line, or the end of a request's lines. Anything else is counted as a lost line.

        Args:
            raw: The bytes from the kernel.
            unix_offset_ns: Unix time minus monotonic time.
            resource: The resource attributes of the nginx that logged it.
        """
        if len(raw) < LOG_LINE.size:
            self._lost += 1
            return
        _, connection, requests, logged_ns, pid, error_number, lines, level, attempt, length = (
            LOG_LINE.struct.unpack_from(raw)
        )
        key = pid, connection, requests
        if not level:
            found = self._waiting.pop(key, [])
            self._count -= len(found)
            self._forget_ended(pid)
            self._ended[pid] = key, found, lines
            return
        text = raw[LOG_LINE.size : LOG_LINE.size + length]
        line = _parse(text, connection, level, logged_ns, error_number, None if attempt == _NO_ATTEMPT else attempt + 1)
        if line is None:
            self._damaged += 1
        else:
            line.unix_offset_ns, line.resource = unix_offset_ns, resource
        if not lines:  # for no running request
            self.release([line])
            return
        self._waiting.setdefault(key, []).append(line)
        self._count += 1
        while self._count > _WAITING_MAX:  # their request's end will say that they are missing
            _, oldest = self._waiting.popitem(last=False)
            self._count -= len(oldest)
            self.release(oldest)

    def take(self, pid: int, connection: int, requests: int) -> tuple[LogLine, ...]:
        """Returns the lines of the request whose record follows, and forgets lines of requests without a record."""
        if not self:
            return ()
        key = pid, connection, requests
        ended, lines, sent = self._ended.get(pid, (None, [], 0))
        if ended == key:
            del self._ended[pid]
        else:  # without lines; or its end was lost, because the ring buffer was full
            self._forget_ended(pid)
            lines, sent = self._waiting.pop(key, []), 0
            self._count -= len(lines)
        self._ended_s.pop(pid, None)
        whole = tuple(line for line in lines if line is not None)
        self._lost += max(sent - len(whole), 0)
        return whole


def _parse(
    text: bytes, connection: int, level: int, logged_ns: int, error_number: int, attempt: int | None
) -> LogLine | None:
    """Returns a line. `None`: the text is not the line that nginx was about to write."""
    match = _LINE.fullmatch(text)
    name = LEVELS[level - 1] if level <= len(LEVELS) else ""
    if match is None or match[1] != name.encode() or int(match[2] or 0) != connection:
        return None
    whole = match[3].decode("utf-8", "backslashreplace")
    message = _ADDED.sub("", whole, count=1)
    if not _ABOUT_UPSTREAM.search(message):
        attempt = None
    return LogLine(logged_ns, name, error_number, attempt, message, whole[len(message) :])

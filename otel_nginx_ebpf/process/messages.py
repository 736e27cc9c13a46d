"""What the supervisor and the emitter tell each other: each message is declared here, once.

The supervisor is trusted. Its messages are JSON objects, with file descriptors beside them.

The emitter is not trusted, because it reads what clients send. Its messages are twelve bytes and can only make the
supervisor detach or answer.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

# From the supervisor.


@dataclass(frozen=True, slots=True)
class Attached:
    """Probes of a binary are live. The descriptors are of its maps: records, loss counts, durations of requests."""

    number: int
    """The supervisor's number of this attachment; the other messages refer to it."""
    target: str
    layout_source: str
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The last emitter was killed before it read all of these maps. The descriptors are as in `Attached`."""

    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Alive:
    """Which processes of the attachment run now."""

    number: int
    pids: Sequence[int]
    serving: Sequence[Sequence[int]] | None = None
    """For each worker `kernel.connections.Serving`, also if it has ended since the last time. `None`: as then."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the probes of an attachment cost in the last second that was measured."""

    number: int
    cost_ns: int | None
    """Processor time for each request. `None`: no request ended."""
    hits: Mapping[str, float]
    """Hits a second, by probe."""
    passed: bool
    """Whether the cost or the loss passed the user's limit."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The supervisor counted a loss."""

    cause: str
    count: int


@dataclass(frozen=True, slots=True)
class Belongs:
    """The answer to `Kind.WHOSE`: the resource attributes of the nginx that a process belongs to."""

    number: int
    pid: int
    attributes: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Retired:
    """The probes of an attachment are gone. Its ring buffer is to be read once more."""

    number: int


@dataclass(frozen=True, slots=True)
class End:
    """Nothing comes any more. The emitter delivers what it has, for `grace_s` seconds at most, and exits."""

    grace_s: float


Order = Attached | Abandoned | Alive | Measured | Lost | Belongs | Retired | End
"""A message from the supervisor."""

_ORDERS: dict[str, type[Order]] = {
    order.__name__: order for order in (Attached, Abandoned, Alive, Measured, Lost, Belongs, Retired, End)
}


def encode_order(order: Order) -> tuple[bytes, Sequence[int]]:
    """Returns a message's JSON and its file descriptors, which travel beside it."""
    values = {field.name: getattr(order, field.name) for field in fields(order)}
    descriptors = values.pop("descriptors", ())
    return json.dumps({"order": type(order).__name__, **values}).encode(), descriptors


def decode_order(raw: bytes, descriptors: Sequence[int]) -> Order:
    """Returns the message that `encode_order` made; the file descriptors have other numbers here."""
    values = json.loads(raw)
    order = _ORDERS[values.pop("order")]
    if descriptors:
        values["descriptors"] = tuple(descriptors)
    return order(**values)


# From the emitter.


class Kind(IntEnum):
    """What a report is about."""

    BEGUN = 1
    """The emitter has given up its privileges and is ready for records."""
    CONTRADICTED = 2
    """The memory of a worker contradicts the layout of its binary."""
    SILENT = 3
    """A probed function of a binary is never called."""
    WHOSE = 4
    """The emitter asks which nginx a process belongs to."""


class EmitterReport(NamedTuple):
    """A message from the emitter."""

    kind: Kind
    number: int = 0
    """Of the attachment; 0 in `BEGUN`."""
    pid: int = 0


_REPORT = struct.Struct("=III")
REPORT_BYTES = _REPORT.size


def encode_report(report: EmitterReport) -> bytes:
    """Returns a report's twelve bytes."""
    return _REPORT.pack(*report)


def decode_report(raw: bytes) -> EmitterReport:
    """Returns the report in `raw`.

    Raises:
        ValueError: The bytes are not a report.
    """
    try:
        kind, number, pid = _REPORT.unpack(raw)
    except struct.error as error:
        raise ValueError(str(error)) from error
    return EmitterReport(Kind(kind), number, pid)

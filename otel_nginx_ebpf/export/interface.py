"""The interface of exporters."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from otel_nginx_ebpf.traces.model import AttributeValue, Trace
from otel_nginx_ebpf.traces.record import Request

Record = tuple[bytes, int, Mapping[str, AttributeValue]]
"""A record, Unix time minus monotonic time, and the resource attributes of the nginx it is from."""

Completed = tuple[Request, int, Mapping[str, AttributeValue]]
"""A request, its offset from monotonic to Unix time in nanoseconds, and the resource attributes of its nginx."""


class Exporter(Protocol):
    """Takes records of completed requests. Called from one thread."""

    at_once: int
    """The number of records that `take` should get at once."""

    def take(self, records: Sequence[Record]) -> None:
        """Takes records over without blocking. Only writing to stdout may take time.

        While probes are live, each poll of the ring buffers calls it, even without requests.

        Raises:
            BrokenPipeError: The reader of the output is gone, or the user quits.
            UserError: The output cannot be written.
        """

    def shutdown(self, timeout_s: float) -> None:
        """Delivers the requests that it holds for at most `timeout_s` seconds, and counts the rest as lost."""


class RequestExporter(Protocol):
    """Takes decoded requests instead of records. Otherwise like `Exporter`."""

    at_once: int

    def take(self, completed: Sequence[Completed]) -> None: ...

    def shutdown(self, timeout_s: float) -> None: ...


class TraceExporter(Protocol):
    """Takes built traces instead of records. Otherwise like `Exporter`."""

    def export(self, trace: Trace) -> None: ...

    def shutdown(self, timeout_s: float) -> None: ...
